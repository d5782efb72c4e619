"""Quantizers in an ONNX graph: QuantizeLinear and DequantizeLinear, and weights as the codes that they stand for.

PyTorch traces a model with tensors that have no values, so what is constant is made ready before: both its exporters walk
through all modules first, and `QuantModule` and `TensorQuantizer` take that as the moment to call `prepare_weight` and
`prepare_scales`. What these leave behind are attributes of the quantizer, which become initializers of the same names.

What the operators can't say, such as scales found anew for each block where the opset has no blocks, is traced as the
arithmetic that defines the format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from detent.errors import DetentError
from detent.formats import E2M1, E4M3, E5M2, Format, Integer, PowerOfTwoScale, QTensor, Scales
from detent.formats import tiles as tl
from detent.formats.elements import UE5M3, Float
from detent.formats.exporting import exporting
from detent.formats.granularity import from_tiles, to_tiles
from detent.formats.qtensor import fake_quantize
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
_FLOAT = 1
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


def in_graph() -> bool:
    """Whether an ONNX graph is being made of what runs."""
    return exporting() and torch.onnx.is_in_onnx_export()


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
            -(-t.numel() // 2) if self.type in _HALF_BYTES and name in ("codes", "zero_point") else t.nbytes
            for name in _INITIALIZERS
            if (t := getattr(self, name)) is not None
        )


_HALF_BYTES = ("UINT4", "INT4", "FLOAT4E2M1")


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
            _target.get().weights[quantizer.name] = constants.nbytes


def prepare_scales(quantizer: Any) -> None:
    """Make the calibrated scales of a quantizer ready for a graph."""
    key = (quantizer.state_key(), id(_target.get().weights))
    if (ready := prepared(quantizer)) is not None and ready.key == key:
        return
    scales, fmt = quantizer.scales(), quantizer.format
    if scales is None or scales.scale.is_meta:
        keep(quantizer, Constants(scale_of_scales=quantizer.outer_scale(), key=key))
        return
    kind, place = _rounded_as(fmt), _place(fmt, scales.scale.dim())
    if kind is None or place is None:
        keep(quantizer, Constants(scales=scales, key=key))
        return
    scale = tile_scale(fmt, scales)
    unit = tl.multiplier(fmt, scale).to(torch.float32).reshape(scales.scale.shape)
    zero = scale.zero_point if scale.zero_point is not None else _plain_zero(kind, unit)
    if fmt.granularity.kind == "per_channel":
        unit = unit.reshape(-1)
    axis, block = place
    zero = None if zero is None else zero.reshape(unit.shape).to(TYPES[kind][1])
    keep(quantizer, Constants(kind, scale=unit, zero_point=zero, scales=scales, axis=axis, block=block, key=key))


def _rounded_as(fmt: Format) -> str | None:
    """The type that QuantizeLinear rounds to for a format; None if it can't."""
    element, opset = fmt.element, _target.get().opset
    if fmt.base is not None or fmt.scale.micro or fmt.zero_point == "float":
        return None
    if isinstance(element, Integer):
        # No zero points of 4 bits: onnxruntime takes a ReLU before them for part of the rounding, whatever they are.
        small = opset >= BLOCKS_OPSET and element.bits == 4 and not element.narrow and fmt.zero_point == "none"
        return f"{'' if element.signed else 'U'}INT{4 if small else 8}"
    if element == E2M1 and opset >= FP4_OPSET:
        return "FLOAT4E2M1"
    return {E4M3: "FLOAT8E4M3FN", E5M2: "FLOAT8E5M2"}.get(element)  # type: ignore[arg-type]


def _plain_zero(kind: str, scale: Tensor) -> Tensor | None:
    """Zero points of 0: until opset 21 they alone say what QuantizeLinear rounds to, and engines look for those of 8-bit
    integers."""
    wanted = _target.get().opset < BLOCKS_OPSET or kind.endswith("INT8")
    return torch.zeros(scale.shape, dtype=TYPES[kind][1]) if wanted else None


def _place(fmt: Format, rank: int) -> tuple[int, int] | None:
    """(axis, block) of the operators for activations; None where they have no such scales. -1: a whole axis."""
    kind, blocks = fmt.granularity.kind, fmt.granularity.blocks
    if kind == "per_tensor":
        return 0, 0
    if kind == "per_channel" and len(blocks) == 1:
        return blocks[0][0] % rank if rank else blocks[0][0], 0
    if kind in ("per_group", "per_token") and _target.get().opset >= BLOCKS_OPSET:
        return -1, fmt.granularity.group_size or -1
    return None


