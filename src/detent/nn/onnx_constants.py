"""What is constant in an ONNX graph: weights as codes, and scales, made ready before the graph is.

PyTorch traces a model with tensors that have no values. Both its exporters walk through all modules first, and
`QuantModule` and `TensorQuantizer` take that as the moment to call `prepare_weight` and `prepare_scales`. These leave
attributes of the quantizer behind, which become initializers of the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from detent.formats import E2M1, E4M3, E5M2, Format, Integer, PowerOfTwoScale, QTensor, Scales
from detent.formats import tiles as tl
from detent.formats.elements import UE5M3, Float
from detent.formats.exporting import exporting
from detent.formats.granularity import to_tiles
from detent.formats.stored_scales import tile_scale

#: Types of ONNX by name: their numbers (onnx.proto), and what PyTorch holds their codes in.
TYPES = {
    "UINT8": (2, torch.uint8),
    "INT8": (3, torch.int8),
    "FLOAT8E4M3FN": (17, torch.float8_e4m3fn),
    "FLOAT8E5M2": (19, torch.float8_e5m2),
    "UINT4": (21, torch.uint8),
    "INT4": (22, torch.int8),
    "FLOAT4E2M1": (23, torch.uint8),
}
#: The default of `torch.onnx.export`; the first opsets with scales for blocks and types of 4 bits, and with FP4.
PLAIN_OPSET, BLOCKS_OPSET, FP4_OPSET = 20, 21, 23
#: On a node: the type that initializers among its inputs get in a graph that is complete. PyTorch has no such tensors.
STORED_AS = "detent.stored_as"


@dataclass(frozen=True)
class Target:
    """What a graph is made for.

    Attributes:
        opset: version of the standard operators.
        tensorrt: whether TensorRT's own operators are used where it has some.
        weights: filled on the way: the bytes of codes and scales of each weight, by the name of its quantizer.
    """

    opset: int = PLAIN_OPSET
    tensorrt: bool = False
    weights: dict[str, int] = field(default_factory=dict, compare=False)


_target: ContextVar[Target] = ContextVar("onnx_target", default=Target())  # noqa: B039  of the plain call; never read


@contextmanager
def made_for(target: Target) -> Iterator[None]:
    """Graphs that are made inside are made for `target`."""
    token = _target.set(target)
    try:
        yield
    finally:
        _target.reset(token)


def current() -> Target:
    """What the graph is made for that is being made."""
    return _target.get()


def preparing() -> bool:
    """Whether an exporter walks through the modules while tensors still have values."""
    return torch.onnx.is_in_onnx_export() and not exporting() and type(torch.empty(0)) is Tensor


# ---- what is constant -----------------------------------------------------------------------------------------------

_PREPARED = "_prepared_for_onnx"
#: Fields of `Constants` that become initializers.
_INITIALIZERS = ("codes", "code_values", "scale", "scale_values", "zero_point", "scale_of_scales")


@dataclass(frozen=True)
class Constants:
    """What a quantizer brings into a graph.

    Attributes:
        type: of ONNX, that codes have; None where no operator stands for the format, so that arithmetic does.
        codes: of a weight; None for a quantizer of activations.
        code_values, scale_values: float32, where codes or scales are stored as indices into a table.
        scale: per tensor [], per channel [n], with blocks in the shape of the grid; [tiles] for weights in tiles.
        zero_point: shaped like the scale.
        scale_of_scales: float32 [].
        scales: the calibrated scales of activations.
        key: tells whether they are those of a quantizer as it is.
        axis, block: attributes of the operators.
        shape: of a weight.
        in_tiles: whether its codes are [tiles, elements per tile].
    """

    type: str | None = None
    codes: Tensor | None = None
    code_values: Tensor | None = None
    scale: Tensor | None = None
    scale_values: Tensor | None = None
    zero_point: Tensor | None = None
    scale_of_scales: Tensor | None = None
    scales: Scales | None = None
    axis: int = 0
    block: int = 0
    shape: tuple[int, ...] = ()
    in_tiles: bool = False
    key: Any = None

    @property
    def nbytes(self) -> int:
        """Of the initializers that they become."""
        return sum(
            -(-t.numel() // 2) if self.type in HALF_BYTES and name in ("codes", "zero_point") else t.nbytes
            for name in _INITIALIZERS
            if (t := getattr(self, name)) is not None
        )


HALF_BYTES = ("UINT4", "INT4", "FLOAT4E2M1")


def prepared(quantizer: Any) -> Constants | None:
    """What is ready for a graph."""
    return quantizer.__dict__.get(_PREPARED)  # type: ignore[no-any-return]


def keep(quantizer: Any, constants: Constants | None) -> None:
    """Make `constants` ready for the next graph; None drops what was."""
    if quantizer.__dict__.pop(_PREPARED, None) is not None:
        for name in _INITIALIZERS:
            quantizer.__dict__.pop(name, None)
    if constants is not None:
        tensors = {name: value for name in _INITIALIZERS if (value := getattr(constants, name)) is not None}
        quantizer.__dict__.update({_PREPARED: constants, **tensors})
        if constants.codes is not None:
            current().weights[quantizer.name] = constants.nbytes


def prepare_scales(quantizer: Any) -> None:
    """Make the calibrated scales of a quantizer ready for a graph."""
    key = (quantizer.state_key(), id(current().weights))
    if (ready := prepared(quantizer)) is not None and ready.key == key:
        return
    scales, fmt = quantizer.scales(), quantizer.format
    if scales is None or scales.scale.is_meta:
        keep(quantizer, Constants(scale_of_scales=quantizer.outer_scale(), key=key))
        return
    kind, place = rounded_as(fmt), place_of(fmt, scales.scale.dim())
    if kind is None or place is None:
        keep(quantizer, Constants(scales=scales, key=key))
        return
    scale = tile_scale(fmt, scales)
    unit = tl.multiplier(fmt, scale).to(torch.float32).reshape(scales.scale.shape)
    zero = scale.zero_point if scale.zero_point is not None else plain_zero(kind, unit)
    if fmt.granularity.kind == "per_channel":
        unit = unit.reshape(-1)
    axis, block = place
    zero = None if zero is None else zero.reshape(unit.shape).to(TYPES[kind][1])
    keep(quantizer, Constants(kind, scale=unit, zero_point=zero, scales=scales, axis=axis, block=block, key=key))


def rounded_as(fmt: Format) -> str | None:
    """The type that QuantizeLinear rounds to for a format; None if it can't."""
    element, opset = fmt.element, current().opset
    if fmt.base is not None or fmt.scale.micro or fmt.zero_point == "float":
        return None
    if isinstance(element, Integer):
        # No zero points of 4 bits: onnxruntime takes a ReLU before them for part of the rounding, whatever they are.
        small = opset >= BLOCKS_OPSET and element.bits == 4 and not element.narrow and fmt.zero_point == "none"
        return f"{'' if element.signed else 'U'}INT{4 if small else 8}"
    if element == E2M1 and opset >= FP4_OPSET:
        return "FLOAT4E2M1"
    return {E4M3: "FLOAT8E4M3FN", E5M2: "FLOAT8E5M2"}.get(element)  # type: ignore[arg-type]


