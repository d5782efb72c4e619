"""What Detent can write in the compressed-tensors layout: every scheme, type of key/value cache and preset.

A case is the formats of one block of the built-in sample model, whose matrices divide into every group and block.
`write_case` makes a checkpoint of it: random weights, rounded, and activation scales as calibration could leave them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import detent
from detent.checkpoints import (
    Activation,
    LayerCheckpoint,
    LayerFormats,
    ModelFormats,
    QuantizedWriter,
    Source,
    wanted_layouts,
)
from detent.checkpoints.compressed_tensors.schemes import is_per_head
from detent.checkpoints.records import exported_format
from detent.config import all_schemes, kv_cache_format, kv_cache_types, parse_scheme
from detent.data.builtin import sample_model_dir
from detent.formats import Format, Scales, encode, scales_from_range
from detent.nn import SequentialQuantizer, TensorQuantizer
from detent.nn.hadamard import rotation_block

KV = "--kv_cache_dtype "
#: Asked for by name: it then holds what vLLM alone loads.
(LAYOUT,) = wanted_layouts("compressed-tensors")
#: Names of the grammar that `detent schemes` doesn't list.
_MORE_SCHEMES = (
    "w_int3_per_group_asym_a_int8_per_token_dynamic",
    "w_int4_per_group_sym_a_int4_per_token_dynamic",
    "w_int2_per_group_asym_a_int4_per_group_dynamic",
    "w_int8_per_channel_sym_a_int4_per_token_dynamic",
    "w_mxfp4_a_fp8_per_token_dynamic",
    "w_int8_per_channel_a_int8_per_tensor_o_int8_per_tensor",
    "w_int4_per_channel_a_int8_per_tensor_o_int8_per_tensor",
    "w_int2_per_channel_a_int8_per_tensor_o_int8_per_tensor",
    "w_int3_per_channel_a_int8_per_tensor_o_int8_per_tensor",
)
_LOOKED_UP = ("w_int8_per_channel_sym", "w_int4_per_group_sym", "w_int2_per_group_sym")


@dataclass(frozen=True)
class Case:
    """One thing that a user can ask for.

    Attributes:
        name: of the scheme, of the preset, or `KV` and the type of key/value cache.
        formats: of the model; None where the layout can't hold it.
        reason: why it can't.
    """

    name: str
    formats: ModelFormats | None = None
    reason: str | None = None


class _NotHeld(Exception):
    pass


def all_cases() -> list[Case]:
    """Every scheme of ``detent schemes``, every type of key/value cache and every preset of the Python API."""
    cases = [_case(name, _of_scheme(name)) for name in all_schemes() if name != "no_quant"]
    # The output embedding is a linear layer, too, which only exclusions leave out.
    cases.append(_case("w_int4_per_group_sym, lm_head too", _of_scheme("w_int4_per_group_sym", head=True)))
    cases += [_case(name, _of_scheme(name)) for name in _MORE_SCHEMES]
    cases += [_case(f"{name}, embeddings too", _with_embedding(name)) for name in _LOOKED_UP]
    cases.append(_case("w_int8_a_int8_per_token_dynamic, down_proj rotated", _with_rotation()))
    for name in kv_cache_types():
        cases.append(_case(KV + name, ModelFormats({}, exported_format(kv_cache_format(name)), tuple(_linear()))))
    for name in sorted(detent.choices):
        try:
            cases.append(_case(name, _of_preset(name)))
        except _NotHeld as reason:
            cases.append(Case(name, reason=str(reason)))
    return cases


@cache
def held_cases() -> list[Case]:
    """Those that compressed-tensors holds."""
    return [case for case in all_cases() if case.formats is not None]


def _case(name: str, formats: ModelFormats) -> Case:
    reason = LAYOUT.can_hold(formats)
    return Case(name, formats) if reason is None else Case(name, reason=reason)


def _of_scheme(name: str, head: bool = False) -> ModelFormats:
    scheme = parse_scheme(name)
    input, output = (None if fmt is None else exported_format(fmt) for fmt in (scheme.input, scheme.output))
    linear = _linear()
    layers = {
        path: LayerFormats(shape, scheme.weight, input, output)
        for path, shape in linear.items()
        if head or path != "lm_head"
    }
    return ModelFormats(layers, ignored=tuple(path for path in linear if path not in layers))


def _with_embedding(name: str) -> ModelFormats:
    formats = _of_scheme(name)
    shape = tuple(_model().get_parameter("model.embed_tokens.weight").shape)
    embedding = LayerFormats(shape, parse_scheme(name).weight, kind="Embedding")
    return replace(formats, layers={**formats.layers, "model.embed_tokens": embedding})


def _with_rotation() -> ModelFormats:
    """Inputs turned by a matrix of their full width, which isn't a power of two, as R4 does."""
    formats = _of_scheme("w_int8_a_int8_per_token_dynamic")
    name, layer = next((n, f) for n, f in formats.layers.items() if n.endswith("down_proj"))
    return replace(formats, layers={**formats.layers, name: replace(layer, rotated=rotation_block(layer.shape[1]))})