def prepare_weight(quantizer: Any, q: QTensor, key: Any = None) -> None:
    """Make codes ready to stand in a graph for the weight that the quantizer rounds."""
    fmt, shape = q.format, q.shape
    kind, codes, code_values = _stored_codes(q)
    scale, zero, scale_values = _stored_scale(q, codes.dtype)
    whole = fmt.granularity.kind == "per_tensor"
    lengths = shape if whole else fmt.granularity.lengths(shape)
    cut = [axis for axis, (length, size) in enumerate(zip(lengths, shape, strict=True)) if length < size]
    axis = block = 0
    in_tiles = False
    if kind is not None and len(cut) <= 1 and all(lengths[axis] == 1 for axis in cut):
        axis = cut[0] if cut else 0
        scale, zero = _flat(scale, not cut), _flat(zero, not cut)
    elif kind is not None and _target.get().opset >= BLOCKS_OPSET:
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
        torch.ones(()) if q.outer_scale is None and scale.dtype == torch.float8_e4m3fn else q.outer_scale,
        axis=axis,
        block=block,
        shape=shape,
        in_tiles=in_tiles,
        key=key,
    )
    keep(quantizer, constants)


def _stored_codes(q: QTensor) -> tuple[str | None, Tensor, Tensor | None]:
    """(type, codes, the values of codes that are indices): in the smallest type that holds every value exactly."""
    element, codes, opset = q.format.element, q.codes, _target.get().opset
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
        return known[element], codes, None  # type: ignore[index]
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


# ---- what runs while the graph is made ------------------------------------------------------------------------------


def simulated(quantizer: Any, x: Tensor) -> Tensor:
    """What a quantizer makes of `x` in the graph: its weight where it has one ready, else `x` rounded."""
    constants, fmt = prepared(quantizer) or Constants(), quantizer.format
    if constants.codes is not None:
        return weight_in_graph(fmt, constants).to(x.dtype)
    wide, kind, zero = x.to(torch.float32), constants.type, constants.zero_point
    axis, block = constants.axis, constants.block
    if kind is not None:
        scale = constants.scale
    elif constants.scales is None and (own := _own_operators(fmt, wide, constants.scale_of_scales)) is not None:
        return tl.narrow(own, x.dtype)
    elif constants.scales is None and (place := _place_of_own_scales(fmt, x)) is not None:
        (axis, block), kind = place, _rounded_as(fmt)
        scale, zero = _own_scales(fmt, wide, constants.scale_of_scales)
    else:
        scales = constants.scales or quantizer.scales_for(x)
        return fake_quantize(x, fmt, scales, outer_scale=constants.scale_of_scales, name=quantizer.name)
    assert kind is not None
    assert scale is not None
    block = x.shape[-1] if block == -1 else block
    element = fmt.element
    if zero is not None and "FLOAT" in kind:
        # onnxruntime leaves a ReLU in front of a zero point of 8-bit floats out; a bound in between changes nothing else.
        wide = torch.maximum(wide, _along(scale * element.minimum, axis, wide.dim()))
    codes = _quantize(wide, scale, zero, kind, axis, block)
    if isinstance(element, Integer) and (element.narrow or f"INT{element.bits}" not in kind):
        codes = codes.clamp(int(element.minimum), int(element.maximum))
    y = _dequantize(codes, scale, zero, kind, axis, block)
    return y if x.dtype == torch.float32 else tl.narrow(y, x.dtype)


def _place_of_own_scales(fmt: Format, x: Tensor) -> tuple[int, int] | None:
    """(axis, block) for scales that the values of `x` ask for; None where the operators don't take them."""
    if _rounded_as(fmt) is None or fmt.granularity.kind == "per_channel":
        return None
    place = _place(fmt, x.dim())
    return place if place is None or place[1] == 0 or isinstance(x.shape[-1], int) else None


