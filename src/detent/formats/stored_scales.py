"""`Scales`: what is stored of the scales of one tensor, made from what tiles use, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from detent.errors import DetentError
from detent.formats import tiles as tl
from detent.formats.exporting import exporting
from detent.formats.format import Format
from detent.formats.memory import in_parts
from detent.formats.scales import SearchedScale
from detent.formats.tiles import TileScale


@dataclass(frozen=True, eq=False)
class Scales:
    """The stored scales of one tensor, in the shape that `Granularity.grid` gives (one per tensor: shape ()).

    Attributes:
        scale: float32/bfloat16/float16, float8_e4m3fn, or uint8 (a power-of-two exponent + 127; UE5M3 bit patterns);
            int8 or uint8 in super-blocks.
        zero_point: int32 for ``int``, float32 for ``float``; for ``minimum`` float16, or uint8 in super-blocks; else
            None (a midpoint is not stored).
        outer_scale: float32 scalar: the scale of the scales, or the scale of the base format; for super-blocks float16
            [..., super-blocks of a row] or, where minimums are stored, [..., super-blocks, 2] with theirs; else None.
    """

    scale: Tensor
    zero_point: Tensor | None = None
    outer_scale: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Scales:
        """`function` of each tensor that there is."""
        return Scales(*(None if t is None else function(t) for t in vars(self).values()))  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> Scales:
        return self.map(lambda t: t.to(device))


def scales_from_range(fmt: Format, low: Tensor, high: Tensor, *, amax_tensor: Tensor | None = None) -> Scales:
    """Scales for calibrated ranges.

    Args:
        fmt: the format; of a progressive format the range is that of the base's code values.
        low, high: float tensors of the grid's shape: smallest and largest value of each tile. ``-amax`` and ``amax``
            where only magnitudes are known.
        amax_tensor: for a format with an outer scale: the largest magnitude of the whole tensor, a scalar; by default
            the largest of the ranges.

    Raises:
        DetentError: a range isn't finite, or a low is above its high.
    """
    if isinstance(fmt.scale, SearchedScale):
        raise DetentError(f"scales of [{fmt}] follow from values, not from a range; use encode, or fake_quantize")
    low, high = low.to(torch.float32), high.to(torch.float32)
    if not exporting() and not bool((torch.isfinite(low) & torch.isfinite(high) & (low <= high)).all()):
        raise DetentError("calibrated ranges must be finite with low <= high; was the calibration data finite?")
    outer = None
    if fmt.scale.outer:
        if amax_tensor is None:
            amax_tensor = torch.maximum(-low, high).amax() if low.numel() else low.new_zeros(())
        outer = tl.outer_scale_of(fmt, amax_tensor)
    return stored_scales(fmt, tl.scale_from_range(fmt, low, high, outer), tuple(low.shape))


def stored_scales(fmt: Format, scale: TileScale, shape: tuple[int, ...]) -> Scales:
    """The scales of tiles, in the shape of their grid, as they are stored."""
    zero_point = None
    if scale.zero_point is not None and fmt.zero_point != "midpoint":
        dtype = torch.int32 if fmt.zero_point == "int" else torch.float32
        zero_point = scale.zero_point.to(dtype).reshape(shape)
    rule = fmt.scale
    assert not isinstance(rule, SearchedScale)
    (stored,) = in_parts(lambda value: (rule.store(value),), scale.value)
    return Scales(stored.reshape(shape), zero_point, scale.outer)


def tile_scale(fmt: Format, scales: Scales) -> TileScale:
    """Stored scales as the tile functions take them (`detent.formats.tiles`)."""
    if isinstance(fmt.scale, SearchedScale):
        return _searched_scale(fmt.scale, scales)
    zero_point = scales.zero_point
    value = fmt.scale.load(scales.scale).reshape(-1, 1)
    if fmt.zero_point == "midpoint":
        zero_point = torch.full_like(value, 2.0 ** (fmt.element.bits - 1))
    elif zero_point is not None:
        zero_point = zero_point.reshape(-1, 1).to(torch.float32)
    return TileScale(value, zero_point, None if fmt.base is not None else scales.outer_scale)


def _searched_scale(rule: SearchedScale, scales: Scales) -> TileScale:
    """Exact: float16 times an integer of 8 bits has 19 bits."""
    value, minimum = scales.scale.to(torch.float32), scales.zero_point
    if minimum is not None:
        minimum = minimum.to(torch.float32)
    if rule.tiles:
        grid, shared = tuple(value.shape), scales.outer_scale
        assert shared is not None
        if minimum is not None:
            minimum = -minimum * rule.spread(shared[..., 1], grid)
            shared = shared[..., 0]
        value = value * rule.spread(shared, grid)
    return TileScale(value.reshape(-1, 1), None if minimum is None else minimum.reshape(-1, 1))
