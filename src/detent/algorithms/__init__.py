"""Algorithms: pure functions from weights (and what data left behind) to ranges. None of them walks a model."""

from detent.algorithms.max import weight_range
from detent.algorithms.mse import least_error_range, multipliers

__all__ = ["least_error_range", "multipliers", "weight_range"]
