"""Bits per weight and perplexity of every scheme on the built-in sample model.

    python benchmarks/schemes.py            print the table
    python benchmarks/schemes.py --write    put it between the markers in docs/schemes.md

Perplexity is measured on the built-in evaluation text; schemes with static activations are calibrated on the built-in
calibration text. Bits count codes, scales and zero points of the quantized weights (not the embedding, which stays).
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from detent.checkpoints import Source
from detent.config import all_schemes, parse_scheme
from detent.data import load_texts, sample_model_dir
from detent.data.batches import token_batches
from detent.engine.data_loop import run_batches
from detent.evaluation import evaluation_ids, perplexity
from detent.plan.plan import make_plan, with_scale_dtype
from detent.pretrained.loading import load_config, load_model, load_tokenizer, model_dtype, model_on_meta
from detent.runs.simulate import simulate

PAGE = Path(__file__).parents[1] / "docs" / "schemes.md"
START, END = "<!-- schemes: made by benchmarks/schemes.py -->", "<!-- end of schemes -->"

Row = tuple[str, str, str, str, str]


def rows(names: list[str]) -> list[Row]:
    """(scheme, weights, activations, bits per weight, perplexity), the float model first."""
    folder = sample_model_dir()
    source, config, tokenizer = Source(folder), load_config(folder), load_tokenizer(folder)
    dtype = model_dtype("auto", config, source)
    ids = evaluation_ids(load_texts("builtin", "evaluation"), tokenizer)
    batches = token_batches(load_texts("builtin", "calibration"), tokenizer, 512)
    before = perplexity(load_model(source, config, dtype=dtype), ids).perplexity
    table = [("(the model as it is)", "bfloat16", "-", "16.000", f"{before:.3f}")]
    for name in names:
        model = load_model(source, config, dtype=dtype)
        scheme = with_scale_dtype(parse_scheme(name), dtype)
        plan = make_plan(source, model_on_meta(config), scheme)
        layers = simulate(model, plan, lambda m: run_batches(m, batches))
        weights = [layer.record.weight for layer in layers.values() if layer.record.weight is not None]
        parameters = sum(w.codes.numel() for w in weights)
        bits = sum(w.codes.numel() * w.format.bits_per_element(w.shape) for w in weights) / parameters
        after = perplexity(model, ids).perplexity
        activations = scheme.input or scheme.output
        words = "-" if activations is None else str(activations)
        row = (name, str(scheme.weight), words, f"{bits:.3f}", f"{after:.3f}")
        print("  ".join(row), flush=True)
        table.append(row)
    return table


def markdown(table: list[Row]) -> str:
    lines = ["| scheme | weights | activations | bits per weight | perplexity |", "|---|---|---|---:|---:|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in table])


def main() -> None:
    parser = argparse.ArgumentParser(description="Bits per weight and perplexity of every scheme on the sample model.")
    parser.add_argument("--write", action="store_true", help="update docs/schemes.md")
    parser.add_argument("schemes", nargs="*", help="only these")
    arguments = parser.parse_args()
    names = arguments.schemes or [name for name in all_schemes(neighbours=False) if name != "no_quant"]
    text = markdown(rows(names))
    print(text)
    if arguments.write:
        page = PAGE.read_text(encoding="utf-8")
        block = f"{START}\n\n{text}\n\n{END}"
        updated, count = re.subn(f"{re.escape(START)}.*?{re.escape(END)}", lambda _: block, page, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{PAGE} needs the markers {START} and {END} once")
        PAGE.write_text(updated, encoding="utf-8")


if __name__ == "__main__":
    main()
