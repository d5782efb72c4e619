"""What ships inside the package: the sample model and the built-in texts."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal

from detent.errors import DetentError

Purpose = Literal["calibration", "evaluation"]


def sample_model_dir() -> Path:
    """The folder of the built-in sample model, in Hugging Face layout.

    Raises:
        DetentError: it is not part of this installation.
    """
    folder = _data_dir() / "sample_model"
    if not (folder / "config.json").is_file():
        raise DetentError(f"the built-in sample model is missing from this installation ({folder}); reinstall Detent")
    return folder


def builtin_text(kind: Purpose) -> str:
    """The built-in text for calibration or for evaluation.

    Raises:
        DetentError: it is not part of this installation.
    """
    path = _data_dir() / "texts" / f"{kind}.txt"
    if not path.is_file():
        raise DetentError(f"the built-in {kind} text is missing from this installation ({path}); reinstall Detent")
    return path.read_text(encoding="utf-8")


def _data_dir() -> Path:
    return Path(str(files("detent.data")))
