"""What the readers of a layout do to a model that its formats don't show."""

from __future__ import annotations

import inspect

from torch import nn

from detent.checkpoints import ModelFormats
from detent.nn import TensorQuantizer
from detent.nn.attention import attention_modules
from detent.pretrained.facts import outside_language

#: compressed-tensors quantizes the cache of modules that have one of these, whose class is called an attention, and
#: whose forward takes the cache.
_CACHED_PROJECTIONS = ("k_proj", "v_proj", "qkv_proj", "kv_b_proj")


def misread(model: nn.Module, formats: ModelFormats) -> dict[str, str]:
    """{name of a layout: why its readers would not get the model that was simulated}.

    Args:
        model: of the class that reads the checkpoint, on any device.
        formats: what is going to be written.
    """
    reasons = []
    outside = outside_language(model)
    taken_apart = _taken_apart(model)
    if taken_apart:
        reasons.append(
            f"compressed-tensors does not hold {taken_apart}: transformers expects each expert as layers of its own"
            " there, and this version leaves experts merged"
        )
    if formats.kv_cache is not None:
        reasons += [
            f"compressed-tensors does not hold the key/value cache of {name}: its reader doesn't take a"
            f" {type(module).__name__} for attention with a cache, and would ignore the scales"
            for name, module in attention_modules(model)
            if not _reads_cache_scales(module) and not outside(name)
        ][:1]
        reasons += [
            f"compressed-tensors does not hold the key/value cache of {name}: its reader asks the configuration for"
            f" num_key_value_heads, which {type(module.config).__name__} doesn't have"
            for name, module in attention_modules(model)
            if _is_on(module, "k_bmm_quantizer") and not hasattr(module.config, "num_key_value_heads")
        ][:1]
        reasons += [
            f"compressed-tensors does not hold a key/value cache of which that of {name} stays: its reader would"
            " quantize it too"
            for name, module in attention_modules(model)
            if _reads_cache_scales(module) and not _is_on(module, "k_bmm_quantizer")
        ][:1]
    return {"compressed-tensors": reasons[0]} if reasons else {}


def _taken_apart(model: nn.Module) -> str:
    """The first module that transformers replaces by one with other parameters where a model is quantized."""
    from transformers.quantizers import base

    replaced = getattr(base, "MODULES_TO_PATCH_FOR_QUANTIZATION", {})
    kinds = {
        name for name, entry in replaced.items() if "compressed-tensors" in map(_value, entry["quantization_methods"])
    }
    return next((name for name, module in model.named_modules() if type(module).__name__ in kinds), "")


def _value(method: object) -> object:
    return getattr(method, "value", method)


def _is_on(module: nn.Module, name: str) -> bool:
    quantizer = getattr(module, name, None)
    return isinstance(quantizer, TensorQuantizer) and quantizer.is_enabled


def _reads_cache_scales(module: nn.Module) -> bool:
    named = "attention" in type(module).__name__.lower()
    takes = {"past_key_value", "past_key_values"} & inspect.signature(type(module).forward).parameters.keys()
    return named and bool(takes) and any(hasattr(module, name) for name in _CACHED_PROJECTIONS)