def _own_scales(fmt: Format, x: Tensor, outer: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(scales, zero points) that the values of `x` ask for, by the arithmetic that defines them."""
    scale = tl.own_scales(to_tiles(x, fmt.granularity), fmt, outer)
    shape = () if fmt.granularity.kind == "per_tensor" else (*x.shape[:-1], -1)
    zero = scale.zero_point
    unit = tl.multiplier(fmt, scale).to(torch.float32).reshape(shape)
    kind = _rounded_as(fmt)
    assert kind is not None
    return unit, zero.reshape(shape).to(TYPES[kind][1]) if zero is not None else None if shape else _plain_zero(
        kind, unit
    )


def _own_operators(fmt: Format, x: Tensor, outer: Tensor | None) -> Tensor | None:
    """`x` rounded by TensorRT's operators for blocks whose scales are found as it runs; None where it has none."""
    if not _target.get().tensorrt:
        return None
    if _is_mxfp8(fmt):
        attributes = {"axis": -1, "block_size": 32}
        codes, scale = _two_nodes(
            "trt::TRT_MXFP8DynamicQuantize", (x,), {**attributes, "output_dtype": 17}, "UINT8", 32
        )
        more = {**attributes, "output_dtype": _FLOAT}
        return _node("trt::TRT_MXFP8DequantizeLinear", (codes, scale), more, "FLOAT", x.shape)
    if fmt.element == E2M1 and fmt.scale.outer and fmt.granularity.group_size == 16:
        outer = tl.outer_scale_of(fmt, x.abs().amax(tuple(range(x.dim())))) if outer is None else outer
        assert outer is not None
        attributes = {"axis": -1, "block_size": 16, "scale_type": TYPES["FLOAT8E4M3FN"][0]}
        codes, scale = _two_nodes("trt::TRT_FP4DynamicQuantize", (x, outer), attributes, "FLOAT8E4M3FN", 16)
        scale = _dequantize(scale, outer, None, "FLOAT8E4M3FN", standard=True)
        return _dequantize(codes, scale, None, "FLOAT4E2M1", -1, 16)
    return None


def _is_mxfp8(fmt: Format) -> bool:
    return fmt.element == E4M3 and isinstance(fmt.scale, PowerOfTwoScale) and fmt.granularity.group_size == 32


def weight_in_graph(fmt: Format, constants: Constants) -> Tensor:
    """A weight, float32, made of its codes in the graph."""
    codes, scale, zero = constants.codes, _scale_in_graph(fmt, constants), constants.zero_point
    assert codes is not None
    assert constants.scale is not None
    if constants.type is None:
        values = codes.to(torch.float32) if constants.code_values is None else _look_up(constants.code_values, codes)
        y = (values if zero is None else values - zero[:, None].to(torch.float32)) * scale[:, None]
    elif _target.get().tensorrt and _is_mxfp8(fmt):
        attributes = {"axis": constants.axis, "block_size": constants.block, "output_dtype": _FLOAT}
        y = _node("trt::TRT_MXFP8DequantizeLinear", (codes, constants.scale), attributes, "FLOAT", codes.shape)
    else:
        y = _dequantize(codes, scale, zero, constants.type, constants.axis, constants.block)
    if fmt.base is not None:
        y = y * constants.scale_of_scales
    return from_tiles(y, fmt.granularity, constants.shape) if constants.in_tiles else y


def _scale_in_graph(fmt: Format, constants: Constants) -> Tensor:
    scale, outer = constants.scale, None if fmt.base is not None else constants.scale_of_scales
    assert scale is not None
    if constants.scale_values is not None:
        scale = _look_up(constants.scale_values, scale)
    elif scale.dtype == torch.float8_e4m3fn:
        assert outer is not None
        return _dequantize(scale, outer, None, "FLOAT8E4M3FN", standard=True)
    scale = scale.to(torch.float32)
    return scale if outer is None else scale * outer


def _look_up(values: Tensor, codes: Tensor) -> Tensor:
    return values.index_select(0, codes.reshape(-1).to(torch.int64)).reshape(codes.shape)


# ---- operators ------------------------------------------------------------------------------------------------------


def _quantize(x: Tensor, scale: Tensor, zero: Tensor | None, kind: str, axis: int, block: int) -> Tensor:
    attributes = _attributes(scale, axis, block)
    if zero is None:
        attributes["output_dtype"] = TYPES[kind][0]
    if _target.get().tensorrt and kind == "FLOAT8E4M3FN" and not scale.dim():
        return _node("trt::TRT_FP8QuantizeLinear", (x, scale), {}, kind, x.shape)
    return _node("QuantizeLinear", (x, scale, zero), attributes, kind, x.shape)


def _dequantize(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    kind: str,
    axis: int = 0,
    block: int = 0,
    *,
    standard: bool = False,
) -> Tensor:
    """DequantizeLinear; `standard` keeps TensorRT's own operator out."""
    name = "DequantizeLinear"
    if _target.get().tensorrt and not standard:
        if kind == "FLOAT8E4M3FN" and not scale.dim():
            return _node("trt::TRT_FP8DequantizeLinear", (codes, scale), {}, "FLOAT", codes.shape)
        name = "trt::DequantizeLinear" if kind == "INT4" and block else name
    shape = (*codes.shape[:-1], codes.shape[-1] * 2) if codes.dtype == torch.float4_e2m1fn_x2 else codes.shape
    return _node(name, (codes, scale, zero), _attributes(scale, axis, block), "FLOAT", shape, stored=kind)


def _along(x: Tensor, axis: int, rank: int) -> Tensor:
    """[n] or [] shaped to broadcast along an axis of a tensor."""
    return x.reshape([-1 if i == axis else 1 for i in range(rank)]) if x.dim() else x


def _attributes(scale: Tensor, axis: int, block: int) -> dict[str, int]:
    """`axis` and `block_size` as far as they count."""
    return {**({"axis": axis} if scale.dim() else {}), **({"block_size": block} if block else {})}


def _node(
    op: str,
    inputs: Sequence[Tensor | None],
    attributes: dict[str, int],
    kind: str,
    shape: Sequence[int],
    stored: str | None = None,
) -> Tensor:
    """A node with one output, of type `kind`. `stored`: the type of what it reads, where it writes another."""
    if torch.jit.is_tracing():
        given = [x for x in inputs if x is not None]  # only the last may be None
        return _TracedNode.apply(op, attributes, kind, *given)  # type: ignore[no-any-return]
    (y,) = _nodes(op, inputs, attributes, [(kind, shape)], stored or kind)
    return y


def _two_nodes(
    op: str, inputs: Sequence[Tensor], attributes: dict[str, int], scale_kind: str, block: int
) -> list[Tensor]:
    """A node that writes codes and the scales of their blocks."""
    x = inputs[0]
    codes = "FLOAT4E2M1" if "FP4" in op else "FLOAT8E4M3FN"
    blocks = (*x.shape[:-1], -(-x.shape[-1] // block))
    return _nodes(op, inputs, attributes, [(codes, x.shape), (scale_kind, blocks)], codes)


def _nodes(
    op: str,
    inputs: Sequence[Tensor | None],
    attributes: dict[str, int],
    outputs: Sequence[tuple[str, Sequence[int]]],
    stored: str,
) -> list[Tensor]:
    operators = getattr(torch.onnx, "ops", None)
    if operators is None:
        raise DetentError(
            f"quantized models are exported to ONNX from PyTorch 2.8 on, and this is {torch.__version__}; update it, or"
            " pass dynamo=False"
        )
    halved = [(*s[:-1], s[-1] // 2) if kind == "FLOAT4E2M1" else s for kind, s in outputs]  # PyTorch packs two in one
    made = operators.symbolic_multi_out(
        op,
        inputs,
        attributes,
        dtypes=[_FLOAT if kind == "FLOAT" else TYPES[kind][0] for kind, _ in outputs],
        shapes=halved,
        metadata_props={STORED_AS: stored} if stored in _HALF_BYTES else {},
    )
    return list(made)


class _TracedNode(torch.autograd.Function):
    """A node for the exporter that traces with real tensors (``dynamo=False``), which ends at opset 20: no blocks."""

    @staticmethod
    def forward(ctx, op, attributes, kind, x, scale, zero=None):  # type: ignore[no-untyped-def]
        axis = attributes.get("axis", 0)
        scale = _along(scale, axis, x.dim())
        zero = 0 if zero is None else _along(zero.to(torch.float32), axis, x.dim())
        if op == "DequantizeLinear":
            return (x.to(torch.float32) - zero) * scale
        dtype = TYPES[kind][1]
        limits: Any = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
        steps = x / scale if dtype.is_floating_point else torch.round(x / scale) + zero
        return steps.clamp(limits.min, limits.max).to(dtype)

    @staticmethod
    def symbolic(g, op, attributes, kind, x, scale, zero=None):  # type: ignore[no-untyped-def]
        opset = torch.onnx.symbolic_helper.GLOBALS.export_onnx_opset_version
        least = 19 if "FLOAT8" in kind else 13
        if opset < least:
            raise DetentError(f"{op} needs opset {least} here, not {opset}; pass opset_version={least} or more")
        inputs = (x, scale) if zero is None else (x, scale, zero)
        return g.op(op, *inputs, **{f"{name}_i": value for name, value in attributes.items()})
