"""Scale search under the second moment: for each tile the range that changes the layer's outputs least.

Two approximations of ``tr(D G D^T)``, D = W - Q(W): its diagonal (``sum_j G_jj D_ij^2``, exact where channels are
uncorrelated), and its block diagonal over the tile's own columns (``local_hessian``), which keeps the correlations
inside a tile. Either splits into tiles, so every tile is searched by itself and all at once. The range of
round-to-nearest is among the candidates and wins ties.

Scales of either sign: signed integers have one code more below zero than above, and each tile may swap the two. Under
a negative scale the code -2^(b-1) is a positive number. It is free (a scale's sign bit), and the fewer the
codes, the more it gives: about 10 % less error at 4 bits and 20 % at 2 (AutoRound does the same).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from detent.algorithms.layer import Layer
from detent.algorithms.max import weight_range
from detent.algorithms.mse import e4m3_ranges
from detent.algorithms.objective import PIECE, has_free_scale, quick_tile_values, rounded_to_nearest
from detent.algorithms.outcome import Outcome
from detent.algorithms.site_work import SiteWork
from detent.errors import DetentError
from detent.formats import FloatScale, Format, Integer, Scales, SearchedScale, encode, float32, scales_from_range
from detent.formats.granularity import to_tiles
from detent.formats.tiles import TileScale, multiplier, scale_from_range
from detent.statistics import SiteStatistics

#: What a range is multiplied by, where scales are powers of two: other factors round to one of these.
_POWERS = (0.25, 0.5, 2.0)
#: Bits from which on the sign of a tile's scale is that which gives its largest number the code without a counterpart:
#: the error is within 1 % of that with both signs tried.
_SIGN_KNOWN = 4


@dataclass(frozen=True)
class RangeChoice:
    """The range of each tile.

    Attributes:
        low, high: float32 in the shape of the scales.
        before, after: the objective, summed over all tiles, of the range of round-to-nearest and of this one.
        turned: bool in the shape of the scales: which tiles are better off with a negative scale; None where that
            wasn't asked.
        found: the scales themselves, of formats that search them.
    """

    low: Tensor
    high: Tensor
    before: float
    after: float
    turned: Tensor | None = None
    found: Scales | None = None

    def scales(self, fmt: Format, amax_tensor: Tensor | None = None) -> Scales:
        """The scales that the ranges give, in the shape that the ranges have."""
        if self.found is not None:
            return self.found
        scales = scales_from_range(fmt, self.low, self.high, amax_tensor=amax_tensor)
        if self.turned is None:
            return scales
        return Scales(torch.where(self.turned, -scales.scale, scales.scale))


def can_turn(fmt: Format) -> bool:
    """Whether a negative scale can be better: signed integers with a code to spare below zero, and a free scale."""
    element = fmt.element
    lopsided = isinstance(element, Integer) and element.signed and not element.narrow
    free = isinstance(fmt.scale, FloatScale) and has_free_scale(fmt)
    return lopsided and free and fmt.zero_point == "none" and fmt.base is None


def range_factors(fmt: Format, count: int) -> list[float]:
    """Evenly spaced multiples of the range of round-to-nearest, over the interval in which a format's best ones are.

    For integers these are about the ends that hold 98 % of the best multiples for normal and Laplace numbers in tiles
    of 32 and 128.
    """
    element, rule = fmt.element, fmt.scale
    bits = element.bits if isinstance(element, Integer) else 0
    # The ends below are for a range that is divided by half the number of steps.
    wider = 1.0
    if bits and isinstance(rule, FloatScale) and fmt.zero_point == "none":
        wider = rule.divisor(element, 0.0) / ((element.maximum - element.minimum) / 2)
    least, most = {2: (0.28, 0.94), 3: (0.46, 1.05), 4: (0.73, 1.08), 5: (0.86, 1.14)}.get(
        bits, (0.95, 1.2) if bits > 5 else (0.35, 1.15)
    )
    return [wider * (least + (most - least) / max(1, count - 1) * i) for i in range(count)]


def weighing_of(statistics: SiteStatistics, fmt: Format, *, block: bool = True) -> Tensor:
    """What `weighted_range` weighs differences with: G's blocks where there are groups, unless `block` is False, or its
    diagonal."""
    size = fmt.granularity.group_size
    if size is None or not block:
        return statistics.diagonal()
    return statistics.blocks(min(size, len(statistics.low)))  # rows that are shorter than a group are one tile each


def divided_weighing(weighing: Tensor, scale: Tensor) -> Tensor:
    """The weighing of inputs that are divided by `scale` [channels]."""
    if weighing.dim() == 1:
        return weighing / scale.square()
    groups, size = weighing.shape[:2]
    padded = torch.nn.functional.pad(scale, (0, groups * size - len(scale)), value=1.0).reshape(groups, size)
    return weighing / (padded.unsqueeze(1) * padded.unsqueeze(2))


def weighted_range(
    weight: Tensor,
    fmt: Format,
    moment: Tensor,
    factors: Iterable[float],
    *,
    finer: Sequence[float] = (),
    fp8_scale_sweep: bool = False,
    global_amax: Tensor | None = None,
    turn: bool = False,
) -> RangeChoice:
    """The range of each tile with the least objective.

    Args:
        weight: [out, in].
        fmt: a format whose codes are chosen one by one.
        moment: what of G differences are weighed with, float32: its diagonal [in], or its block under each group of
            columns [groups, size, size], a short last group filled up with zeros. See `weighing_of`.
        factors: what the range of round-to-nearest is multiplied by; for power-of-two scales 1/4, 1/2 and 2 instead.
        finer: distances at which factors on both sides of each tile's best one are tried next, one distance after the
            other, between the least and the greatest of `factors` and 1.
        fp8_scale_sweep: try every E4M3 scale instead, for formats with these under an outer scale.
        global_amax: the largest magnitude behind an outer scale, by default that of `weight`.
        turn: try negative scales too; for formats of which `can_turn` is true.

    Raises:
        DetentError: the sweep is asked of a format without E4M3 scales.
    """
    rule = fmt.scale
    low, high = weight_range(weight, fmt)
    if isinstance(rule, SearchedScale):
        return _format_search(weight, fmt, moment, low, high)
    outer = None
    if isinstance(rule, FloatScale) and rule.outer:
        outer = rule.outer_scale(weight.detach().abs().amax() if global_amax is None else global_amax, fmt.element)
    elif fp8_scale_sweep:
        raise DetentError(f"fp8_scale_sweep needs E4M3 scales under an outer scale, not {fmt}")
    tiles = to_tiles(weight.detach().float(), fmt.granularity)
    measure = _block_error(moment) if moment.dim() == 3 else _diagonal_error(weight, fmt, moment)
    tried = _Tried(fmt, list(factors), finer, outer, fp8_scale_sweep)
    found: list[_Best] = []
    for piece in _pieces(tiles, weight.shape[0]):
        best = _Best(low.reshape(-1, 1)[piece], high.reshape(-1, 1)[piece])
        sides = _sides(tiles[piece], fmt) if turn else [(tiles[piece], None)]
        for candidate in tried.ranges(best):
            scale = scale_from_range(fmt, candidate.low, candidate.high, outer)
            if candidate is best.plain_range:
                best.error = best.plain = _error(tiles[piece], fmt, scale, partial(measure, piece))
                if not turn:
                    continue
            for side, negative in sides:
                best.compare(candidate, _error(side, fmt, scale, partial(measure, piece)), negative)
        found.append(best)
    return RangeChoice(
        torch.cat([best.low for best in found]).reshape(low.shape),
        torch.cat([best.high for best in found]).reshape(high.shape),
        sum(float(best.plain.sum(dtype=torch.float64)) for best in found),
        sum(float(best.error.sum(dtype=torch.float64)) for best in found),
        torch.cat([best.negative for best in found]).reshape(low.shape) if turn else None,
    )


def _format_search(weight: Tensor, fmt: Format, moment: Tensor, low: Tensor, high: Tensor) -> RangeChoice:
    """What a format that searches its scales finds under the diagonal of `moment`, if it is better than without it."""
    wide = weight.detach().float()
    diagonal = moment if moment.dim() == 1 else moment.diagonal(dim1=1, dim2=2).flatten()[: weight.shape[1]]
    measure = _block_error(moment) if moment.dim() == 3 else _diagonal_error(weight, fmt, moment)
    found, errors = [], []
    for importance in (None, diagonal.clamp_min(0.0)):
        scales = encode(wide, fmt, importance=importance).scales
        difference = to_tiles(rounded_to_nearest(wide, fmt, scales).sub_(wide), fmt.granularity)
        found.append(scales)
        errors.append(float(measure(slice(0, len(difference)), difference).sum(dtype=torch.float64)))
    return RangeChoice(low, high, errors[0], min(errors), found=found[errors[1] < errors[0]])


@dataclass(frozen=True)
class _Range:
    """A range for each of some tiles, [tiles, 1] or a number; `factor` times that of round-to-nearest."""

    low: Tensor
    high: Tensor
    factor: Tensor | float = 1.0


class _Best:
    """The best range of each of some tiles so far.

    Attributes:
        low, high, factor, negative: [tiles, 1].
        error, plain: the objective under it, and under the range of round-to-nearest.
    """

    def __init__(self, low: Tensor, high: Tensor) -> None:
        self.plain_range = _Range(low, high)
        self.low, self.high, self.factor = low, high, torch.ones_like(low)
        self.negative = torch.zeros_like(low, dtype=torch.bool)
        self.error = self.plain = torch.full_like(low, torch.inf)

    def compare(self, candidate: _Range, error: Tensor, negative: Tensor | None) -> None:
        """Take what is better."""
        better = error < self.error
        self.low = torch.where(better, candidate.low, self.low)
        self.high = torch.where(better, candidate.high, self.high)
        self.factor = torch.where(better, candidate.factor, self.factor)
        if negative is not None:
            self.negative = torch.where(better, negative, self.negative)
        self.error = torch.minimum(error, self.error)


@dataclass(frozen=True)
class _Tried:
    """Which ranges are tried; see `weighted_range`."""

    fmt: Format
    factors: Sequence[float]
    finer: Sequence[float]
    outer: Tensor | None
    sweep: bool

    def ranges(self, best: _Best) -> Iterator[_Range]:
        """The range of round-to-nearest, then others; later ones may depend on which was the best before."""
        plain = best.plain_range
        yield plain
        if self.sweep:
            assert self.outer is not None
            yield from (_Range(low, high) for low, high in e4m3_ranges(self.fmt, plain.high, self.outer))
            return
        free = isinstance(self.fmt.scale, FloatScale)
        for factor in self.factors if free else _POWERS:
            yield _Range(plain.low * factor, plain.high * factor, factor)
        for distance in self.finer if free else ():
            middle, ends = best.factor, (min([1.0, *self.factors]), max([1.0, *self.factors]))
            for near in ((middle - distance).clamp(*ends), (middle + distance).clamp(*ends)):
                yield _Range(plain.low * near, plain.high * near, near)


def leans_up(tiles: Tensor) -> Tensor:
    """Whether the largest magnitude of each tile is that of a positive number, bool [tiles, 1]."""
    low, high = tiles.aminmax(dim=1, keepdim=True)
    return high > -low


def _sides(tiles: Tensor, fmt: Format) -> list[tuple[Tensor, Tensor | None]]:
    """Tiles as they look under scales of the sign that is tried, [tiles, elements], and which scales are negative.

    The code without a counterpart is worth most to the largest number of a tile. Under 4 bits, either sign is tried:
    there the better one may be the other.
    """
    if fmt.element.bits < _SIGN_KNOWN:
        return [
            (tiles, torch.zeros_like(tiles[:, :1], dtype=torch.bool)),
            (-tiles, torch.ones_like(tiles[:, :1], dtype=torch.bool)),
        ]
    negative = leans_up(tiles)
    return [(torch.where(negative, -tiles, tiles), negative)]


def _error(tiles: Tensor, fmt: Format, scale: TileScale, measure: Callable[[Tensor], Tensor]) -> Tensor:
    """The error of each tile under `scale`."""
    if fmt.zero_point != "none" or scale.outer is not None or not float32.supports(fmt):
        return measure(quick_tile_values(tiles, fmt, scale).sub_(tiles))
    # In units of the scale: what is measured is quadratic.
    unit = multiplier(fmt, scale).float()
    quotient = tiles / unit
    return measure(float32.nearest(fmt.element, quotient).sub_(quotient)).mul_(unit.square())


def _pieces(tiles: Tensor, rows: int) -> Iterator[slice]:
    """Whole rows of the weight at once, few enough to stay in a core's cache while all candidates are tried."""
    count = tiles.shape[0]
    per_row = count // rows if rows and count % rows == 0 else 1
    step = max(1, PIECE // max(1, tiles.shape[1] * per_row)) * per_row
    for start in range(0, count, step):
        yield slice(start, start + step)


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


def _block_error(blocks: Tensor) -> Measure:
    """The same with the whole block of G that belongs to a group of columns."""
    groups, size = blocks.shape[:2]

    def measure(_: slice, difference: Tensor) -> Tensor:
        d = difference.reshape(-1, groups, size).transpose(0, 1)
        product = torch.bmm(d, blocks)
        error: Tensor = torch.linalg.vecdot(product, d)
        return error.clamp_min(0.0).T.reshape(-1, 1)

    return measure


# ---- at a site ------------------------------------------------------------------------------------------------------


def weighings(site: SiteWork, *, block: bool = True) -> dict[Format, Tensor]:
    """What errors are weighed with, by the format of layers."""
    return {fmt: weighing_of(site.statistics, fmt, block=block) for fmt in {layer.format for layer in site.layers}}


def take_ranges(site: SiteWork, layer: Layer, algorithm: str, weighing: Tensor, choice: RangeChoice) -> None:
    """Give a layer the ranges that a search found."""
    objective = "error weighed by G's " + ("blocks" if weighing.dim() == 3 else "diagonal")
    site.note(layer, Outcome(algorithm, objective, choice.before, choice.after))
    if choice.turned is None and choice.found is None:
        site.set_range(layer, choice.low, choice.high)
    else:
        site.set_scales(layer, choice.scales(layer.format))


def searched_scales(site: SiteWork, layer: Layer, steps: int, *, signed: bool, target: Tensor | None = None) -> Scales:
    """The scales of least error under G's diagonal.

    Args:
        site, layer: the layer, and the site that it reads.
        steps: how many ranges are tried.
        signed: whether scales may be negative, where that can be better.
        target: for this in place of the layer's weight.
    """
    fmt, amax = layer.format, site.amax_behind(layer.format)
    weighing = weighing_of(site.statistics, fmt, block=False)
    weight = layer.matrix() if target is None else target
    turn = signed and can_turn(fmt)
    choice = weighted_range(weight, fmt, weighing, range_factors(fmt, steps), global_amax=amax, turn=turn)
    site.state(layer).searched()
    return choice.scales(fmt, amax)
