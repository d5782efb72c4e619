"""Quantizes a tiny random model of every published architecture by every method, and writes the table of what works.

python tools/models_table.py [--rows TEXT ...] [--columns NAME ...] [--jobs N] [--output docs/models.md]

Each cell is a whole run: a checkpoint with the published tensor names goes through the function that the command line
calls, which exports, reloads, and compares the logits of the two. With --rows or --columns the result is printed, and
the page stays as it is. A cell that fails with anything but a refusal stops the script with status 1.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

HEAD = """# Models

Detent has no list of supported models: it [finds](structure.md) what it needs to know. This page shows that it does,
for the models of the table in Quark's guide (the first part) and for what people use besides. Each cell is a whole run
on a tiny random model of that architecture, with the published checkpoint's tensor names and a tokenizer in its format:
quantized, exported, reloaded, and the reloaded model's logits compared with the simulated ones. `make models` runs them
and writes this page.

The number is the share of the language model's matrices that was quantized, embeddings, output embedding, routers and
the towers of other modalities aside. **Bold** cells are those that Quark's table promises.

| column | |
|---|---|
| FP8 | `--quant_scheme w_fp8_a_fp8 --kv_cache_dtype fp8` |
| INT4 | `--quant_scheme w_int4_per_group_sym --group_size 32` |
| INT8 | `--quant_scheme w_int8_a_int8_per_tensor_sym` |
| MX | `--quant_scheme w_mxfp4_a_mxfp4` |
| AWQ, GPTQ | INT4 with `--quant_algo awq`, `--quant_algo gptq` |
| SmoothQuant | INT8 with `--pre_quantization_optimization smoothquant` |
| Rotation | `--quant_scheme w_uint4_a_uint4_per_channel --pre_quantization_optimization quarot` |

With Rotation stands [which parts](rotation.md) there are (R3 needs quantized keys); they are undone where they made the
quantized model worse.

"""


def run_row(name: str, columns: list[str]) -> tuple[str, dict[str, Any]]:
    """(name, {column: cell or the text of a crash}) of one row."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    import torch

    from models.published import make, row
    from models.table import cell, save_text

    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(prefix="detent-models-"))
    os.environ["HF_MODULES_CACHE"] = str(work / "modules")
    found: dict[str, Any] = {}
    try:
        checkpoint, text = make(row(name), work / "model"), save_text(work / "text.json")
        for column in columns:
            started = time.monotonic()
            try:
                found[column] = cell(row(name), column, checkpoint, text, work / column)
            except Exception:  # a bug, whatever it is
                found[column] = traceback.format_exc()
            said = _said(found[column])
            print(f"{name} | {column} | {time.monotonic() - started:.1f} s | {said}", flush=True)
            shutil.rmtree(work / column, ignore_errors=True)
    except Exception:
        found = dict.fromkeys(columns, traceback.format_exc())
        print(f"{name} | {found[columns[0]]}", flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return name, found


def _said(cell: Any) -> str:
    if isinstance(cell, str):
        return f"FAILED\n{cell}"
    return f"refused: {cell.text}" if cell.share is None else f"ok {cell.share:.1%} {' / '.join(cell.notices)}"


def page(results: dict[str, dict[str, Any]]) -> str:
    """The page with the table."""
    from models.published import GUIDE, ROWS
    from models.table import COLUMNS

    notes: dict[str, int] = {}
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in ROWS:
        if row is ROWS[len(GUIDE)]:
            lines.append(f"| *besides* |{' |' * len(COLUMNS)}")
        cells = [_shown(results[row.name][column], column in row.promised, notes) for column in COLUMNS]
        lines.append(f"| {row.name.replace('*', chr(92) + '*')} | {' | '.join(cells)} |")
    footnotes = [f"{number}. {text}" for text, number in notes.items()]
    return HEAD + "\n".join(lines) + "\n\n" + "\n".join(footnotes) + "\n"


def _shown(cell: Any, promised: bool, notes: dict[str, int]) -> str:
    texts = [cell.text] if cell.share is None else list(cell.notices)
    rotated = [text for text in texts if text.startswith("rotation: ")] if cell.share is not None else []
    remarks = [_general(text) for text in texts if text not in rotated and not re.search(_OF_ALGORITHMS, text)]
    numbers = sorted({notes.setdefault(text, len(notes) + 1) for text in remarks})
    mark = "–" if cell.share is None else f"{cell.share:.0%}"
    mark = f"**{mark}**" if promised else mark
    return mark + _parts(rotated) + (f" <sup>{','.join(map(str, numbers))}</sup>" if numbers else "")


#: What algorithms say about single layers is no matter of the architecture.
_OF_ALGORITHMS = "^(awq|gptq|smoothquant)|tokens? reached"
#: What differs from model to model in a remark, and what stands for it.
_SPECIAL = {
    r"\b\w+\.[\w.]*\d[\w.]*": "...",
    r"\b(a )?[A-Z]\w*(For(CausalLM|ConditionalGeneration)|LMHeadModel)\b": "the model",
    r"a [A-Z]\w*Attention\w*": "such a module",
    r"\b[A-Z]\w*Config\b": "its configuration",
    r"\b\d+ (?=matrices|tensors|are copied)": "some ",
}


def _parts(rotated: list[str]) -> str:
    """Which rotations there are."""
    if not rotated:
        return ""
    missing = {
        part for part in ("R1", "R2", "R3", "R4") for text in rotated if text.startswith(f"rotation: {part}: not")
    }
    done = [part for part in ("R1", "R2", "R3", "R4") if part not in missing]
    return f" {' '.join(done)}" if done else " undone"


def _general(text: str) -> str:
    """A remark on one line, without what differs from model to model."""
    for pattern, instead in _SPECIAL.items():
        text = re.sub(pattern, instead, text)
    return " ".join(text.partition(", for instance")[0].replace("|", "\\|").split())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=[])
    parser.add_argument("--columns", nargs="*", default=[])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "models.md")
    arguments = parser.parse_args()
    from models.published import ROWS
    from models.table import COLUMNS

    columns = [c for c in COLUMNS if not arguments.columns or c in arguments.columns]
    names = [r.name for r in ROWS if not arguments.rows or any(text in r.name for text in arguments.rows)]
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        results = dict(pool.map(run_row, names, [columns] * len(names)))
    crashed = [f"{name}, {c}" for name, cells in results.items() for c, cell in cells.items() if isinstance(cell, str)]
    if crashed:
        print(f"{len(crashed)} cells failed with something else than a refusal: {'; '.join(crashed)}", file=sys.stderr)
        return 1
    if not (arguments.rows or arguments.columns):
        arguments.output.write_text(page(results), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