def plain_zero(kind: str, scale: Tensor) -> Tensor | None:
    """Zero points of 0: until opset 21 they alone say what QuantizeLinear rounds to, and engines look for those of
    8-bit integers."""
    wanted = current().opset < BLOCKS_OPSET or kind.endswith("INT8")
    return torch.zeros(scale.shape, dtype=TYPES[kind][1]) if wanted else None


def place_of(fmt: Format, rank: int) -> tuple[int, int] | None:
    """(axis, block) of the operators for activations; None where they have no such scales. -1: a whole axis."""
    kind, blocks = fmt.granularity.kind, fmt.granularity.blocks
    if kind == "per_tensor":
        return 0, 0
    if kind == "per_channel" and len(blocks) == 1:
        return blocks[0][0] % rank if rank else blocks[0][0], 0
    if kind in ("per_group", "per_token") and current().opset >= BLOCKS_OPSET:
        return -1, fmt.granularity.group_size or -1
    return None


def prepare_weight(quantizer: Any, q: QTensor, key: Any = None) -> None:
    """Make codes ready to stand in a graph for the weight that the quantizer rounds."""
    fmt, shape = q.format, q.shape
    kind, codes, code_values = _stored_codes(q)
    scale: Tensor | None
    scale, zero, scale_values = _stored_scale(q, codes.dtype)
    ones = torch.ones(()) if scale.dtype == torch.float8_e4m3fn else None
    whole = fmt.granularity.kind == "per_tensor"
    lengths = shape if whole else fmt.granularity.lengths(shape)
    cut = [axis for axis, (length, size) in enumerate(zip(lengths, shape, strict=True)) if length < size]
    axis = block = 0
    in_tiles = False
    if kind is not None and len(cut) <= 1 and all(lengths[axis] == 1 for axis in cut):
        axis = cut[0] if cut else 0
        scale, zero = _flat(scale, not cut), _flat(zero, not cut)
    elif kind is not None and current().opset >= BLOCKS_OPSET:
        # One axis has blocks. Along the others a scale is repeated until there is one for each index.
        axis = max(cut, key=lambda axis: lengths[axis])
        block = lengths[axis]
        for other in set(range(len(shape))) - {axis}:
            scale, zero = (_repeated(t, other, lengths[other], shape[other]) for t in (scale, zero))
    else:
        in_tiles = True
        codes = _as_bytes(lambda x: to_tiles(x, fmt.granularity), codes)
        scale, zero = _flat(scale), _flat(zero)
    constants = Constants(
        kind,
        codes.contiguous(),
        code_values,
        scale,
        scale_values,
        zero,
        ones if q.outer_scale is None else q.outer_scale,
        axis=axis,
        block=block,
        shape=shape,
        in_tiles=in_tiles,
        key=key,
    )
    keep(quantizer, constants)


