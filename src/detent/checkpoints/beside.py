"""Layouts in which the scales of a weight lie in tensors beside it: what those of Quark, ModelOpt and FP8 share.

A layer has ``weight``, ``weight_scale`` and, by its format, ``weight_scale_2`` and ``weight_zero_point``; calibrated
inputs and outputs have ``input_scale`` and ``output_scale``. A `StoredPart` says where one field of a `QTensor` lies
and how: `BesideLayout` writes by it and `BesideReader` reads by it, so that the two can't differ.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from detent.checkpoints.layout import Layout, left_description
from detent.checkpoints.records import LayerCheckpoint, LayerFormats, ModelFormats, assemble
from detent.checkpoints.source import Source
from detent.checkpoints.told import FLOATS, FP8
from detent.errors import DetentError
from detent.formats import (
    E4M3,
    FloatScale,
    Format,
    PowerOfTwoScale,
    QTensor,
    Scales,
)
from detent.formats.packing import pack, unpack
from detent.formats.stored import check_scales, check_stored, stored_layout

#: In these no float model has tensors.
CODES = (*FP8, torch.float8_e8m0fnu, torch.uint8, torch.int8, torch.int32, torch.uint32)
#: What belongs to activations: it says how the quantized model computes, not what its weights are.
OF_ACTIVATIONS = re.compile(
    r"((input|output|activation|k|v|q|kv|prob)_(scale|zero_point|global_scale)(_2)?|input_scale_ub)"
)
#: Ends of the names of the scale of keys, in the order in which they are looked for; those of values follow from them.
#: Old versions of AutoFP8 have one for both.
_KEYS = (".k_proj.k_scale", ".k_proj.output_scale", ".k_scale", ".kv_scale")
#: What a name in a layout is called by others: old versions, and transformers.
_ALSO = {
    "weight_scale": ("weight_scale_inv",),
    "weight_scale_inv": ("weight_scale",),
    "input_scale": ("activation_scale", "input_scale_2"),
}


@dataclass(frozen=True)
class StoredPart:
    """One tensor on disk.

    Attributes:
        field: of the `QTensor` or `Scales` that it holds.
        shape, dtype: on disk. Read is any shape that differs in axes of length 1 alone.
        to_disk, from_disk: from the field to the tensor and back, shapes aside.
    """

    field: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    to_disk: Callable[[Tensor], Tensor] = lambda tensor: tensor
    from_disk: Callable[[Tensor], Tensor] = lambda tensor: tensor


def packed_rows(fmt: Format, shape: tuple[int, ...]) -> StoredPart:
    """Codes of fewer than 8 bits in bytes, the first in the lowest bits, each row on its own."""
    element, columns = fmt.element, shape[-1]
    store, load = partial(pack, bits=element.bits), partial(unpack, bits=element.bits, n=columns)
    return StoredPart("codes", (*shape[:-1], columns * element.bits // 8), torch.uint8, store, load)


class BesideLayout(Layout):
    """A layout in which scales lie beside the weight."""

    def why_not(self, layer: LayerFormats) -> str | None:
        """None, or why the layout has no place for a layer of matrices that computes as usual."""
        raise NotImplementedError

    def why_not_cache(self, fmt: Format) -> str | None:
        """None, or why it has no place for keys and values of this format."""
        per_tensor_fp8 = fmt.element == E4M3 and fmt.granularity.kind == "per_tensor" and not fmt.dynamic
        if per_tensor_fp8 and scale_dtype(fmt) == "float32":
            return None
        return f"a key/value cache as {fmt}: only FP8 E4M3 with calibrated scales in float32"

    def told(self, source: Source) -> ModelFormats:
        """The formats of a checkpoint that another tool wrote."""
        raise NotImplementedError

    def can_hold(self, formats: ModelFormats) -> str | None:
        """None, or the reason why this layout can't hold the model: the first layer's that it can't."""
        for name, layer in formats.layers.items():
            if reason := _why_no_beside(layer) or self.why_not(layer):
                return f"{self.name} does not hold {name}: {reason}"
        if formats.attention is not None or formats.keys_rotated:
            return f"{self.name} does not hold quantized attention probabilities or rotated keys"
        if formats.kv_cache is not None and (reason := self.why_not_cache(formats.kv_cache)):
            return f"{self.name} does not hold {reason}"
        return None

    def weight_parts(self, fmt: Format, shape: tuple[int, ...]) -> dict[str, StoredPart]:
        """Where a weight lies, by the names behind that of its module."""
        laid = stored_layout(fmt, shape)
        grid, dtype = laid["scale"]
        codes = packed_rows(fmt, shape) if fmt.bits < 8 else StoredPart("codes", *laid["codes"])
        grid = grid[:1] if math.prod(grid[1:]) == 1 and grid else grid
        parts = {"weight": codes, "weight_scale": StoredPart("scale", grid, dtype)}
        if fmt.has_outer_scale:
            parts["weight_scale_2"] = StoredPart("outer_scale", (), torch.float32)
        return parts

    def activation_parts(self, side: str, fmt: Format) -> dict[str, StoredPart]:
        """Where the calibrated scales of "input" or "output" lie."""
        parts = {f"{side}_scale": StoredPart("outer_scale" if fmt.has_outer_scale else "scale", (), torch.float32)}
        if fmt.zero_point == "int":
            dtype = fmt.element.storage_dtype
            store, load = (lambda t: t.to(dtype)), (lambda t: t.to(torch.int32))
            parts[f"{side}_zero_point"] = StoredPart("zero_point", (), dtype, store, load)
        return parts

    def cache_scales(self, fmt: Format, stored: Tensor) -> Scales:
        """The scales of keys or values that a stored scalar stands for."""
        return Scales(stored)

    def layer_tensors(self, layer: LayerCheckpoint) -> dict[str, Tensor]:
        """The tensors of one layer, by their full names."""
        q, tensors = layer.weight, {}
        if q is not None:
            tensors = _stored(self.weight_parts(q.format, q.shape), q.tensors(), q.format)
        for side, activation in (("input", layer.input), ("output", layer.output)):
            if activation is not None and activation.scales is not None:
                parts = self.activation_parts(side, activation.format)
                tensors |= _stored(parts, vars(activation.scales), activation.format)
        return {f"{layer.name}.{key}": tensor for key, tensor in tensors.items()}


