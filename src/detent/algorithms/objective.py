"""The objective that weight algorithms share, and the scales of a weight spread over its elements.

``loss(W, W^) = tr((W - W^) G (W - W^)^T)`` with ``G = sum x x^T``: the squared error of the layer's outputs summed over
the calibration tokens, exactly, computed from G alone in ``out * in^2`` operations however many tokens there were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from detent.errors import DetentError
from detent.formats import FloatScale, Format, PowerOfTwoScale, QTensor, Scales, decode, encode, float32
from detent.formats.granularity import from_tiles, to_tiles
from detent.formats.kernels import simulate_static
from detent.formats.stored_scales import tile_scale
from detent.formats.tiles import TileScale, multiplier
from detent.statistics import SiteStatistics
from detent.statistics.products import fast_products

#: Elements worked on at once where many passes follow each other, few enough for a core's cache.
PIECE = 1 << 18
#: Rows from which the energy of a layer's output, only reported, is estimated.
_ENERGY_ROWS = 256
#: Outputs of a layer that are held at once.
_MOST_OUTPUTS = 1 << 22


def output_error(difference: Tensor, moment: Tensor) -> Tensor:
    """tr(D G D^T) of D [out, in] and G [in, in], a float64 scalar."""
    return rows_error(difference, moment).sum()


def rows_error(difference: Tensor, moment: Tensor, *, exact: bool = False) -> Tensor:
    """The same for each output row, float64 [out], never negative. `exact`: without `fast_products`."""
    d = difference.to(torch.float32)
    with nullcontext() if exact else fast_products(d.numel() * d.shape[1]):
        product = d @ moment
    error: Tensor = torch.linalg.vecdot(product, d)
    return error.double().clamp_min(0.0)


def error_measure(statistics: SiteStatistics, most: int | None = None) -> Callable[[Tensor], float]:
    """What measures ``tr(D G D^T)`` of a difference D [out, in] at a site in the fewest operations: G, or the rows x of
    a sample, ``sum |D x|^2``.

    Args:
        statistics: with a second moment or a sample.
        most: rows of the sample that are enough, for comparing candidates.
    """
    if statistics.sample is not None:
        rows = statistics.drawn()[:most]
        if len(rows) < rows.shape[1]:
            share = statistics.tokens / len(rows)
            return lambda d: share * _outputs_error(d, rows)
    moment = statistics.moment()
    return lambda d: float(output_error(d, moment))


def _outputs_error(difference: Tensor, rows: Tensor) -> float:
    total = 0.0
    with fast_products(difference.numel() * len(rows)):
        for piece in difference.split(max(1, _MOST_OUTPUTS // len(rows))):
            outputs = piece @ rows.T
            total += float(torch.linalg.vecdot(outputs, outputs).sum(dtype=torch.float64))
    return total


def energy_of(weight: Tensor, measure: Callable[[Tensor], float]) -> float:
    """The objective of a weight of zeros, estimated from some of the rows."""
    some = weight[:: max(1, len(weight) // _ENERGY_ROWS)]
    return measure(some) * len(weight) / max(1, len(some))


def chooses_codes_together(fmt: Format) -> bool:
    """Whether a code depends on its neighbours' codes: micro-exponents, or a base format."""
    micro = isinstance(fmt.scale, PowerOfTwoScale) and bool(fmt.scale.micro)
    return micro or fmt.base is not None


def check_elementwise(fmt: Format, algorithm: str) -> None:
    """Refuse formats in which a code depends on its neighbours' codes.

    Raises:
        DetentError: micro-exponents or a base format.
    """
    if chooses_codes_together(fmt):
        raise DetentError(f"{algorithm}: {fmt} chooses codes jointly, not one by one; use 'max' or 'mse'")


@dataclass(frozen=True)
class Units:
    """What the codes of a weight [out, in] mean, column by column.

    ``element.nearest(w / unit + zero_point)`` is the code of w, and ``(code - zero_point) * unit`` its value; where
    minimums are stored, ``element.nearest((w - minimum) / unit)`` and ``code * unit + minimum``.

    Attributes:
        unit: float32 [n, out]; columns that share their scales share a row here.
        zero_point: the same for zero points or minimums, or None.
        at: int64 [in], which row belongs to each column.
    """

    unit: Tensor
    zero_point: Tensor | None
    at: Tensor

    def of(self, column: int) -> tuple[Tensor, Tensor | None]:
        """(unit, zero point) of a column, each [out]."""
        row = self.rows[column]
        return self.unit[row], None if self.zero_point is None else self.zero_point[row]

    @cached_property
    def rows(self) -> list[int]:
        """`at` as numbers."""
        return self.at.tolist()

    def some(self, rows: slice) -> Units:
        """Those of some rows of the weight."""
        return Units(self.unit[:, rows], None if self.zero_point is None else self.zero_point[:, rows], self.at)

    @staticmethod
    def stacked(many: Sequence[Units]) -> Units:
        """Those of weights of one format, stacked along their rows."""
        zeros = [units.zero_point for units in many if units.zero_point is not None]
        return Units(torch.cat([units.unit for units in many], 1), torch.cat(zeros, 1) if zeros else None, many[0].at)


