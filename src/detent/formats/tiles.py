"""The codec on tiles: the one definition of every format's arithmetic.

Everything here works on ``[tiles, elements per tile]`` and knows neither shapes nor storage. Encoding and simulating
share `scale_tiles` and `round_tiles`; the compiled kernels compile these very functions. Tiles are float32 (or narrower
floats, widened on entry); rounding happens in float64 (see `elements`), everything else in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from detent.formats.elements import floor_log2, power_of_two, round_to_even
from detent.formats.exporting import exporting
from detent.formats.format import Format
from detent.formats.scales import FloatScale, PowerOfTwoScale, SearchedScale, divide


class TileScale(NamedTuple):
    """What multiplies the codes of each tile, all ``[tiles, 1]``.

    Attributes:
        value: the scale before any outer scale, as a float32 number that its dtype can store; an int64 exponent for a
            power-of-two scale; with what super-blocks share multiplied in.
        zero_point: float32 zero points, or minimums for formats that store these, or None.
        outer: the float32 scalar on top, or None.
    """

    value: Tensor
    zero_point: Tensor | None = None
    outer: Tensor | None = None


def tile_range(tiles: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """(low, high) of each tile as float32 [tiles, 1]; empty tiles give zeros. NaN anywhere in a tile gives NaN."""
    if tiles.shape[1] == 0:
        zeros = tiles.new_zeros(tiles.shape[0], 1, dtype=torch.float32)
        return zeros, zeros
    return low_and_high(tiles, needs_sign(fmt))


def low_and_high(tiles: Tensor, with_sign: bool) -> tuple[Tensor, Tensor]:
    """`tile_range` of tiles that aren't empty; without sign (-largest magnitude, largest magnitude)."""
    if tiles.shape[0] == 1 and not exporting():  # one pass, and no copy of what may be the whole tensor
        low, high = (bound.reshape(1, 1).to(torch.float32) for bound in torch.aminmax(tiles))
    elif with_sign:
        low, high = (bound.to(torch.float32) for bound in (tiles.amin(1, keepdim=True), tiles.amax(1, keepdim=True)))
    else:
        low = high = tiles.to(torch.float32).abs().amax(1, keepdim=True)
    if with_sign:
        return low, high
    largest = torch.maximum(low.abs(), high)
    return -largest, largest


def needs_sign(fmt: Format) -> bool:
    """Whether a scale depends on which side of zero the largest values are."""
    return fmt.zero_point in ("int", "float") or (
        isinstance(fmt.scale, PowerOfTwoScale) and fmt.scale.rounding == "carry"
    )


def scale_from_range(
    fmt: Format, low: Tensor, high: Tensor, outer: Tensor | None = None, divisor: float | None = None
) -> TileScale:
    """The scale of each tile from its range, float32 [tiles, 1] each (any shape that broadcasts alike will do).

    `divisor`: what a symmetric float scale divides the largest magnitude by, if not the one of its rule.
    """
    if isinstance(fmt.scale, PowerOfTwoScale):
        return TileScale(fmt.scale.exponent(low, high, fmt.element))
    element = fmt.element
    assert isinstance(fmt.scale, FloatScale)
    if fmt.zero_point in ("int", "float"):
        return _affine_scale(fmt, fmt.scale, low, high)
    zero = 2.0 ** (element.bits - 1) if fmt.zero_point == "midpoint" else 0.0
    amax = torch.maximum(-low, high)
    scale = fmt.scale.quantize(divide(amax, divisor or fmt.scale.divisor(element, zero)), outer)
    if outer is None:  # Any scale encodes zeros; 1 keeps files readable. scale == 0: a CPU set to flush subnormals.
        scale = torch.where((amax == 0) | (scale == 0), 1.0, scale)
    return TileScale(scale, torch.full_like(scale, zero) if zero else None, outer)


def _affine_scale(fmt: Format, rule: FloatScale, low: Tensor, high: Tensor) -> TileScale:
    """scale = (high - low) / (qmax - qmin); the zero point is the code of 0, or the unrounded image of it."""
    element = fmt.element
    levels = element.maximum - element.minimum
    if fmt.zero_point == "int":
        low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    width = high - low
    scale = torch.where(torch.isinf(width), divide(high, levels) - divide(low, levels), divide(width, levels))
    if fmt.zero_point == "float":
        scale = torch.where(width == 0, low.abs(), scale)  # a tile of one value: that value is the scale, and exact
    scale = rule.quantize(scale, None)
    empty = low.abs() + high.abs() == 0
    scale = torch.where(empty | (scale == 0), 1.0, scale)  # as in `scale_from_range`
    if fmt.zero_point == "float":
        return TileScale(scale, element.minimum - low / scale)
    zero_point = element.minimum - torch.round(low.double() / scale.double())
    return TileScale(scale, zero_point.clamp(element.minimum, element.maximum).to(torch.float32))


def outer_scale_of(fmt: Format, amax: Tensor) -> Tensor | None:
    """The scale of the scales that a tensor's largest magnitude asks for, where the format has one."""
    if isinstance(fmt.scale, FloatScale) and fmt.scale.outer:
        return fmt.scale.outer_scale(amax, fmt.element)
    return None


def multiplier(fmt: Format, scale: TileScale) -> Tensor:
    """The number that one unit of the element stands for: float32 for float scales, float64 for powers of two."""
    if isinstance(fmt.scale, PowerOfTwoScale):
        return power_of_two(scale.value + fmt.scale.unit_exponent(fmt.element))
    return scale.value if scale.outer is None else scale.value * scale.outer