def _stored(parts: Mapping[str, StoredPart], fields: Mapping[str, Tensor], fmt: Format) -> dict[str, Tensor]:
    fields = {"constant": torch.full_like(fields["scale"], constant(fmt), dtype=torch.int32), **fields}
    return {key: part.to_disk(fields[part.field]).reshape(part.shape) for key, part in parts.items()}


def scale_dtype(fmt: Format) -> str:
    """The dtype of floating-point scales; "" where they are something else."""
    return fmt.scale.dtype if isinstance(fmt.scale, FloatScale) else ""


def constant(fmt: Format) -> int:
    """The zero point of a format that stores none, for layouts that store it all the same."""
    return 2 ** (fmt.bits - 1) if fmt.zero_point == "midpoint" else 0


def as_glob(name: str) -> str:
    """A name of `ModelFormats.ignored`, of which patterns are regular expressions, with wildcards in their place."""
    if not name.startswith("re:"):
        return name
    for regular, wild in ((r"\d+", "*"), (r"\..*", ".*"), (r".*\.", "*."), (r"\.", "."), ("$", "")):
        name = name.replace(regular, wild)
    return name.removeprefix("re:")


def _why_no_beside(layer: LayerFormats) -> str | None:
    if layer.rotated or layer.low_rank:
        return "an input that is rotated at run time" if layer.rotated else "a low-rank branch"
    if layer.kind != "Linear" or len(layer.shape) != 2:
        return f"{layer.kind} modules with weights of shape {layer.shape}: only linear layers"
    if layer.weight is None:
        return "a layer of which only activations are quantized"
    for activation in (layer.input, layer.output):
        whole = activation is None or activation.dynamic or activation.granularity.kind == "per_tensor"
        if activation is not None and not whole and not activation.has_outer_scale:
            return f"calibrated {activation.granularity} activation scales: only per-tensor ones"
        if activation is not None and not activation.dynamic and scale_dtype(activation) in ("bfloat16", "float16"):
            return f"calibrated activation scales in {scale_dtype(activation)}: only in float32"
    if not isinstance(layer.weight.scale, FloatScale | PowerOfTwoScale):
        return f"a weight in {layer.weight}, which is a format of GGUF"
    group = layer.weight.granularity.group_size
    if group is not None and layer.shape[1] % group:
        return f"groups of {group} in rows of {layer.shape[1]} input features: its readers take no short last group"
    return None


