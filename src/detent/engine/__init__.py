"""Calibration: ranges and better weights for a model with quantizers, from a user's data."""

from detent.engine.calibration import calibrate
from detent.engine.quantization import quantize

__all__ = ["calibrate", "quantize"]
