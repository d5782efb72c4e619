"""Scales of quantized keys and values."""

from __future__ import annotations

import torch
from torch import nn

from detent.checkpoints.records import exported_format
from detent.errors import DetentError
from detent.formats import FloatScale, Scales
from detent.nn import TensorQuantizer
from detent.nn.attention import attention_modules


def stored_scales(quantizer: TensorQuantizer) -> Scales:
    """The calibrated scales of an activation, on the CPU."""
    scales = quantizer.scales()
    if scales is None:
        outer = quantizer.outer_scale()
        if outer is None:
            raise DetentError(f"{quantizer.name}: not calibrated, so there is no scale to write")
        scales = Scales(torch.empty(0, dtype=quantizer.format.scale.stored_dtype), None, outer)
    move = [None if t is None else t.detach().cpu() for t in (scales.scale, scales.zero_point, scales.outer_scale)]
    return Scales(*move)  # type: ignore[arg-type]


def kv_scales(model: nn.Module) -> dict[str, tuple[Scales, Scales]]:
    """Calibrated (key, value) scales by attention module; none for dynamic formats."""
    found = {}
    for name, module in attention_modules(model):
        key, value = getattr(module, "k_bmm_quantizer", None), getattr(module, "v_bmm_quantizer", None)
        if not (isinstance(key, TensorQuantizer) and isinstance(value, TensorQuantizer) and key.is_enabled):
            continue
        if not exported_format(key.format).dynamic:
            found[name] = (stored_scales(key), stored_scales(value))
    return found


def floor_kv_scales(model: nn.Module, minimum: float) -> None:
    """Raise calibrated key and value ranges until no scale lies below `minimum`, keys and values of a block alike."""
    for _, module in attention_modules(model):
        for name in ("k_bmm_quantizer", "v_bmm_quantizer"):
            quantizer = getattr(module, name, None)
            if isinstance(quantizer, TensorQuantizer) and quantizer.is_enabled and quantizer.amax is not None:
                rule = quantizer.format.scale
                assert isinstance(rule, FloatScale)
                least = minimum * rule.divisor(quantizer.format.element)
                quantizer.amax = quantizer.amax.clamp_min(least)
