"""Calibration and evaluation data: text from files, the hub or the package, and token batches made of it."""

from __future__ import annotations

from detent.data.batches import (
    CalibrationBatches,
    check_vocabulary,
    token_batches,
)
from detent.data.builtin import builtin_text, sample_model_dir
from detent.data.text import TextSource, check_source, load_texts

__all__ = [
    "CalibrationBatches",
    "TextSource",
    "builtin_text",
    "check_source",
    "check_vocabulary",
    "load_texts",
    "sample_model_dir",
    "token_batches",
]
