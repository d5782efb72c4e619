"""Models whose Python code comes with the checkpoint: trusted or not, whole or broken."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from detent.errors import DetentError
from detent.pretrained.loading import load_config, load_tokenizer, model_on_meta
from models.published import GUIDE, make, row

REMOTE = [r.name for r in GUIDE if r.remote]
_numbers = count()


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    """transformers keeps classes by the content of their files, so those of each test are different."""
    folder = make(row("Qwen/Qwen-*"), tmp_path / "m")
    with (folder / "configuration_qwen.py").open("a", encoding="utf-8") as file:
        file.write(f"# {next(_numbers)}\n")
    return folder


def change(path: Path, before: str, after: str) -> None:
    text = path.read_text("utf-8")
    assert before in text
    path.write_text(text.replace(before, after), "utf-8")


def build(folder: Path) -> Any:
    return model_on_meta(load_config(folder, trust_remote_code=True), trust_remote_code=True)


@pytest.mark.parametrize("name", REMOTE)
def test_not_trusted(name: str, tmp_path: Path) -> None:
    folder = make(row(name), tmp_path / "m")
    with pytest.raises(DetentError, match=r"comes with Python code of its own; pass trust_remote_code if you trust it"):
        load_config(folder)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("import torch\n", "import package_that_is_missing\nimport torch\n", "ImportError: .*package_that_is_missing"),
        (
            "import torch\n",
            "import torch\nfrom transformers.utils import gone\n",
            "ImportError: cannot import name 'gone'",
        ),
        ("import torch\n", "import torch\nraise RuntimeError('it needs CUDA')\n", "it needs CUDA"),
        ("import torch\n", "import torch\nraise SystemExit(3)\n", "SystemExit: 3"),
        ("class QWenBlock(nn.Module):", "class QWenBlock(nn.Module:", "SyntaxError: "),
        ("class QWenLMHeadModel", "class Other", "has no attribute 'QWenLMHeadModel'"),
        ("nn.Dropout(0.0)", "nn.Dropout(config.share)", "no attribute 'share'"),
        ("nn.Dropout(0.0)", "nn.Dropout(share)", "NameError: name 'share' is not defined"),
    ],
)
def test_code_that_fails(before: str, after: str, told: str, qwen: Path) -> None:
    change(qwen / "modeling_qwen.py", before, after)
    with pytest.raises(DetentError, match=rf"auto_map names: .*modeling_qwen\.QWenLMHeadModel\): .*{told}"):
        build(qwen)


def test_files_that_are_missing(qwen: Path) -> None:
    (qwen / "modeling_qwen.py").unlink()
    with pytest.raises(DetentError, match="a file named modeling_qwen.py"):
        build(qwen)
    (qwen / "configuration_qwen.py").unlink()
    with pytest.raises(DetentError, match="a file named configuration_qwen.py"):
        load_config(qwen, trust_remote_code=True)
    (qwen / "tokenization_qwen.py").unlink()
    with pytest.raises(DetentError, match="no usable tokenizer.*a file named tokenization_qwen.py"):
        load_tokenizer(qwen, trust_remote_code=True)


def test_an_architecture_that_nothing_knows(qwen: Path) -> None:
    path = qwen / "config.json"
    values = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**values, "auto_map": {"AutoConfig": values["auto_map"]["AutoConfig"]}}), "utf-8")
    with pytest.raises(DetentError, match="no language model of type 'qwen', and config.json names no code of its own"):
        build(qwen)
    del values["auto_map"]
    path.write_text(json.dumps(values), "utf-8")
    with pytest.raises(
        DetentError, match="model type `qwen` .*Update transformers, or get the checkpoint with the code"
    ):
        load_config(qwen, trust_remote_code=True)