def _stored_codes(q: QTensor) -> tuple[str | None, Tensor, Tensor | None]:
    """(type, codes, the values of codes that are indices): in the smallest type that holds every value exactly."""
    element, codes, opset = q.format.element, q.codes, current().opset
    if isinstance(element, Integer):
        bits = element.bits
        if q.micro is not None:  # in steps half as large, so that all have the same
            run = q.format.scale.micro
            codes = codes * (2 - q.micro.repeat_interleave(run, -1)[..., : codes.shape[-1]]).to(torch.int16)
            bits += 1
        if bits > 8 or q.format.zero_point == "float":
            return None, codes, None
        size = 4 if bits <= 4 and opset >= BLOCKS_OPSET else 8
        return f"{'' if element.signed else 'U'}INT{size}", codes.to(element.storage_dtype), None
    known = {E4M3: "FLOAT8E4M3FN", E5M2: "FLOAT8E5M2", **({E2M1: "FLOAT4E2M1"} if opset >= FP4_OPSET else {})}
    if element in known:
        return known[element], codes, None
    values = element.table(codes.device)
    if isinstance(element, Float) and torch.equal(values.to(torch.float8_e4m3fn).to(torch.float32), values):
        return "FLOAT8E4M3FN", element.decode(codes).to(torch.float8_e4m3fn), None
    return None, codes, values


def _stored_scale(q: QTensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(scales as they are stored, zero points, the values of scales that are indices)."""
    rule, zero, values = q.format.scale, q.zero_point, None
    if isinstance(rule, PowerOfTwoScale):
        exponents = torch.arange(256) - 127 + rule.unit_exponent(q.format.element) - int(rule.micro > 0)
        values = torch.exp2(exponents.double()).float()
    elif rule.dtype == "ue5m3":
        values = UE5M3.table(q.scale.device)
    if q.format.zero_point == "midpoint":
        zero = torch.full(q.scale.shape, 2 ** (q.format.bits - 1))
    return q.scale, zero if zero is None or q.format.zero_point == "float" else zero.to(dtype), values


def _flat(x: Tensor | None, scalar: bool = False) -> Tensor | None:
    return None if x is None else x.reshape(() if scalar else -1)


def _repeated(x: Tensor | None, axis: int, length: int, size: int) -> Tensor | None:
    if x is None or length == 1:
        return x
    return _as_bytes(lambda x: x.repeat_interleave(length, axis).narrow(axis, 0, size).contiguous(), x)


def _as_bytes(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function` of a tensor whose elements it only moves: PyTorch moves few types of one byte."""
    return function(x.view(torch.uint8)).view(x.dtype) if x.dtype.itemsize == 1 else function(x)
