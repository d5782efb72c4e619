"""The work itself: converting, calibrating, planning, and the way from one checkpoint to another."""

from detent.engine.calibration import calibrate
from detent.engine.conversion import (
    disable_quantizer,
    enable_quantizer,
    is_quantized,
    replace_quant_module,
    set_quantizer_attribute,
    set_quantizer_by_cfg,
    set_quantizer_by_cfg_context,
)
from detent.engine.modes import BaseCalibrateModeDescriptor, CalibrateModeRegistry
from detent.engine.plan import Plan, make_plan
from detent.engine.quantization import quantize
from detent.engine.state import detent_state, restore, restore_from_detent_state, save
from detent.engine.weights import compress, fold_weight, print_quant_summary

__all__ = [
    "BaseCalibrateModeDescriptor",
    "CalibrateModeRegistry",
    "Plan",
    "calibrate",
    "compress",
    "detent_state",
    "disable_quantizer",
    "enable_quantizer",
    "fold_weight",
    "is_quantized",
    "make_plan",
    "print_quant_summary",
    "quantize",
    "replace_quant_module",
    "restore",
    "restore_from_detent_state",
    "save",
    "set_quantizer_attribute",
    "set_quantizer_by_cfg",
    "set_quantizer_by_cfg_context",
]
