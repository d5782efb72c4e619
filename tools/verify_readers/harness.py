"""What the scripts of this folder share. Imports nothing but the standard library at its top: it runs in each reader's
environment too.

A script is ``NAME.py`` with a function ``rows() -> list[Row]``, which `__main__` calls in Detent's environment. A
reader that is a Python package has an environment of its own, made from ``NAME.txt`` (its requirements); its script has
a second function, ``logits(folder, tokens)``, which imports the package and returns an array-like [tokens, vocabulary].
`compare` runs it there::

    def rows() -> list[Row]:
        with export("w_int4_per_group_sym", "--model_export", "gptq") as folder:
            return [compare(__file__, folder, "gptq", "w_int4_per_group_sym", "GPTQModel 7.7", limit=1e-4)]

    def logits(folder: str, tokens: list[int]) -> Any: ...
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).parent
#: Where the environments of readers are, each in a folder with the name of its script.
ENVIRONMENTS = Path(os.environ.get("VERIFY_READERS_ENVIRONMENTS") or HERE.parents[1] / ".venv-readers")
#: The tokens that logits are compared on.
TOKENS = [n * 7919 % 2048 for n in range(1, 33)]


@dataclass(frozen=True)
class Row:
    """What one reader made of one checkpoint.

    Attributes:
        format: as ``--model_export`` or ``--custom_mode`` has it.
        scheme: as ``--quant_scheme`` has it, and whatever else was asked for.
        reader: its name and version.
        difference: the largest absolute difference between its logits and Detent's; None where it gave none.
        limit: what the difference may be, from the arithmetic that the reader computes in.
        note: what a user should know, or why there is no difference.
    """

    format: str
    scheme: str
    reader: str
    difference: float | None
    limit: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.difference is not None and self.difference <= self.limit  # NaN is not


@contextmanager
def export(scheme: str, *flags: str, model: str | None = None) -> Iterator[Path]:
    """A checkpoint that ``detent quantize`` writes of the sample model, or of `model`, with the command's `flags`."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        arguments = ["--quant_scheme", scheme, "--output_dir", str(out), "--skip_evaluation", *flags]
        arguments += ["--model_dir", model] if model else []
        run([sys.executable, "-m", "detent", "quantize", *arguments])
        yield out


def compare(script: str, folder: Path, format: str, scheme: str, reader: str, *, limit: float, note: str = "") -> Row:
    """The row of a checkpoint: logits in Detent, and in the reader's environment as `script` computes them.

    Args:
        script: ``__file__`` of the caller.
        folder: the checkpoint.
        format, scheme, reader, limit, note: of the row.
    """
    name = Path(script).stem
    python = ENVIRONMENTS / name / "bin" / "python"
    if not python.exists():
        return Row(format, scheme, reader, None, limit, f"not run: {python} is not there; make verify-readers makes it")
    try:
        # -P: a script with the name of a package (mlx.py) must not be imported in its place.
        told = run([str(python), "-P", __file__, name, str(folder)])
    except RuntimeError as error:
        return Row(format, scheme, reader, None, limit, str(error))
    theirs = json.loads(told.splitlines()[-1])
    ours = detent_logits(folder)
    if (len(theirs), len(theirs[0])) != (len(ours), len(ours[0])):
        return Row(format, scheme, reader, None, limit, f"logits of shape {len(theirs)}, {len(theirs[0])}")
    difference = max(abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))
    largest = max(abs(value) for line in ours for value in line)
    return Row(format, scheme, reader, difference, limit, note or f"of logits up to {largest:.1f}")


def detent_logits(folder: Path, tokens: list[int] | None = None) -> list[list[float]]:
    """The logits of a checkpoint in Detent, computed in float32."""
    import torch

    from detent.runs.load import load_quantized

    with torch.no_grad():
        model: Any = load_quantized(folder, dtype=torch.float32)
        return model(input_ids=torch.tensor([tokens or TOKENS]), use_cache=False).logits[0].tolist()


def run(command: list[str]) -> str:
    """The output of a command. Raises RuntimeError with the end of what it said where it fails."""
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[-6:])} failed:\n{process.stderr[-2000:]}")
    return process.stdout


def scripts() -> list[str]:
    """The names of the scripts in this folder."""
    return sorted(path.stem for path in HERE.glob("*.py") if "\ndef rows()" in path.read_text(encoding="utf-8"))


def load(name: str) -> ModuleType:
    """A script as a module, under a name that hides no package."""
    sys.modules.setdefault("harness", sys.modules[__name__])
    spec = spec_from_file_location(f"verify_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":  # in a reader's environment: harness.py NAME FOLDER
    found = load(sys.argv[1]).logits(sys.argv[2], TOKENS)
    print(json.dumps(found if isinstance(found, list) else found.tolist()))