class BesideReader:
    """Reads a layout in which scales lie beside the weight, whether Detent or another tool wrote it.

    Args:
        source: the opened folder.
        layout: with its details as the folder has them.

    Raises:
        DetentError: config.json is not what the weights were written with; a tensor is there that it doesn't explain.
    """

    def __init__(self, source: Source, layout: BesideLayout) -> None:
        self.source, self.layout = source, layout
        left = left_description(source)
        self.described = left is not None
        self.formats = layout.told(source) if left is None else left[0]
        if left is not None:
            self._check_config()
        self._kv = self._cache_names() if self.formats.kv_cache is not None else {}
        ends = tuple(end for key in _KEYS for end in (key, key.replace("k_", "v_")))
        self.used = {name for name in source if self._kv and name.endswith(ends)}  # some are there twice
        for module, layer in self.formats.layers.items():
            self.used.update(self._name(module, key) for key in self._parts(module, layer))
        refuse_unexplained(source, self.used)

    def _check_config(self) -> None:
        """Engines read config.json alone, so it has to say what the note in the weights' header says."""
        wanted = self.layout.quantization_config(self.formats)
        found = self.source.config["quantization_config"]
        for key, value in wanted.items():
            if found.get(key) != value:
                raise DetentError(
                    f"{self.source.path / 'config.json'}: {key} of quantization_config is not what the weights were"
                    " written with; one of the two was edited. Quantize again"
                )

    def weight_names(self, module: str) -> list[str]:
        """The tensors that the weight of a layer is made of, codes first."""
        layer = self.formats.layers[module]
        return [self._name(module, key) for key in self._parts(module, layer) if key.startswith("weight")]

    def layer(self, name: str) -> LayerCheckpoint:
        """The contents of one layer, read now. Raises DetentError where a tensor is missing or misshapen."""
        layer = self.formats.layers[name]
        return assemble(
            name,
            layer,
            lambda fmt: self._weight(name, fmt, layer.shape),
            lambda side, fmt: self._calibrated(name, side, fmt),
        )

    def check(self) -> None:
        """Look at all headers and scales, without reading codes. Raises DetentError as `layer`."""
        for name, layer in self.formats.layers.items():
            if layer.weight is not None:
                parts = self.layout.weight_parts(layer.weight, layer.shape)
                self._expect(name, "weight", parts["weight"])
                self._scales(name, layer.weight, layer.shape)
            for side, fmt in layer.calibrated:
                self._calibrated(name, side, fmt)
        self.kv_scales()

    def kv_scales(self) -> dict[str, tuple[Scales, ...]]:
        """(scales of keys, scales of values) by attention module; empty where none were calibrated."""
        fmt = self.formats.kv_cache
        if fmt is None:
            return {}
        scalar = StoredPart("scale", (), torch.float32)

        def scales(name: str) -> Scales:
            module, _, key = name.rpartition(".")
            value = self._read(module, key, scalar).reshape(())
            found = self.layout.cache_scales(fmt, value)
            check_scales(fmt, found, self._place(name))
            return found

        return {module: (scales(key), scales(value)) for module, (key, value) in self._kv.items()}

    def _cache_names(self) -> dict[str, tuple[str, str]]:
        found: dict[str, tuple[str, str]] = {}
        for name in self.source:
            end = next((end for end in _KEYS if name.endswith(end)), None)
            if end is not None:
                value = name.removesuffix(end) + end.replace("k_", "v_")
                self.source.info(value)
                found.setdefault(name.removesuffix(end), (name, value))
        return found

    def _parts(self, module: str, layer: LayerFormats) -> dict[str, StoredPart]:
        parts = {} if layer.weight is None else self.layout.weight_parts(layer.weight, layer.shape)
        for side, fmt in layer.calibrated:
            parts = parts | self.layout.activation_parts(side, fmt)
        return parts

    def _name(self, module: str, key: str) -> str:
        """The full name of a part; of experts that are one tensor, the tensor is named like a module."""
        tensors = self.source.tensors
        fused = key.startswith("weight") and f"{module}.weight" not in tensors and module in tensors
        keys = (key, *_ALSO.get(key, ()))
        names = [module + k.removeprefix("weight") if fused else f"{module}.{k}" for k in keys]
        return next((name for name in names if name in tensors), names[0])

    def _place(self, name: str) -> str:
        return f"{self.source.path / self.source.info(name).file}: {name}"

    def _expect(self, module: str, key: str, part: StoredPart) -> str:
        """The full name of a part, once it is known to be there."""
        name = self._name(module, key)
        info = self.source.info(name)
        same_dtype = (
            info.dtype == part.dtype
            or (info.dtype == torch.float8_e8m0fnu and part.dtype in (torch.uint8, torch.float32))
            or (info.dtype in FLOATS and part.dtype == torch.float32)
        )
        if not same_dtype or _long_axes(info.shape) != _long_axes(part.shape):
            raise DetentError(
                f"{self._place(name)} is {info.dtype} with shape {info.shape}; its codes call for {part.dtype}"
                f" {part.shape}"
            )
        return name

    def _read(self, module: str, key: str, part: StoredPart) -> Tensor:
        tensor = self.source.tensor(self._expect(module, key, part))
        if tensor.dtype == torch.float8_e8m0fnu and part.dtype == torch.uint8:
            tensor = tensor.view(torch.uint8)
        return part.from_disk(tensor.to(part.dtype).reshape(part.shape))

    def _weight(self, name: str, fmt: Format, shape: tuple[int, ...]) -> QTensor:
        scales = self._scales(name, fmt, shape)
        codes = self._read(name, "weight", self.layout.weight_parts(fmt, shape)["weight"])
        dtype = stored_layout(fmt, shape)["codes"][1]
        codes = codes.reshape(shape) if codes.dtype == dtype else codes.reshape(shape).to(dtype)
        q = QTensor(fmt, shape, codes, scales.scale, scales.zero_point, scales.outer_scale)
        return check_stored(q, self._place(self._name(name, "weight")))

    def _scales(self, name: str, fmt: Format, shape: tuple[int, ...]) -> Scales:
        laid, fields = stored_layout(fmt, shape), self._fields(name, self.layout.weight_parts(fmt, shape), fmt)
        scales = Scales(**{field: tensor.reshape(laid[field][0]) for field, tensor in fields.items()})
        check_scales(fmt, scales, self._place(self._name(name, "weight_scale")), of_weight=True)
        return scales

    def _fields(self, module: str, parts: Mapping[str, StoredPart], fmt: Format) -> dict[str, Tensor]:
        """Everything but codes, by field. What is constant is not kept, and may be missing."""
        fields = {}
        for key, part in parts.items():
            name, value = self._name(module, key), constant(fmt)
            if part.field not in ("codes", "constant"):
                fields[part.field] = self._read(module, key, part)
            there = part.field == "constant" and name in self.source.tensors
            if there and bool((self._read(module, key, part) != value).any()):
                raise DetentError(f"{self._place(name)}: {fmt} is symmetric, yet a zero point is not {value}")
        return fields

    def _calibrated(self, name: str, side: str, fmt: Format) -> Scales:
        fields = self._fields(name, self.layout.activation_parts(side, fmt), fmt)
        if "scale" not in fields:
            fields["scale"] = torch.empty(0, dtype=fmt.scale.stored_dtype)
        scales = Scales(**fields)
        check_scales(fmt, scales, self._place(self._name(name, f"{side}_scale")))
        return scales


def _long_axes(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]


def refuse_unexplained(source: Source, used: set[str]) -> None:
    """Refuse tensors that belong to quantized weights and that nothing says how to read.

    Raises:
        DetentError: naming the first.
    """
    for name, info in source.tensors.items():
        last = name.rpartition(".")[2]
        odd = info.dtype in CODES or last.startswith(("weight_", "weight.", "pre_quant_", "svdquant_"))
        if odd and name not in used and not OF_ACTIVATIONS.fullmatch(last):
            raise DetentError(
                f"{source.path / info.file}: {name} ({str(info.dtype).removeprefix('torch.')}, shape {info.shape})"
                " belongs to a quantized weight in a form that Detent does not decode; quantize the original"
                " checkpoint instead"
            )
