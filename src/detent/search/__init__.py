"""The search for the best format of each layer under a budget."""

from detent.search.outcome import (
    auto_quantize_curve,
    auto_quantize_table,
    get_auto_quantize_config,
    plot_auto_quantize_curve,
)
from detent.search.quantize import auto_quantize

__all__ = [
    "auto_quantize",
    "auto_quantize_curve",
    "auto_quantize_table",
    "get_auto_quantize_config",
    "plot_auto_quantize_curve",
]