def may_vanish(fmt: Format) -> bool:
    """Whether the multiplier can be 0: where a product underflows, or an integer scale is 0."""
    return fmt.scale.outer or isinstance(fmt.scale, SearchedScale)


def micro_exponents(tiles: Tensor, fmt: Format, exponent: Tensor) -> Tensor:
    """For MX4/6/9: [tiles, ceil(n / micro)] int64, 1 where all of a run of neighbours are below 2^exponent."""
    assert isinstance(fmt.scale, PowerOfTwoScale)
    run = fmt.scale.micro
    short = -tiles.shape[1] % run
    if short:
        tiles = torch.nn.functional.pad(tiles, (0, short))
    runs = tiles.shape[1] // run
    largest = tiles.abs().view(tiles.shape[0], runs, run).amax(2).double()
    return (floor_log2(largest) < exponent).to(torch.int64)


def round_tiles(tiles: Tensor, fmt: Format, scale: TileScale) -> tuple[Tensor, Tensor, Tensor | None]:
    """(grid values float64 as the element has them, the multiplier of each, micro-exponents).

    For a zero point the grid values are codes, zero point included; `rebuild` takes it off again.
    """
    unit, micro = multiplier(fmt, scale), None
    if fmt.zero_point == "minimum":
        assert scale.zero_point is not None
        tiles, scale = tiles.to(torch.float32) - scale.zero_point, scale._replace(zero_point=None)
    if isinstance(fmt.scale, PowerOfTwoScale) and fmt.scale.micro:
        micro = micro_exponents(tiles, fmt, scale.value)
        steps = power_of_two(scale.value + fmt.scale.unit_exponent(fmt.element) - micro)
        unit = steps.repeat_interleave(fmt.scale.micro, 1)[:, : tiles.shape[1]]
    # Where a scale is 0, every code stands for the same number: x / inf picks the code of 0.
    divisor = torch.where(unit == 0, torch.inf, unit.double()) if may_vanish(fmt) else unit.double()
    quotient = tiles.double() / divisor
    if scale.zero_point is None:
        return fmt.element.nearest(quotient), unit, micro
    if fmt.zero_point == "float":
        return fmt.element.nearest(quotient + scale.zero_point.double()), unit, micro
    # The integer zero point is added after rounding, so that ties fall to even multiples of the scale.
    codes = round_to_even(quotient) + scale.zero_point.double()
    return torch.clamp(codes, fmt.element.minimum, fmt.element.maximum), unit, micro


def rebuild(grid: Tensor, fmt: Format, scale: TileScale, unit: Tensor) -> Tensor:
    """The float32 values that grid values stand for: the arithmetic of `decode`."""
    if fmt.zero_point == "minimum" and scale.zero_point is not None:
        return (grid.to(torch.float32) * unit).add_(scale.zero_point)
    if scale.zero_point is not None:
        grid = grid.to(torch.float32) - scale.zero_point
    if unit.dtype == torch.float64:  # powers of two: exact in float64 even where 2^e is below float32's range
        return (grid.double() * unit).to(torch.float32)
    return grid.to(torch.float32) * unit


def narrow(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values rounded once to `dtype`, saturating: what was finite stays finite.

    Rounding up near the largest float can pass it, -128 * (65504 / 127.5) in float16 for one.
    """
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype)


def choose_four_or_six(tiles: Tensor, fmt: Format, low: Tensor, high: Tensor, outer: Tensor | None) -> TileScale:
    """The better of mapping each tile's amax to 6 and to 4, by squared error; 6 where they are equal."""
    six = scale_from_range(fmt, low, high, outer)
    four = scale_from_range(fmt, low, high, outer, divisor=4.0)
    errors = [((_values(tiles, fmt, s).double() - tiles.double()) ** 2).sum(1, keepdim=True) for s in (six, four)]
    return TileScale(torch.where(errors[1] < errors[0], four.value, six.value), None, outer)


def scale_tiles(tiles: Tensor, fmt: Format, outer: Tensor | None = None) -> TileScale:
    """The scale that each tile's own values ask for."""
    low, high = tile_range(tiles, fmt)
    if fmt.scale.four_over_six:
        return choose_four_or_six(tiles, fmt, low, high, outer)
    return scale_from_range(fmt, low, high, outer)


def own_scales(tiles: Tensor, fmt: Format, outer: Tensor | None = None) -> TileScale:
    """`scale_tiles` with the scale of the scales, where it isn't given, that the largest magnitude asks for."""
    if outer is None and fmt.scale.outer:
        outer = outer_scale_of(fmt, tiles.abs().amax((0, 1)))
    return scale_tiles(tiles, fmt, outer)


def simulate(tiles: Tensor, fmt: Format, scale: TileScale) -> Tensor:
    """decode(encode(tiles)) in the dtype of `tiles`, without making codes."""
    return narrow(_values(tiles, fmt, scale), tiles.dtype)


def _values(tiles: Tensor, fmt: Format, scale: TileScale) -> Tensor:
    grid, unit, _ = round_tiles(tiles, fmt, scale)
    return rebuild(grid, fmt, scale, unit)


def needs_nonnegative(fmt: Format) -> bool:
    """Whether the format holds no negative number at all (unsigned elements without a zero point)."""
    return fmt.element.minimum == 0 and fmt.zero_point == "none"
