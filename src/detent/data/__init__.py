"""Calibration and evaluation data: text from files, the hub or the package, and token batches made of it."""

from __future__ import annotations

from detent.data.batches import (
    CalibrationBatches,
    check_vocabulary,
    current_token_mask,
    drop_padding,
    run_batches,
    token_batches,
    token_mask,
)
from detent.data.builtin import builtin_text, sample_model_dir
from detent.data.model_inputs import input_device, max_sequence_length, vocabulary_size
from detent.data.text import TextSource, check_source, load_texts

__all__ = [
    "CalibrationBatches",
    "TextSource",
    "builtin_text",
    "check_source",
    "check_vocabulary",
    "current_token_mask",
    "drop_padding",
    "input_device",
    "load_texts",
    "max_sequence_length",
    "run_batches",
    "sample_model_dir",
    "token_batches",
    "token_mask",
    "vocabulary_size",
]
