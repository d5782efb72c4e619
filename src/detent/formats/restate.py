"""The same values in another format, where its grid has them all: nothing is rounded."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from detent.formats.elements import Integer
from detent.formats.format import Format
from detent.formats.qtensor import QTensor, decode, encode, same_bits
from detent.formats.scales import PowerOfTwoScale, SearchedScale
from detent.formats.stored_scales import Scales


def restate(q: QTensor, fmt: Format, *, exact: bool = True) -> QTensor | None:
    """`q` in another format with exactly the same values; None where the grid of `fmt` lacks one of them.

    Scales keep their values and are never computed anew: a group that shares one goes on sharing it. What changes is
    how they are stored, the type of codes, and where the zero is in them.

    Args:
        q: codes and scales.
        fmt: the format to say them in.
        exact: False: values that the grid lacks are rounded to it, and None only means that `fmt` has other groups or
            another kind of scales.

    Example:
        >>> import torch
        >>> from detent.formats import decode, encode, integer, per_group, restate
        >>> q = encode(torch.randn(8, 64), integer(4, per_group(32)))
        >>> wider = restate(q, integer(8, per_group(32), signed=False, symmetric=False))
        >>> torch.equal(decode(wider), decode(q))
        True
        >>> restate(q, integer(3, per_group(32))) is None
        True
    """
    if q.format == fmt:
        return q
    scales = _restated_scales(q, fmt)
    if scales is None:
        return None
    values = decode(q)
    other = encode(values, fmt, scales)
    return other if not exact or same_bits(decode(other), values) else None


def _restated_scales(q: QTensor, fmt: Format) -> Scales | None:
    """The scales of `q` as `fmt` stores them, rounded where it can't; None where the two have nothing to do with each
    other."""
    old, grid = q.format, fmt.granularity.grid(q.shape)
    if _kind(fmt) != _kind(old) or None in (_kind(fmt), _kind(old)) or q.scale.numel() not in (1, math.prod(grid)):
        return None
    value = q.scale.float() if isinstance(old.scale, SearchedScale) else old.scale.load(q.scale)
    zero, zero_point = _zero(q) + _lowest(fmt) - _lowest(old), None
    if fmt.zero_point == "int":
        zero_point = _on(grid, zero.round().to(torch.int32))
    elif fmt.zero_point == "minimum":
        zero_point = _on(grid, (-zero * value).to(fmt.scale.stored_dtype))
    elif fmt.zero_point == "float":
        zero_point = _on(grid, zero)
    return Scales(_on(grid, fmt.scale.store(value)), zero_point, q.outer_scale)


def _kind(fmt: Format) -> str | None:
    """What scales are, each by itself: numbers, numbers under an outer one, exponents; None where it is another."""
    rule = fmt.scale
    if fmt.base is not None or rule.micro or (isinstance(rule, SearchedScale) and rule.tiles):
        return None
    return "exponent" if isinstance(rule, PowerOfTwoScale) else "under" if rule.outer else "number"


def _on(grid: tuple[int, ...], value: Tensor) -> Tensor:
    return (value.expand(grid) if value.numel() == 1 else value.reshape(grid)).contiguous()


def _zero(q: QTensor) -> Tensor:
    """The code that stands for zero, float32, one for each scale."""
    if q.zero_point is not None:
        found = q.zero_point.to(torch.float32)
        return -found / q.scale.float() if q.format.zero_point == "minimum" else found
    middle = 2.0 ** (q.format.bits - 1) if q.format.zero_point == "midpoint" else 0.0
    return torch.full(tuple(q.scale.shape), middle)


def _lowest(fmt: Format) -> int:
    return -(2 ** (fmt.bits - 1)) if isinstance(fmt.element, Integer) and fmt.element.signed else 0
