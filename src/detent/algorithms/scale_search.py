"""Scale search under the second moment: for each tile the range that changes the layer's outputs least.

Two approximations of ``tr(D G D^T)``, D = W - Q(W): its diagonal (``sum_j G_jj D_ij^2``, exact where channels are
uncorrelated), and its block diagonal over the tile's own columns (``local_hessian``), which keeps the correlations
inside a tile. Either splits into tiles, so every tile is searched by itself and all at once. The plain range is among
the candidates and wins ties.

Scales of either sign: signed integers have one code more below zero than above, and each tile may turn it around. Under
a negative scale the code -2^(b-1) stands for a positive number. It is free (a scale's sign bit), and the fewer the
codes, the more it gives: about 10 % less error at 4 bits and 20 % at 2 (AutoRound does the same).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from detent.algorithms.max import weight_range
from detent.algorithms.mse import e4m3_ranges
from detent.algorithms.objective import PIECE, has_free_scale, quick_tile_values
from detent.errors import DetentError
from detent.formats import FloatScale, Format, Integer, Scales, float32, scales_from_range
from detent.formats.granularity import to_tiles
from detent.formats.tiles import TileScale, multiplier, scale_from_range

#: What a range is multiplied with, where scales are powers of two: other factors round to one of these.
_POWERS = (0.25, 0.5, 2.0)


@dataclass(frozen=True)
class RangeChoice:
    """The range of each tile.

    Attributes:
        low, high: float32 in the shape of the scales.
        before, after: the objective, summed over all tiles, of the plain range and of this one.
        turned: bool in the shape of the scales: which tiles are better off with a negative scale; None where that
            wasn't asked.
    """

    low: Tensor
    high: Tensor
    before: float
    after: float
    turned: Tensor | None = None

    def scales(self, fmt: Format, amax_tensor: Tensor | None = None) -> Scales:
        """The scales that the ranges give, in the shape that the ranges have."""
        scales = scales_from_range(fmt, self.low, self.high, amax_tensor=amax_tensor)
        if self.turned is None:
            return scales
        return Scales(torch.where(self.turned, -scales.scale, scales.scale))


def can_turn(fmt: Format) -> bool:
    """Whether a negative scale can be better: signed integers with a code to spare below zero, under a plain scale."""
    element = fmt.element
    lopsided = isinstance(element, Integer) and element.signed and not element.narrow
    return lopsided and has_free_scale(fmt) and fmt.zero_point == "none" and fmt.base is None


def range_factors(fmt: Format, count: int) -> list[float]:
    """Evenly spaced multiples of the plain range, from where the best ones of a format's tiles begin to where
    they end.

    For integers these are about the ends that hold 98 % of the best multiples for normal and Laplace numbers in tiles
    of 32 and 128.
    """
    element, rule = fmt.element, fmt.scale
    bits = element.bits if isinstance(element, Integer) else 0
    # The ends below are for a plain range that is divided by half the number of steps.
    wider = 1.0
    if bits and isinstance(rule, FloatScale) and fmt.zero_point == "none":
        wider = rule.divisor(element, 0.0) / ((element.maximum - element.minimum) / 2)
    least, most = {2: (0.28, 0.94), 3: (0.46, 1.05), 4: (0.73, 1.08), 5: (0.86, 1.14)}.get(
        bits, (0.95, 1.2) if bits > 5 else (0.35, 1.15)
    )
    return [wider * (least + (most - least) / max(1, count - 1) * i) for i in range(count)]


def weighted_range(
    weight: Tensor,
    fmt: Format,
    moment: Tensor,
    factors: Iterable[float],
    *,
    block: bool = False,
    fp8_scale_sweep: bool = False,
    global_amax: Tensor | None = None,
    turn: bool = False,
) -> RangeChoice:
    """The range of each tile with the least objective.

    Args:
        weight: [out, in].
        fmt: a format whose codes are chosen one by one.
        moment: G, float32 [in, in], or its diagonal [in].
        factors: what the plain range is multiplied with; for power-of-two scales 1/4, 1/2 and 2 instead.
        block: use the block of G under each tile, not its diagonal only; for groups.
        fp8_scale_sweep: try every E4M3 scale instead, for formats with these under an outer scale.
        global_amax: the largest magnitude behind an outer scale, by default that of `weight`.
        turn: try negative scales too; for formats of which `can_turn` is true.

    Raises:
        DetentError: the sweep is asked of a format without E4M3 scales, or `block` of one without groups.
    """
    rule, granularity = fmt.scale, fmt.granularity
    if block and granularity.group_size is None:
        raise DetentError(f"local_hessian weighs the columns of a group together; {granularity} has no groups")
    low, high = weight_range(weight, fmt)
    outer = None
    if isinstance(rule, FloatScale) and rule.outer:
        outer = rule.outer_scale(weight.detach().abs().amax() if global_amax is None else global_amax, fmt.element)
    elif fp8_scale_sweep:
        raise DetentError(f"fp8_scale_sweep needs E4M3 scales under an outer scale, not {fmt}")
    tiles = to_tiles(weight.detach().float(), granularity)
    if block:
        assert granularity.group_size is not None
        measure = _block_error(weight, moment, granularity.group_size)
    else:
        measure = _diagonal_error(weight, fmt, moment if moment.dim() == 1 else moment.diagonal())
    factors, lo, hi = list(factors), low.reshape(-1, 1), high.reshape(-1, 1)
    best_lo, best_hi, total, reached = lo.clone(), hi.clone(), 0.0, 0.0
    turned = torch.zeros_like(lo, dtype=torch.bool)
    for piece in _pieces(tiles, weight.shape[0]):
        part, plain_lo, plain_hi = tiles[piece], lo[piece], hi[piece]
        plain, least = None, torch.full_like(plain_lo, torch.inf)
        for new_lo, new_hi in _candidates(fmt, plain_lo, plain_hi, factors, outer, fp8_scale_sweep):
            scale = scale_from_range(fmt, new_lo, new_hi, outer)
            for negative, error in enumerate(_errors(part, fmt, scale, partial(measure, piece), turn)):
                plain = error if plain is None else plain
                better = error < least
                best_lo[piece] = torch.where(better, new_lo, best_lo[piece])
                best_hi[piece] = torch.where(better, new_hi, best_hi[piece])
                if turn:
                    turned[piece] = torch.where(better, bool(negative), turned[piece])
                least = torch.minimum(least, error)
        if plain is not None:
            total += float(plain.sum(dtype=torch.float64))
            reached += float(least.sum(dtype=torch.float64))
    return RangeChoice(
        best_lo.reshape(low.shape),
        best_hi.reshape(high.shape),
        total,
        reached,
        turned.reshape(low.shape) if turn else None,
    )


def _errors(
    tiles: Tensor, fmt: Format, scale: TileScale, measure: Callable[[Tensor], Tensor], turn: bool
) -> Iterator[Tensor]:
    """The error of each tile under `scale`, and, if it may turn, under its negative."""
    if fmt.zero_point != "none" or scale.outer is not None or not float32.supports(fmt):
        yield measure(quick_tile_values(tiles, fmt, scale).sub_(tiles))
        return
    # In units of the scale: what is measured is quadratic.
    unit = multiplier(fmt, scale).float()
    quotient, square = tiles / unit, unit.square()
    element = fmt.element
    if not turn:
        yield measure(float32.nearest(element, quotient).sub_(quotient)).mul_(square)
        return
    codes = float32.to_integer(quotient)
    yield measure(codes.clamp(element.minimum, element.maximum).sub_(quotient)).mul_(square)
    yield measure(codes.clamp_(-element.maximum, -element.minimum).sub_(quotient)).mul_(square)


def _pieces(tiles: Tensor, rows: int) -> Iterator[slice]:
    """Whole rows of the weight at once, few enough to stay in a core's cache while all candidates are tried."""
    count = tiles.shape[0]
    per_row = count // rows if rows and count % rows == 0 else 1
    step = max(1, PIECE // max(1, tiles.shape[1] * per_row)) * per_row
    for start in range(0, count, step):
        yield slice(start, start + step)


def _candidates(
    fmt: Format, low: Tensor, high: Tensor, factors: Iterable[float], outer: Tensor | None, sweep: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """The plain range first."""
    yield low, high
    if sweep:
        assert outer is not None
        yield from e4m3_ranges(fmt, high, outer)
        return
    for k in factors if isinstance(fmt.scale, FloatScale) else _POWERS:
        yield low * k, high * k


#: From some tiles, by number, and their difference to the error of each, [tiles, 1].
Measure = Callable[[slice, Tensor], Tensor]


def _diagonal_error(weight: Tensor, fmt: Format, diagonal: Tensor) -> Measure:
    """Squared differences weighed by G's diagonal."""
    diagonal = diagonal.clamp_min(0).float()
    lengths = fmt.granularity.lengths(tuple(weight.shape))
    if lengths[0] == 1 and weight.shape[1] % lengths[1] == 0:
        row = to_tiles(diagonal[None], fmt.granularity)  # the same in every row of the weight

        def of_rows(_: slice, difference: Tensor) -> Tensor:
            squares = difference.square_().view(-1, *row.shape).transpose(0, 1)
            return torch.bmm(squares, row.unsqueeze(2)).transpose(0, 1).reshape(-1, 1)

        return of_rows
    expanded = to_tiles(diagonal.expand_as(weight), fmt.granularity)
    return lambda piece, difference: torch.linalg.vecdot(difference.square_(), expanded[piece]).unsqueeze(1)


def _block_error(weight: Tensor, moment: Tensor, size: int) -> Measure:
    """The same with the whole block of G that belongs to a group of columns; a short last group counts as padded."""
    width = weight.shape[1]
    groups = -(-width // size)
    padded = torch.zeros(groups * size, groups * size, dtype=torch.float32, device=moment.device)
    padded[:width, :width] = moment
    blocks = torch.stack([padded[i : i + size, i : i + size] for i in range(0, groups * size, size)])

    def measure(_: slice, difference: Tensor) -> Tensor:
        d = difference.reshape(-1, groups, size).transpose(0, 1)
        product = torch.bmm(d, blocks)
        return torch.linalg.vecdot(product, d).clamp_min(0.0).T.reshape(-1, 1)

    return measure
