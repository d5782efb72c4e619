"""The report of a run: as JSON next to the result, and as a summary in the terminal."""

from __future__ import annotations

from detent.report.resources import peak_device_memory_bytes, peak_memory_bytes
from detent.report.run_report import (
    REPORT_NAME,
    BeforeAfterBytes,
    Calibration,
    Evaluation,
    LayerReport,
    Perplexity,
    RunReport,
    Weights,
)
from detent.report.terminal import format_bytes, format_seconds, summary_table

__all__ = [
    "REPORT_NAME",
    "BeforeAfterBytes",
    "Calibration",
    "Evaluation",
    "LayerReport",
    "Perplexity",
    "RunReport",
    "Weights",
    "format_bytes",
    "format_seconds",
    "peak_device_memory_bytes",
    "peak_memory_bytes",
    "summary_table",
]
