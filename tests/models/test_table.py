"""A part of the table of models (docs/models.md), and what comes with checkpoints of unusual models."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from models.published import ROWS, make, row
from models.table import COLUMNS, cell, save_text

#: One cell for every kind of quirk; `make models` runs all of them.
CELLS = {
    "THUDM/chatglm3-6b": "INT4",
    "Qwen/Qwen-*": "GPTQ",
    "meta-llama/Llama-3.2-*B(-Instruct)": "Rotation",
    "deepseek-ai/deepseek-moe-16b-chat": "INT4",
    "microsoft/phi-2": "AWQ",
    "facebook/opt-*": "FP8",
    "CohereForAI/c4ai-command-r-plus": "SmoothQuant",
    "google/gemma-3-4b/12b/27b": "MX",
    "Qwen/Qwen2.5-VL-*": "FP8",
    "Qwen/Qwen2-Audio-7B": "INT8",
    "ibm-ai-platform/Bamba-9B": "FP8",
    "hpcai-tech/grok-1": "GPTQ",
    "deepseek-ai/DeepSeek-V3/R1": "INT4",
}


def names_in(folder: Path) -> set[str]:
    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= set(file.keys())
    return found


@pytest.mark.parametrize("name", CELLS)
def test_cell(name: str, tmp_path: Path) -> None:
    """Published names in, quantized and reloaded: see `models.table.cell`."""
    folder = make(row(name), tmp_path / "m")
    for end in row(name).tensors:
        assert any(tensor.endswith(end) for tensor in names_in(folder)), end
    done = cell(row(name), CELLS[name], folder, save_text(tmp_path / "text.json"), tmp_path / "out")
    assert done.share is not None, done.text
    assert done.share > 0.98


def test_the_table_is_complete() -> None:
    assert len({r.name for r in ROWS}) == len(ROWS)
    assert all(set(r.promised) <= COLUMNS.keys() for r in ROWS)
