"""What the readers of a layout do to a model that its formats don't show."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from detent.checkpoints import LayerFormats, ModelFormats
from detent.checkpoints.compressed_tensors import schemes
from detent.formats import Integer
from detent.nn import TensorQuantizer
from detent.nn.attention import attention_modules, interface_modules
from detent.nn.experts import ExpertsLayout, QuantExperts
from detent.nn.own_linear import QuantOwnLinear
from detent.pretrained.facts import outside_language
from detent.pretrained.names import CheckpointNames

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
    merged = [name for name in _taken_apart(model) if not any(n.startswith(f"{name}.") for n in formats.layers)]
    if merged:
        reasons.append(
            f"compressed-tensors does not hold {merged[0]} in floating point: transformers expects each expert as"
            " separate layers there, and the checkpoint holds all in one tensor"
        )
    reasons += [
        f"compressed-tensors does not hold {name} packed: {type(module).__name__.removeprefix('Quant')} has a"
        " forward of its own, which finds no weight there; use a format of 8 bits"
        for name, layer in formats.layers.items()
        if _is_packed(layer)
        and layer.kind == "Linear"
        and isinstance(module := model.get_submodule(name), QuantOwnLinear)
    ][:1]
    reasons += [
        f"compressed-tensors does not hold {name}: its reader would not reach a layer inside of nn.MultiheadAttention"
        for name in formats.layers
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)
    ][:1]
    initialised = _initialised(model, formats)
    if initialised:
        reasons.append(
            f"compressed-tensors does not hold {initialised} packed: transformers fills in its weight before it loads"
            " it, and finds none; exclude such layers, or use a format of 8 bits"
        )
    if formats.kv_cache is not None:
        reasons += [
            f"compressed-tensors does not hold the key/value cache of {name}: its reader doesn't take a"
            f" {type(module).__name__.removeprefix('Quant')} for attention with a cache, and would ignore the scales"
            for name, module in attention_modules(model)
            if not _reads_cache_scales(module) and not outside(name)
        ][:1]
        reasons += [
            f"compressed-tensors does not hold the key/value cache of {name}: its reader asks the configuration for"
            f" num_key_value_heads, which {type(module.config).__name__} doesn't have"
            for name, module in interface_modules(model)
            if _is_on(module, "k_bmm_quantizer") and not hasattr(module.config, "num_key_value_heads")
        ][:1]
        reasons += [
            f"compressed-tensors does not hold a key/value cache that leaves out {name}: its reader would"
            " quantize it too"
            for name, module in attention_modules(model)
            if _reads_cache_scales(module) and not _is_on(module, "k_bmm_quantizer")
        ][:1]
    found = {"compressed-tensors": reasons[0]} if reasons else {}
    unlike = [n for n, m in model.named_modules() if isinstance(m, QuantExperts) and not _as_gpt_oss(m.layout)]
    if unlike:
        found["mxfp4"] = (
            f"mxfp4 does not hold {unlike[0]}: it has experts as gpt-oss holds them, and its readers don't"
            f" look for any in a {type(model).__name__}"
        )
    return found


def _as_gpt_oss(layout: ExpertsLayout) -> bool:
    """Whether experts are held transposed, with the rows of gate and up in turn in one tensor, and with biases."""
    parts = {p.name: (p.parameter, p.part.turned, p.part.interleaved, p.bias is not None) for p in layout.projections}
    together = ("gate_up_proj", True, True, True)
    return parts == {"gate_proj": together, "up_proj": together, "down_proj": ("down_proj", True, False, True)}


def experts_apart(model: nn.Module, names: CheckpointNames, formats: ModelFormats) -> list[str]:
    """What a user should know of experts that transformers holds in one tensor and that are written one by one, where
    transformers doesn't make the simulated model of them. Other engines look for them one by one."""
    name = next((n for n in formats.layers if n in names.experts), None)
    group = None if name is None else names.of_parameter(f"{name}.weight")
    if name is None or group is None or _taken_apart(model):
        return []
    layer = formats.layers[name]
    if group.pieces or not group.merged:
        what = "looks for all experts in one tensor, and would leave those of the checkpoint out"
    elif not _is_merged(layer):
        what = f"can't put experts in {layer.weight} together"
    elif layer.input is not None or layer.output is not None:
        what = "quantizes the weights of experts alone, and not what they are given"
    else:
        return []
    return [
        f"transformers {what}: load the result with Detent, or with an engine that takes the experts of a"
        f" {type(model).__name__} one by one, such as vLLM"
    ]