def units_of(fmt: Format, scales: Scales, shape: tuple[int, int]) -> Units:
    """The units of a weight of this shape under `scales`."""
    scale: TileScale = tile_scale(fmt, scales)
    unit = multiplier(fmt, scale).float()
    out, width = shape
    if unit.numel() > 1 and fmt.granularity.lengths(shape)[0] == 1:
        at = torch.arange(width) // fmt.granularity.lengths(shape)[1]
        parts = [None if v is None else v.reshape(out, -1).T.contiguous() for v in (unit, scale.zero_point)]
    else:
        at = torch.arange(width)
        tiles = to_tiles(torch.empty(shape, device=unit.device), fmt.granularity)
        parts = [
            None if v is None else from_tiles(v.expand(tiles.shape), fmt.granularity, shape).T.contiguous()
            for v in (unit, scale.zero_point)
        ]
    assert parts[0] is not None
    return Units(parts[0], parts[1], at)


def nearest_values(weight: Tensor, fmt: Format, unit: Tensor, zero_point: Tensor | None) -> Tensor:
    """The values of the codes nearest to float32 `weight`, for what `Units.of` gives; float32.

    Each is exactly the value of its code. A quotient that float32 rounds to the midpoint between two codes may take
    either.
    """
    if fmt.zero_point == "minimum":
        assert zero_point is not None
        quotient = (weight - zero_point).div_(torch.where(unit == 0, torch.inf, unit))
        return float32.nearest(fmt.element, quotient, over=True).mul_(unit).add_(zero_point)
    if not float32.supports(fmt):
        quotient = weight.double() / unit
        if zero_point is None:
            return fmt.element.nearest(quotient).float() * unit
        return (fmt.element.nearest(quotient + zero_point) - zero_point).float() * unit
    quotient = weight / (torch.where(unit == 0, torch.inf, unit) if _may_vanish(fmt) else unit)
    if zero_point is None:
        return float32.nearest(fmt.element, quotient, over=True).mul_(unit)
    return float32.nearest(fmt.element, quotient.add_(zero_point), over=True).sub_(zero_point).mul_(unit)


def _may_vanish(fmt: Format) -> bool:
    """Whether a unit can be 0: where a product or a power underflows."""
    return not isinstance(fmt.scale, FloatScale) or fmt.scale.outer


def tile_values(tiles: Tensor, fmt: Format, scale: TileScale) -> Tensor:
    """The values nearest to float32 tiles [tiles, elements], under the scale of each tile."""
    return simulate_static(tiles, fmt, scale)[0]


def quick_tile_values(tiles: Tensor, fmt: Format, scale: TileScale) -> Tensor:
    """The same in float32 alone, several times as fast, for comparing many candidates; see `nearest_values`."""
    if not float32.supports(fmt):
        return tile_values(tiles, fmt, scale)
    return nearest_values(tiles, fmt, multiplier(fmt, scale).float(), scale.zero_point)


def rounded_to_nearest(weight: Tensor, fmt: Format, scales: Scales) -> Tensor:
    """The values of the codes nearest to float32 `weight` under given scales; see `nearest_values`."""
    return rounded_under(weight, fmt, tile_scale(fmt, scales))


def rounded_under(weight: Tensor, fmt: Format, scale: TileScale) -> Tensor:
    """The same under the scales of its tiles, some tiles at a time so that they stay in a core's cache."""
    tiles = to_tiles(weight, fmt.granularity)
    out = torch.empty_like(tiles)
    step = max(1, PIECE // tiles.shape[1]) if len(scale.value) == len(tiles) else len(tiles)
    for start in range(0, len(tiles), step):
        piece = slice(start, start + step)
        part = TileScale(scale.value[piece], None if scale.zero_point is None else scale.zero_point[piece], scale.outer)
        out[piece] = quick_tile_values(tiles[piece], fmt, part)
    return from_tiles(out, fmt.granularity, tuple(weight.shape))


def has_free_scale(fmt: Format) -> bool:
    """Whether a scale of this format can take (nearly) any value: a float of 16 bits or more, none on top of it."""
    return not fmt.scale.outer and fmt.scale.bits > 8


def requantize(weight: Tensor, fmt: Format, scales: Scales) -> Tensor:
    """decode(encode(weight)) under given scales, float32."""
    q: QTensor = encode(weight.float(), fmt, scales)
    return decode(q)
