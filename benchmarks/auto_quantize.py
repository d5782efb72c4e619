"""Perplexity against bits on the built-in sample model: uniform formats, `auto_quantize`, and the search of ModelOpt.

    python benchmarks/auto_quantize.py --modelopt PYTHON --plot curve.svg

PYTHON is the interpreter of an environment with nvidia-modelopt, torch and transformers; without it the peer is left
out. All choose among symmetric integers of 2 to 8 bits in groups of 64 for the same layers (not the embeddings), on
the same batches, with the same loss; each choice is then quantized and measured by the same code. Every format has one
float32 scale for 64 weights, 0.5 bits, which ModelOpt doesn't count: its target is lower by that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

WIDTHS, GROUP, SCALE_BITS = (2, 3, 4, 5, 6, 8), 64, 0.5
HEAD, EMBEDDING = "*lm_head*", "*embed_tokens*"


def config(bits: int) -> dict[str, Any]:
    """Integers of one width for every layer but the embeddings, in a form that both libraries take."""
    weight = {"num_bits": bits, "block_sizes": {-1: GROUP}}
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    entries += [{"quantizer_name": "*weight_quantizer", "cfg": weight}]
    entries += [{"quantizer_name": name, "enable": False} for name in (HEAD, EMBEDDING)]
    return {"quant_cfg": entries, "algorithm": "max"}


def loss_func(output: Any, batch: Any) -> Any:
    from torch.nn.functional import cross_entropy

    return cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())


def load(folder: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def peer(job: dict[str, Any]) -> dict[str, Any]:
    """ModelOpt's choices, {target: {layer: bits}}, and the seconds of its search."""
    import modelopt.torch.quantization as mtq
    import torch
    from safetensors.torch import load_file

    ids = load_file(job["batches"])
    batches = [{"input_ids": ids[name]} for name in sorted(ids)]
    torch.set_num_threads(job["threads"])
    began, found = time.perf_counter(), {}
    excluded = {"excluded_module_name_patterns": [HEAD, EMBEDDING]}
    constraints = [{"effective_bits": target - SCALE_BITS, "cost": excluded} for target in job["targets"]]
    _, state = mtq.auto_quantize(
        load(job["model"]),
        constraints=constraints[0],
        quantization_formats=[config(bits) for bits in WIDTHS],
        data_loader=batches,
        forward_step=lambda model, batch: model(**batch),
        loss_func=loss_func,
        disabled_layers=[HEAD, EMBEDDING],
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
    )
    seconds = time.perf_counter() - began
    for target, constraint in zip(job["targets"], constraints, strict=True):
        layers = {name: 16 for group in state["candidate_stats"].values() for name in group["module_names"]}
        for entry in mtq.get_auto_quantize_config(state, constraint)["quant_cfg"]:
            name, _, leaf = str(entry["quantizer_name"]).rpartition(".")
            if leaf == "weight_quantizer" and name in layers and entry.get("enable", True):
                layers[name] = entry["cfg"]["num_bits"]
        found[str(target)] = layers
    return {"choices": found, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modelopt", help="Python of an environment with nvidia-modelopt")
    parser.add_argument("--targets", default="3,3.5,4,4.5,5.5")
    parser.add_argument("--methods", default="gradient,curvature")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", help="file for the curve of perplexity against bits")
    parser.add_argument("--peer", nargs=2, metavar=("JOB", "RESULT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        job, result = map(Path, options.peer)
        result.write_text(json.dumps(peer(json.loads(job.read_text()))))
        return
    compare(options)


def compare(options: argparse.Namespace) -> None:
    import torch
    from safetensors.torch import save_file

    import detent
    from detent.data import load_texts, sample_model_dir
    from detent.data.batches import token_batches
    from detent.evaluation import evaluation_ids, perplexity
    from detent.pretrained.loading import load_tokenizer

    torch.set_num_threads(options.threads)
    folder = str(sample_model_dir())
    tokenizer = load_tokenizer(Path(folder))
    ids = evaluation_ids(load_texts("builtin", "evaluation"), tokenizer)
    samples = token_batches(load_texts("builtin", "calibration"), tokenizer, 256, 4, 64)
    batches = [{"input_ids": batch["input_ids"]} for batch in samples]
    targets = [float(text) for text in options.targets.split(",")]
    points: dict[str, list[tuple[float, float]]] = {}

    def show(who: str, bits: float, model: Any, seconds: float | None = None) -> None:
        measured = perplexity(model, ids, batch_size=8).perplexity
        points.setdefault(who, []).append((bits, measured))
        print(f"{who:28} {bits:7.3f} {measured:9.3f}" + ("" if seconds is None else f"  {seconds:.1f} s"), flush=True)

    print(f"{'choice':28} {'bits':>7} {'perplexity':>9}")
    show("float", 32, load(folder))
    for bits in WIDTHS:
        show("uniform", bits + SCALE_BITS, detent.quantize(load(folder), config(bits)))
    formats = [config(bits) for bits in WIDTHS]
    for method in options.methods.split(","):
        began = time.perf_counter()
        _, state = detent.auto_quantize(
            load(folder), {"effective_bits": targets[0]}, formats, batches, loss_func=loss_func, method=method
        )
        seconds = time.perf_counter() - began
        for target in targets:
            chosen = detent.get_auto_quantize_config(state, {"effective_bits": target})
            rows = detent.auto_quantize_table(state, {"effective_bits": target})
            elements = [sum(unit["elements"]) for unit in state["candidate_stats"].values()]
            bits = sum(row["bits"] * n for row, n in zip(rows, elements, strict=True)) / sum(elements)
            show(f"auto_quantize, {method}", bits, detent.quantize(load(folder), chosen), seconds)
    if options.modelopt:
        with TemporaryDirectory() as place:
            job, result, data = (Path(place) / name for name in ("job.json", "result.json", "batches.safetensors"))
            save_file({f"{i:04d}": batch["input_ids"] for i, batch in enumerate(batches)}, data)
            what = {"batches": str(data), "model": folder, "targets": targets, "threads": options.threads}
            job.write_text(json.dumps(what))
            command = [options.modelopt, __file__, "--peer", str(job), str(result)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            found = json.loads(result.read_text())
        for layers in found["choices"].values():
            show_peer(show, found["seconds"], layers, load(folder))
    if options.plot:
        draw(points, options.plot)


def show_peer(show: Any, seconds: float, layers: dict[str, int], model: Any) -> None:
    """Measure a choice of the peer: {layer: bits}; a layer with another number of bits stays in floating point."""
    import detent

    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    spent = elements = 0.0
    for name, width in layers.items():
        if "lm_head" in name or "embed_tokens" in name:
            continue
        count = model.get_submodule(name).weight.numel()
        if width in WIDTHS:
            weight = {"num_bits": width, "block_sizes": {-1: GROUP}}
            entries.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": weight})
        spent, elements = spent + count * (width + SCALE_BITS if width in WIDTHS else 32), elements + count
    show("ModelOpt's auto_quantize", spent / elements, detent.quantize(model, {"quant_cfg": entries}), seconds)


def draw(points: dict[str, list[tuple[float, float]]], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for who, found in points.items():
        if who == "float":
            axes.axhline(found[0][1], color="gray", linestyle=":", label="float")
        else:
            axes.plot(*zip(*sorted(found), strict=True), marker="o", label=who)
    axes.set(xlabel="bits per weight, scales included", ylabel="perplexity", yscale="log")
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