def _is_merged(layer: LayerFormats) -> bool:
    """Whether transformers decodes experts of this format while it merges them."""
    weight = layer.weight
    if weight is None or not weight.symmetric:
        return False
    layout = schemes.layout_of(weight, layer.input, layer.output)
    return layout in (schemes.PACK, schemes.MXFP4) or (
        layout == schemes.FLOAT and weight.granularity.kind in ("per_tensor", "per_channel")
    )


def _taken_apart(model: nn.Module) -> list[str]:
    """The modules that transformers replaces by ones with other parameters where a model is quantized."""
    from transformers.quantizers import base

    replaced = getattr(base, "MODULES_TO_PATCH_FOR_QUANTIZATION", {})
    kinds = {
        name for name, entry in replaced.items() if "compressed-tensors" in map(_value, entry["quantization_methods"])
    }
    return [name for name, module in model.named_modules() if kinds & {kind.__name__ for kind in type(module).__mro__}]


class _WeightWasRead(Exception):
    pass


class _Packed(nn.Module):
    """In the place of a layer whose weight is packed: asking for the weight is an error."""

    def __init__(self, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.bias = bias

    @property
    def weight(self) -> None:
        raise _WeightWasRead


@torch.no_grad()
def _initialised(model: nn.Module, formats: ModelFormats) -> str:
    """The first packed layer whose weight the module around it wants to initialise, as transformers has it done before
    it loads anything."""
    if next(model.parameters()).device.type != "meta":
        return ""
    packed = [name for name, layer in formats.layers.items() if _is_packed(layer) and layer.kind == "Linear"]
    seen = set()
    for name in packed:
        parent = model.get_submodule(name.rpartition(".")[0])
        child = name.rpartition(".")[2]
        if (type(parent), child) in seen or isinstance(parent, nn.ModuleList | nn.Sequential):
            continue
        seen.add((type(parent), child))
        initialise = _initialiser(model, name)
        if initialise is None:
            continue
        layer: Any = parent._modules[child]
        parent._modules[child] = _Packed(layer.bias)
        try:
            initialise(parent)
        except _WeightWasRead:
            return name
        finally:
            parent._modules[child] = layer
    return ""


def _initialiser(model: nn.Module, name: str) -> Any:
    """What initialises a module: a method of the innermost model of transformers around it; None if there is none."""
    found, module = getattr(model, "_init_weights", None), model
    for part in name.split("."):
        module = module.get_submodule(part)
        found = getattr(module, "_init_weights", found)
    return found


def _is_packed(layer: LayerFormats) -> bool:
    weight = layer.weight
    return weight is not None and (weight.bits < 8 or (isinstance(weight.element, Integer) and layer.input is None))


def _value(method: object) -> object:
    return getattr(method, "value", method)


def _is_on(module: nn.Module, name: str) -> bool:
    quantizer = getattr(module, name, None)
    return isinstance(quantizer, TensorQuantizer) and quantizer.is_enabled


def _reads_cache_scales(module: nn.Module) -> bool:
    named = "attention" in type(module).__name__.lower()
    takes = {"past_key_value", "past_key_values"} & inspect.signature(type(module).forward).parameters.keys()
    return named and bool(takes) and any(hasattr(module, name) for name in _CACHED_PROJECTIONS)
