"""The native layout of AMD Quark, as its own reader, vLLM and SGLang take it.

The facts are those of amd-quark 0.13, whose exports of each format were looked at. Integers of 4 bits are packed eight
to an int32 word, in the order that AWQ's kernels unpack fastest (``reorder``) or as they come (``order``); integers in
groups are stored transposed, with their scales. A zero point is stored for symmetric integers too.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from detent.checkpoints.beside import BesideLayout, BesideReader, StoredPart, as_glob, scale_dtype
from detent.checkpoints.records import LayerFormats, ModelFormats
from detent.checkpoints.source import Source
from detent.checkpoints.told import told_weights
from detent.errors import DetentError
from detent.external.files import check_as
from detent.external.schemas import QuarkConfig, QuarkSpec
from detent.formats import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    Format,
    Granularity,
    Integer,
    PowerOfTwoScale,
    Scales,
    SearchedScale,
    fp8,
    integer,
    mx,
    nvfp4,
    per_channel,
    per_group,
    per_tensor,
    per_token,
    progressive,
    small_float,
)
from detent.formats.elements import Element
from detent.formats.packing import pack_int32, unpack_int32
from detent.formats.scales import ScaleDtype

#: The version of Quark whose layout this is.
VERSION = "0.13"
#: The column of each nibble of a word.
_ORDERS = {"reorder": [0, 2, 4, 6, 1, 3, 5, 7], "order": list(range(8))}
_ELEMENTS: dict[Element, str] = {E4M3: "fp8_e4m3", E5M2: "fp8_e5m2", E2M1: "fp4", E2M3: "fp6_e2m3", E3M2: "fp6_e3m2"}
_BY_NAME = {name: element for element, name in _ELEMENTS.items()}
_KIND = {"fp8_e4m3": "e4m3", "fp8_e5m2": "e5m2", "fp4": "e2m1", "fp6_e2m3": "e2m3", "fp6_e3m2": "e3m2"}
_PLAIN = ("float32", "bfloat16", "float16")
_SCALE_DTYPES: dict[torch.dtype, ScaleDtype] = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
Spec = dict[str, Any]


@dataclass(frozen=True)
class QuarkLayout(BesideLayout):
    """Writes Quark's layout; `pack_method`: ``reorder`` or ``order``."""

    pack_method: str = "reorder"

    name = "quark"
    engines = ("Quark", "vLLM", "SGLang")

    def with_details(self, **details: Any) -> QuarkLayout:
        """With the order of 4-bit codes that "pack_method" names."""
        method = details.get("pack_method", self.pack_method)
        if method not in _ORDERS:
            raise DetentError(f"unknown pack_method {method!r}; known: {', '.join(_ORDERS)}")
        return QuarkLayout(method)

    def needs(self, formats: ModelFormats) -> dict[str, str]:
        """vLLM and SGLang compute with FP8, int8, MX and NVFP4 on both sides, and with int4 in groups alone."""
        weights = (x.weight for x in formats.layers.values() if x.input is None and x.weight is not None)
        read = all(fmt.bits == 4 and fmt.granularity.kind == "per_group" for fmt in weights)
        more = dict.fromkeys(self.engines[1:], "") if read else {}
        return {"Quark": "", "transformers": "amd-quark", **more}

    def why_not(self, layer: LayerFormats) -> str | None:
        """None, or why Quark has no words for a layer."""
        assert layer.weight is not None
        if reason := _why_no_weight(layer.weight, layer.shape):
            return reason
        for fmt in (layer.input, layer.output):
            if fmt is not None and (reason := _why_no_activation(fmt)):
                return reason
        return None

    def weight_parts(self, fmt: Format, shape: tuple[int, ...]) -> dict[str, StoredPart]:
        """Where a weight lies; integers in groups are transposed."""
        if not isinstance(fmt.element, Integer):
            return super().weight_parts(fmt, shape)
        grid = fmt.granularity.grid(shape)
        grouped = fmt.granularity.kind == "per_group"
        own, kept = "weight_scale", "zero_point" if fmt.zero_point == "int" else "constant"
        scale = StoredPart("scale", grid[::-1], fmt.scale.stored_dtype, _turn, _turn)
        if not grouped:
            scale = StoredPart("scale", grid[:1], fmt.scale.stored_dtype)
        parts = {"weight": self._codes("codes", fmt, shape, grouped)}
        if fmt.base is not None:
            parts["weight_scale"] = StoredPart("outer_scale", (), torch.float32)
            own = "weight_scale_2"
        parts[own] = scale
        point = self._codes(kept, fmt, grid if grouped else (1, *grid[:1]) if grid else (), grouped)
        parts[own.replace("scale", "zero_point")] = point
        return parts

    def activation_parts(self, side: str, fmt: Format) -> dict[str, StoredPart]:
        """Where the scales of "input" or "output" lie."""
        parts = super().activation_parts(side, fmt)
        if fmt.has_outer_scale:
            return {f"{side}_scale_2": parts[f"{side}_scale"]}
        if isinstance(fmt.element, Integer) and fmt.zero_point != "int":
            parts[f"{side}_zero_point"] = StoredPart("constant", (), fmt.element.storage_dtype, _narrow(fmt))
        return parts

    def kv_tensors(self, module: str, key: Scales, value: Scales, *more: Scales) -> dict[str, Tensor]:
        """The scales of keys and values, as those of the outputs of their projections."""
        return {f"{module}.{side}_proj.output_scale": s.scale.reshape(()) for side, s in (("k", key), ("v", value))}

    def quantization_config(self, formats: ModelFormats) -> dict[str, Any]:
        """What config.json says: the most frequent formats for all layers, others by name."""
        each = {name: json.dumps(_layer_config(layer)) for name, layer in formats.layers.items()}
        usual = Counter(each.values()).most_common(1)[0][0] if each else json.dumps(_layer_config(LayerFormats(())))
        cache = None if formats.kv_cache is None else {**json.loads(usual), "output_tensors": _spec(formats.kv_cache)}
        excluded = [*formats.ignored, *(as_glob(name) for name in formats.ignored if name.startswith("re:"))]
        return {
            "quant_method": self.name,
            "version": VERSION,
            "quant_mode": "eager_mode",
            "global_quant_config": json.loads(usual),
            "layer_quant_config": {name: json.loads(own) for name, own in each.items() if own != usual},
            "layer_type_quant_config": {},
            "exclude": excluded,
            "algo_config": None,
            "softmax_quant_spec": None,
            "kv_cache_quant_config": {} if cache is None else {f"*{side}_proj": cache for side in "kv"},
            "kv_cache_post_rope": formats.kv_cache is not None,
            "export": {
                "kv_cache_group": [],
                "min_kv_scale": 0.0,
                "pack_method": self.pack_method,
                "weight_format": "real_quantized",
                "weight_merge_groups": None,
            },
        }

    def told(self, source: Source) -> ModelFormats:
        """The formats of a checkpoint that Quark wrote, from its configuration and the shapes of its tensors."""
        where = f"{source.path / 'config.json'}: quantization_config"
        config = check_as(QuarkConfig, source.config["quantization_config"], where)
        if config.global_quant_config is None and not config.layer_quant_config:
            return ModelFormats(told_weights(source), ignored=tuple(config.exclude or ()))
        if config.layer_type_quant_config or config.softmax_quant_spec:
            raise DetentError(f"{where}: formats by class of layers, and of softmax, are not read by Detent")
        layers = {}
        for name in (n.removesuffix("_scale") for n in source if n.endswith(".weight_scale")):
            module = name.removesuffix(".weight")
            cached = next((c for p, c in (config.kv_cache_quant_config or {}).items() if fnmatchcase(module, p)), None)
            special = [c for p, c in (config.layer_quant_config or {}).items() if fnmatchcase(module, p)]
            own = special[-1] if special else cached or config.global_quant_config
            if own is None or own.weight is None:
                raise DetentError(f"{source.path}: {module} has scales, but config.json has no format for its weight")
            dtype = source.info(f"{module}.weight_scale").dtype
            sides = (own.weight, own.input_tensors, None if cached is not None else own.output_tensors)
            weight, inputs, outputs = (_told(side, f"{where}: {module}") for side in sides)
            assert weight is not None
            weight = weight.with_scale_dtype(_SCALE_DTYPES.get(dtype, "float32"))
            shape = _shape(source, f"{module}.weight", weight)
            layers[module] = LayerFormats(shape, weight, inputs, outputs)
        caches = {_told(c.output_tensors, where) for c in (config.kv_cache_quant_config or {}).values()}
        cache = next(iter(caches), None)
        if len(caches) > 1 or (cache is not None and self.why_not_cache(cache)):
            raise DetentError(f"{where}: a key/value cache in {', '.join(map(str, caches))} is not read by Detent")
        return ModelFormats(layers, cache, tuple(config.exclude or ()))

    def _codes(self, field: str, fmt: Format, shape: tuple[int, ...], turned: bool) -> StoredPart:
        """Codes or zero points [rows, columns]: bytes, or eight to a word; `turned`: transposed first."""
        dtype, stored = fmt.element.storage_dtype, shape[::-1] if turned else shape
        if fmt.bits == 8:
            store: Callable[[Tensor], Tensor] = (lambda t: _turn(t).to(dtype)) if turned else (lambda t: t.to(dtype))
            return StoredPart(
                field, stored if field == "codes" or turned else shape[1:], dtype, store, _back(field, turned)
            )
        order = torch.tensor(_ORDERS[self.pack_method])
        columns = stored[-1]

        def pack(codes: Tensor) -> Tensor:
            rows = (_turn(codes) if turned else codes).reshape(*stored[:-1], -1, 8)[..., order]
            return pack_int32(rows.to(dtype).reshape(stored).contiguous(), 4)

        def unpack(words: Tensor) -> Tensor:
            codes = unpack_int32(words.reshape(*stored[:-1], -1), 4, columns, dtype)
            codes = codes.reshape(*stored[:-1], -1, 8)[..., order.argsort()].reshape(stored)
            return _back(field, turned)(codes)

        on_disk = (*stored[:-1], columns // 8)
        return StoredPart(field, on_disk if field == "codes" or turned else on_disk[1:], torch.int32, pack, unpack)


def _turn(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous() if tensor.dim() == 2 else tensor


def _back(field: str, turned: bool) -> Callable[[Tensor], Tensor]:
    """From what lies on disk, unpacked: turned back, zero points as int32."""

    def read(tensor: Tensor) -> Tensor:
        tensor = _turn(tensor) if turned else tensor
        return tensor if field == "codes" else tensor.to(torch.int32)

    return read


def _narrow(fmt: Format) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(fmt.element.storage_dtype)


# ---- the words of Quark ---------------------------------------------------------------------------------------------


def _why_no_weight(fmt: Format, shape: tuple[int, ...]) -> str | None:
    granularity, element = fmt.granularity, fmt.element
    rows_or_groups = granularity == per_channel(0) or granularity.kind == "per_group"
    if isinstance(fmt.scale, SearchedScale):
        return f"{fmt}: scales that Quark computes in another way"
    if isinstance(fmt.scale, PowerOfTwoScale):
        if isinstance(element, Integer) or element in (E4M3, E5M2) or granularity.group_size != 32:
            return f"{fmt}: of the power-of-two formats, Quark exports MXFP4 and MXFP6 alone"
    elif isinstance(element, Integer):
        if fmt.bits not in (4, 8) or fmt.zero_point == "float":
            return f"{fmt}: of integers, only those of 4 and 8 bits, with integer zero points"
        if not (rows_or_groups or (granularity.kind == "per_tensor" and fmt.bits == 8)):
            return f"{fmt}: integers have scales per row or group, those of 8 bits also one per tensor"
        if fmt.base is not None and (fmt.bits != 4 or not element.signed):
            return f"{fmt}: on the codes of FP8, only int4"
        if fmt.bits == 4 and (shape[0] % 8 or shape[1] % 8):
            return f"a weight of shape {shape}: eight codes share a word, so both sizes are multiples of 8"
    elif element in (E4M3, E5M2):
        if granularity not in (per_tensor(), per_channel(0)) or scale_dtype(fmt) not in _PLAIN:
            return f"{fmt}: FP8 has one scale for the tensor or each row"
    elif element != E2M1 or granularity.kind != "per_group" or scale_dtype(fmt) in ("bfloat16", "float16"):
        return f"{fmt}: of floats with float scales, only FP8 and FP4 in groups"
    elif fmt.scale.outer != (scale_dtype(fmt) == "e4m3"):
        return f"{fmt}: FP4 has scales in float32 or UE5M3, or in E4M3 under a scale of the tensor"
    return None


def _why_no_activation(fmt: Format) -> str | None:
    if isinstance(fmt.scale, PowerOfTwoScale):
        held = fmt.element in _ELEMENTS and fmt.granularity.group_size == 32 and fmt.dynamic
    else:
        kind = fmt.granularity.kind
        held = fmt.element in _ELEMENTS or (
            isinstance(fmt.element, Integer) and fmt.bits in (4, 8) and fmt.zero_point in ("none", "int")
        )
        held &= fmt.scale.outer == (scale_dtype(fmt) == "e4m3")
        held &= kind in ("per_tensor", "per_token", "per_group")
    return None if held else f"activations in {fmt}"


def _layer_config(layer: LayerFormats) -> dict[str, Any]:
    return {
        "weight": _specs(layer.weight),
        "input_tensors": _specs(layer.input, activation=True),
        "output_tensors": _specs(layer.output, activation=True),
        "bias": None,
        "target_device": None,
    }


def _specs(fmt: Format | None, *, activation: bool = False) -> Spec | list[Spec] | None:
    """One specification, or two: of the codes of FP8 and those on them, or of FP4 and the FP8 of its scales."""
    if fmt is None:
        return None
    if fmt.base is not None:
        return [_spec(fmt.base), _spec(fmt)]
    if fmt.scale.outer:
        return [_spec(fmt) | {"is_dynamic": activation}, _spec(fp8(dynamic=fmt.dynamic)) | {"is_scale_quant": True}]
    return _spec(fmt)


def _spec(fmt: Format) -> Spec:
    kind, element = fmt.granularity.kind, fmt.element
    small = kind == "per_group" and element in _ELEMENTS and element not in (E4M3, E5M2)
    powers = isinstance(fmt.scale, PowerOfTwoScale)
    observer = {"per_tensor": "Tensor", "per_group": "Group"}.get(kind, "Channel")
    form = None
    if small or powers:
        form = "e8m0" if powers else {"ue5m3": "e5m3"}.get(scale_dtype(fmt), "float32")
    integers = isinstance(element, Integer)
    name = f"{'' if element.minimum < 0 else 'u'}int{fmt.bits}" if integers else _ELEMENTS[element]
    return {
        "dtype": name,
        "observer_cls": "PerBlockMXObserver" if small or powers else f"Per{observer}MinMaxObserver",
        "is_dynamic": fmt.dynamic,
        "qscheme": "per_channel" if kind == "per_token" else kind,
        "ch_axis": {"per_tensor": None, "per_channel": 0, "per_token": 1, "per_group": -1}[kind],
        "group_size": fmt.granularity.group_size,
        "block_size": None,
        "symmetric": None if small else fmt.zero_point == "none",
        "round_method": "half_even",
        "scale_type": None if element in (E4M3, E5M2) and kind == "per_tensor" else "float",
        "scale_format": form,
        "scale_calculation_mode": fmt.scale.rounding if isinstance(fmt.scale, PowerOfTwoScale) else None,
        "mx_element_dtype": None,
        "zero_point_type": "int32",
        "is_scale_quant": False,
        "enable_buffer_reuse": False,
        "max_input_numel": 4194304,
    }


def _told(found: QuarkSpec | list[QuarkSpec] | None, where: str) -> Format | None:
    if found is None:
        return None
    return _format([spec.model_dump() for spec in (found if isinstance(found, list) else [found])], where)


def _format(specs: list[Spec], where: str) -> Format:
    """The inverse of `_specs`. Raises DetentError for what Detent doesn't read."""
    first, *more = specs
    if more and more[0]["is_scale_quant"] and first["dtype"] == "fp4" and first["group_size"]:
        return nvfp4(first["group_size"], dynamic=more[0]["is_dynamic"])
    if more and first["dtype"] == "fp8_e4m3" and more[0]["dtype"] == "int4":
        return progressive(4)
    granularity = _granularity(first, where)
    name, form = first["dtype"], first["scale_format"]
    fmt = None
    if more or first["zero_point_type"] not in (None, "int32"):
        pass
    elif name in ("int4", "uint4", "int8", "uint8"):
        signed = name.startswith("i")
        symmetric = signed and first["symmetric"] is not False
        fmt = integer(int(name[-1]), granularity, signed=signed, symmetric=symmetric)
    elif name in _BY_NAME and form == "e8m0":
        fmt = mx(_KIND[name], block=first["group_size"] or 32)
    elif name in ("fp8_e4m3", "fp8_e5m2") and form is None:
        fmt = fp8(_KIND[name], granularity)
    elif name == "fp4" and form in (None, "float32", "e5m3"):
        fmt = small_float("e2m1", granularity, scale_dtype="ue5m3" if form == "e5m3" else "float32")
    if fmt is None:
        raise DetentError(f"{where}: {name} with {form or 'float'} scales in {len(specs)} stages is not read by Detent")
    return fmt.as_dynamic(first["is_dynamic"])


def _granularity(spec: Spec, where: str) -> Granularity:
    scheme, axis = spec["qscheme"], spec["ch_axis"]
    if scheme in (None, "per_tensor"):
        return per_tensor()
    if scheme == "per_channel":
        return per_channel(0) if axis == 0 else per_token()
    if scheme == "per_group" and spec["group_size"] and axis in (-1, 1):
        return per_group(spec["group_size"])
    raise DetentError(f"{where}: scales {scheme} along axis {axis} are not read by Detent")


def _shape(source: Source, name: str, fmt: Format) -> tuple[int, ...]:
    """The logical shape of a weight, from that of what is stored."""
    shape = source.info(name).shape
    if len(shape) != 2 or min(shape) < 1:
        raise DetentError(f"{source.path}: {name} has shape {shape}; Quark stores matrices")
    rows, columns = shape
    columns = columns * 8 if isinstance(fmt.element, Integer) and fmt.bits == 4 else columns * 8 // fmt.bits
    if isinstance(fmt.element, Integer) and fmt.granularity.kind == "per_group":
        rows, columns = columns, rows
    return (rows, columns)


class QuarkReader(BesideReader):
    """Reads Quark's layout."""

    def __init__(self, source: Source) -> None:
        export = source.config["quantization_config"].get("export")
        method = export.get("pack_method", "reorder") if isinstance(export, dict) else "reorder"
        super().__init__(source, QuarkLayout().with_details(pack_method=method))