def _of_preset(name: str) -> ModelFormats:
    """The formats of the block under a preset. Raises _NotHeld."""
    if "SVDQUANT" in name:
        raise _NotHeld("a low-rank branch")
    model = _model()
    detent.set_quantizer_by_cfg(model, getattr(detent, name)["quant_cfg"])  # which starts by switching everything off
    layers, caches = {}, set()
    for path, module in model.named_modules():
        sides = {side: _format(f"{path}.{side}", quantizer) for side, quantizer in _enabled(module)}
        if not sides:
            continue
        if isinstance(module, nn.Linear):
            found = (sides.get(side) for side in ("weight", "input", "output"))
            layers[path] = LayerFormats(tuple(module.weight.shape), *found)
        elif sides.keys() == {"k_bmm", "v_bmm"} and sides["k_bmm"] == sides["v_bmm"]:
            caches.add(sides["k_bmm"])
        else:
            raise _NotHeld(f"{path} with quantizers {', '.join(sides)}")
    if not layers and not caches:
        raise _NotHeld("nothing of a dense Llama is quantized")
    return ModelFormats(layers, next(iter(caches), None), tuple(path for path in _linear() if path not in layers))


@cache
def _linear() -> dict[str, tuple[int, ...]]:
    """The linear layers of the block and the shapes of their weights."""
    return {path: tuple(m.weight.shape) for path, m in _model().named_modules() if isinstance(m, nn.Linear)}


def _enabled(module: nn.Module) -> Iterable[tuple[str, TensorQuantizer | SequentialQuantizer]]:
    for name, child in module.named_children():
        if isinstance(child, (TensorQuantizer, SequentialQuantizer)) and child.is_enabled:
            yield name.removesuffix("_quantizer"), child


def _format(name: str, quantizer: TensorQuantizer | SequentialQuantizer) -> Format:
    if isinstance(quantizer, SequentialQuantizer):
        raise _NotHeld(f"{name}: several formats, one after the other")
    if quantizer.attributes.rotate or quantizer.attributes.bias is not None:
        raise _NotHeld(f"{name}: tensors that are rotated, or moved by a bias, at run time")
    fmt = quantizer.format
    return fmt if name.endswith(".weight") else exported_format(fmt)


def _config() -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(sample_model_dir(), num_hidden_layers=1)


@cache
def _model() -> nn.Module:
    """The block without memory for its weights, ready to be quantized."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_config())
    detent.replace_quant_module(model)
    return model


def write_source(folder: Path) -> None:
    """The checkpoint that cases start from, with random weights."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = _config()
    config.tie_word_embeddings = False
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)


def write_case(case: Case, source_dir: Path, out_dir: Path) -> None:
    """A checkpoint of one case, which must be one that the layout holds."""
    assert case.formats is not None
    source = Source(source_dir)
    layers = case.formats.layers
    with QuantizedWriter(out_dir, source=source, formats=case.formats, layout=LAYOUT, overwrite=True) as writer:
        for name in source:
            module = name.removesuffix(".weight")
            if module in layers:
                writer.add_layer(_record(module, layers[module], source.tensor(name)))
            else:
                writer.add_tensor(name, source.tensor(name))
        if case.formats.kv_cache is not None:
            scales = _calibrated(case.formats.kv_cache)
            if is_per_head(case.formats.kv_cache):
                scales = scales.map(lambda scale: scale.expand(1, _config().num_key_value_heads, 1, 1))
            writer.add_kv("model.layers.0.self_attn", scales, scales)
        writer.finish()


def _record(name: str, formats: LayerFormats, weight: torch.Tensor) -> LayerCheckpoint:
    packed = None if formats.weight is None else encode(weight, formats.weight, name=name)
    activations = _activation(formats.input), _activation(formats.output)
    return LayerCheckpoint(name, formats.shape, packed, *activations, formats.kind, formats.rotated)


def _activation(fmt: Format | None) -> Activation | None:
    return None if fmt is None else Activation(fmt, None if fmt.dynamic else _calibrated(fmt))


def _calibrated(fmt: Format) -> Scales:
    """Scales for values from -4 to 4."""
    if getattr(fmt.scale, "outer", False):
        return Scales(torch.empty(0, dtype=fmt.scale.stored_dtype), outer_scale=torch.tensor(4 / (6 * 448)))
    return scales_from_range(fmt, torch.tensor(-4.0), torch.tensor(4.0))
