"""Quantizers in an ONNX graph: QuantizeLinear and DequantizeLinear, and weights as the codes that they stand for.

What the operators can't say, such as scales found anew for each block where the opset has no blocks, is traced as the
arithmetic that defines the format.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detent.errors import DetentError
from detent.formats import E2M1, E4M3, Format, Integer, PowerOfTwoScale
from detent.formats import tiles as tl
from detent.formats.exporting import exporting, tracing
from detent.formats.granularity import from_tiles, to_tiles
from detent.formats.qtensor import fake_quantize
from detent.nn.onnx_constants import (
    HALF_BYTES,
    STORED_AS,
    TYPES,
    Constants,
    current,
    place_of,
    plain_zero,
    prepared,
    rounded_as,
)

_FLOAT = 1


def in_graph() -> bool:
    """Whether an ONNX graph is being made of what runs."""
    return exporting() and torch.onnx.is_in_onnx_export()


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
        (axis, block), kind = place, rounded_as(fmt)
        scale, zero = _own_scales(fmt, wide, constants.scale_of_scales)
    else:
        scales = constants.scales or quantizer.scales_for(x)
        return fake_quantize(x, fmt, scales, outer_scale=constants.scale_of_scales, name=quantizer.name)
    assert kind is not None
    assert scale is not None
    block = x.shape[-1] if block == -1 else block
    element = fmt.element
    if zero is not None and "FLOAT" in kind:
        # onnxruntime leaves a ReLU in front of a zero point of 8-bit floats out. A bound in between changes nothing.
        wide = torch.maximum(wide, _along(scale * element.minimum, axis, wide.dim()))
    codes = _quantize(wide, scale, zero, kind, axis, block)
    if isinstance(element, Integer) and (element.narrow or f"INT{element.bits}" not in kind):
        codes = codes.clamp(int(element.minimum), int(element.maximum))
    y = _dequantize(codes, scale, zero, kind, axis, block)
    return y if x.dtype == torch.float32 else tl.narrow(y, x.dtype)


def _place_of_own_scales(fmt: Format, x: Tensor) -> tuple[int, int] | None:
    """(axis, block) for scales that the values of `x` ask for; None where the operators don't take them."""
    if rounded_as(fmt) is None or fmt.granularity.kind == "per_channel":
        return None
    place = place_of(fmt, x.dim())
    return place if place is None or place[1] == 0 or isinstance(x.shape[-1], int) else None


def _own_scales(fmt: Format, x: Tensor, outer: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(scales, zero points) that the values of `x` ask for, by the arithmetic that defines them."""
    scale = tl.own_scales(to_tiles(x, fmt.granularity), fmt, outer)
    shape = () if fmt.granularity.kind == "per_tensor" else (*x.shape[:-1], -1)
    zero = scale.zero_point
    unit = tl.multiplier(fmt, scale).to(torch.float32).reshape(shape)
    kind = rounded_as(fmt)
    assert kind is not None
    return unit, zero.reshape(shape).to(TYPES[kind][1]) if zero is not None else None if shape else plain_zero(
        kind, unit
    )


def _own_operators(fmt: Format, x: Tensor, outer: Tensor | None) -> Tensor | None:
    """`x` rounded by TensorRT's operators for blocks whose scales are found as it runs; None where it has none."""
    if not current().tensorrt:
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
    elif current().tensorrt and _is_mxfp8(fmt):
        attributes = {"axis": constants.axis, "block_size": constants.block, "output_dtype": _FLOAT}
        y = _node("trt::TRT_MXFP8DequantizeLinear", (codes, constants.scale), attributes, "FLOAT", codes.shape)
    else:
        y = _dequantize(codes, scale, zero, constants.type, constants.axis, constants.block)
    if fmt.base is not None and constants.scale_of_scales is not None:
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
    if current().tensorrt and kind == "FLOAT8E4M3FN" and not scale.dim():
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
    if current().tensorrt and not standard:
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
    if tracing():
        given = [x for x in inputs if x is not None]  # only the last may be None
        casts = {i: stored or kind for i, x in enumerate(given) if x.dtype.itemsize == 1 and x.is_floating_point()}
        given = [x.to(torch.float16) if i in casts else x.detach() for i, x in enumerate(given)]
        return _TracedNode.apply(op, attributes, kind, casts, *given)  # type: ignore[no-any-return, no-untyped-call]
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
        metadata_props={STORED_AS: stored} if stored in HALF_BYTES else {},
    )
    return list(made)


class _TracedNode(torch.autograd.Function):
    """A node for the exporter that traces with real tensors (``dynamo=False``). It ends at opset 20, so there are no
    blocks, and has no tensors of 8-bit floats: their values pass as float16, and constants are cast in the graph."""

    @staticmethod
    def forward(ctx, op, attributes, kind, casts, *inputs):  # type: ignore[no-untyped-def]
        tracer: Any = torch._C
        state = tracer._get_tracing_state()
        tracer._set_tracing_state(None)  # what is computed here is not part of the graph
        try:
            return _value_of_node(op, attributes.get("axis", 0), kind, *inputs)
        finally:
            tracer._set_tracing_state(state)

    @staticmethod
    def symbolic(g, op, attributes, kind, casts, *inputs):  # type: ignore[no-untyped-def]
        helper: Any = torch.onnx.symbolic_helper
        opset = helper.GLOBALS.export_onnx_opset_version
        least = 19 if "FLOAT8" in kind or casts else 13
        if opset < least:
            raise DetentError(f"{op} needs opset {least} here, not {opset}; pass opset_version={least} or more")
        cast = [g.op("Cast", x, to_i=TYPES[casts[i]][0]) if i in casts else x for i, x in enumerate(inputs)]
        return g.op(op, *cast, **{f"{name}_i": value for name, value in attributes.items()})


def _value_of_node(op: str, axis: int, kind: str, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    scale = _along(scale, axis, x.dim())
    zero = torch.zeros(()) if zero_point is None else _along(zero_point.to(torch.float32), axis, x.dim())
    if op == "DequantizeLinear":
        return (x.to(torch.float32) - zero) * scale
    dtype = TYPES[kind][1]
    if dtype.is_floating_point:
        largest = torch.finfo(dtype).max
        return (x / scale).clamp(-largest, largest).to(dtype).to(torch.float16)
    limits = torch.iinfo(dtype)
    return (torch.round(x / scale) + zero).clamp(limits.min, limits.max).to(dtype)
