"""Calibration and evaluation data: text from files, the hub or the package, and token batches made of it.

What is named here needs no torch, so that a mistake about texts is reported before torch is imported; token batches are
in `detent.data.batches`.
"""

from __future__ import annotations

from detent.data.builtin import builtin_text, sample_model_dir
from detent.data.text import TextSource, check_source, load_texts

__all__ = ["TextSource", "builtin_text", "check_source", "load_texts", "sample_model_dir"]
