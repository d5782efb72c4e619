"""Running `detent` inside the test's process, on checkpoints of a few thousand parameters made on the spot."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from detent.cli.app import run
from tiny_language_model import VOCABULARY, make_tokenizer, words


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def detent(*arguments: object) -> Outcome:
    """One command, with what it printed. An exception that the command line doesn't handle comes out here."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(a) for a in arguments])
    return Outcome(code, out.getvalue(), err.getvalue())


def succeed(*arguments: object) -> Outcome:
    outcome = detent(*arguments)
    assert outcome.code == 0, outcome.err
    return outcome


def small(model_type: str = "llama", **values: Any) -> Any:
    """A configuration of two small layers."""
    from transformers import AutoConfig

    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    return AutoConfig.for_model(model_type, **{**common, **values})


def save_checkpoint(folder: Path, config: Any = None, dtype: torch.dtype = torch.float32, **saving: Any) -> Path:
    """A random model of `config` and its tokenizer."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    torch.manual_seed(0)
    logging.disable_progress_bar()
    AutoModelForCausalLM.from_config(config or small()).to(dtype).save_pretrained(folder, **saving)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_text(path: Path, documents: int = 8, length: int = 40, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    texts = [words(*torch.randint(0, 60, (length,), generator=generator).tolist()) for _ in range(documents)]
    path.write_text(json.dumps(texts), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Workplace:
    """A checkpoint, texts, and a place to write to."""

    model: Path
    calibration: Path
    evaluation: Path
    out: Path

    def quantize(self, *more: object, scheme: str | None = "w_int4_per_group_sym", run: Any = succeed) -> Outcome:
        arguments: list[object] = ["quantize", "--model_dir", self.model, "--output_dir", self.out]
        arguments += ["--dataset", self.calibration, "--eval_dataset", self.evaluation, "--device", "cpu"]
        arguments += ["--seq_len", 32, "--num_calib_data", 4, "--num_eval_data", 1]
        arguments += ["--quant_scheme", scheme] if scheme else []
        outcome: Outcome = run(*arguments, *more)
        return outcome

    def evaluate(self, *more: object, folder: Path | None = None) -> Any:
        """The JSON of `detent evaluate` on what was written."""
        arguments = ["evaluate", folder or self.out, "--eval_dataset", self.evaluation, "--device", "cpu"]
        return succeed(*arguments, "--num_eval_data", 1, "--json", *more).json

    @property
    def report(self) -> Any:
        return json.loads((self.out / "detent_report.json").read_text("utf-8"))


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file below `folder`."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def logits(model: Any, rows: Sequence[Sequence[int]] = ((5, 9, 2, 44, 17, 30, 8),)) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=torch.tensor(rows), use_cache=False).logits
    return result
