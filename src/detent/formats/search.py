"""The scales of least squared error: what `SearchedScale` formats encode with.

Minimised for each tile: ``sum_i w_i (x_i - s q_i)^2``, or with a stored minimum ``sum_i w_i (x_i - s q_i - m)^2``, over
codes q, scales s and minimums m that can be stored; w is the importance of the columns, or 1. For given codes the best
scale (and minimum) is a weighted least-squares fit, and for given scales the best codes are the nearest ones. So codes
are tried that belong to a range of scales around the one that takes the largest number to the last code, each is
fitted, the best kept, and codes and scale then chosen in turns, each time given the other.

In a super-block the fitted scales s_j are themselves numbers to be rounded: to integers times one float16, with the
curvature of tile j's error (``sum w q^2``) as their weight; the same for minimums. Codes, integers and float16 numbers
are then improved in turns as before.

Tiles lie side by side ([elements, tiles]): what belongs to a tile is a row there, and sums over a tile are sums of
rows, in a fixed order wherever a tile lies. So equal tiles get equal scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from detent.errors import DetentError
from detent.formats import float32
from detent.formats.elements import Integer
from detent.formats.format import Format
from detent.formats.kernels import SHARED_PIECE, Piece, share
from detent.formats.scales import SearchedScale

#: Elements searched at once by the only thread: about eight copies of them are in memory.
_PIECE = 1 << 17
#: Columns that PyTorch's sum over rows takes together, at most.
_LANES = 64
#: Numbers beyond what any code of a float16 scale can mean, and below what makes a difference to one.
_MOST, _LEAST = 1e9, 1e-24
_LARGEST = torch.finfo(torch.float16).max
#: How often codes and the scales of a super-block are chosen in turns, at the end; without minimums, one time less.
_TURNS = 2


def search_scales(
    x: Tensor, fmt: Format, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(scale, zero point, outer scale) of `x` as they are stored.

    Args:
        x: float [..., n], finite.
        fmt: a format with a `SearchedScale`.
        importance: float [n], not negative: what squared errors in each column are weighed with; by default all alike.

    Raises:
        DetentError: an importance of another shape, negative or not finite.
    """
    rule = fmt.scale
    assert isinstance(rule, SearchedScale)
    length, tiles, width = fmt.granularity.group_size or 1, max(1, rule.tiles), x.shape[-1] if x.dim() else 1
    grid, minimum = fmt.granularity.grid(tuple(x.shape)), int(fmt.zero_point == "minimum")
    if not x.numel():
        one, shared = torch.zeros(grid, dtype=rule.stored_dtype, device=x.device), None
        if rule.tiles:
            shape = (*rule.blocks(grid), 2) if minimum else rule.blocks(grid)
            shared = torch.zeros(shape, dtype=torch.float16, device=x.device)
        return one, one if minimum else None, shared
    rows = x.detach().reshape(-1, width)
    weights = None if importance is None else _weights(importance, width).to(x.device)
    short = -width % (length * tiles)
    if short:  # what is padded counts nothing, and is no new extreme
        weights = torch.ones(width, device=x.device) if weights is None else weights
        weights = torch.nn.functional.pad(weights, (0, short))
        rows = torch.cat([rows, rows[:, -1:].expand(-1, short)], 1)
    blocks = rows.reshape(-1, tiles, length)
    weighing = None if weights is None else weights.view(-1, tiles, length)
    search = _affine_scales if minimum else _symmetric_scales
    out = [blocks.new_empty(len(blocks), n, dtype=torch.float32) for n in (tiles, tiles, 1, 1)]
    found = [*out[: 1 + minimum], *(out[2 : 3 + minimum] if rule.tiles else ())]

    most = _PIECE if torch.get_num_threads() == 1 or x.is_cuda else SHARED_PIECE
    step = max(1, most // (_LANES * length * tiles)) * _LANES

    def work(pieces: list[Piece]) -> None:
        room = torch.empty(5, step * tiles * length, dtype=torch.float32, device=x.device)
        for piece, _ in pieces:
            own = None
            if weighing is not None:
                own = weighing[torch.arange(piece.start, piece.stop, device=x.device) % len(weighing)]
                own = _side_by_side(own, room[0])
            parts = search(_side_by_side(blocks[piece], room[1]).clamp_(-_MOST, _MOST), own, fmt, rule, room[2:])
            for whole, part in zip(found, parts, strict=True):
                whole[piece] = part.view(whole.shape[1], -1)[:, : piece.stop - piece.start].T

    starts = range(0, len(blocks), step)
    share([(slice(start, min(start + step, len(blocks))), slice(None)) for start in starts], work)
    return _stored(fmt, rule, found, grid)


def _weights(importance: Tensor, width: int) -> Tensor:
    """Importance with a mean of 1 and no zeros: a tile that nobody needs is then searched as if nothing were known."""
    if importance.shape != (width,):
        raise DetentError(f"importance: one number for each of {width} columns, not {tuple(importance.shape)}")
    weights = importance.detach().to(torch.float32)
    if width and not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise DetentError("importance: numbers that are finite and not negative")
    mean = weights.mean()
    return weights / torch.where(mean > 0, mean, 1.0) + 1e-6


def _side_by_side(blocks: Tensor, room: Tensor) -> Tensor:
    """Blocks [n, tiles, elements] as float32 [elements, tiles, n] in the memory of `room`, n rounded up to a multiple
    of `_LANES`: then every sum over the first axis is made in one order, whatever is next to it."""
    count, tiles, length = blocks.shape
    rows = blocks.reshape(count, -1).to(torch.float32)
    if count % _LANES:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, -count % _LANES))
    columns = room[: rows.numel()].view(tiles * length, -1).copy_(rows.t())
    return columns.view(tiles, length, -1).transpose(0, 1)


def _like(x: Tensor, room: Tensor | None) -> Tensor:
    """Memory laid out alike: that of `room`, as fresh memory costs more than the arithmetic, or new."""
    if room is None:
        return torch.empty_like(x)
    length, tiles, count = x.shape
    return room[: x.numel()].view(tiles, length, count).transpose(0, 1)


def _stored(
    fmt: Format, rule: SearchedScale, found: list[Tensor], grid: tuple[int, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What searches found, [blocks, tiles or 1], in the shapes and dtypes of `Scales`."""
    minimum = fmt.zero_point == "minimum"
    per_row = rule.blocks(grid)[-1] if rule.tiles else grid[-1]
    tiles = [
        part.to(rule.stored_dtype).view(-1, per_row * max(1, rule.tiles))[:, : grid[-1]].reshape(grid)
        for part in found[: 1 + minimum]
    ]
    shared = None
    if rule.tiles:
        shared = torch.cat(found[1 + minimum :], 1).to(torch.float16)
        shared = shared.view(*rule.blocks(grid), 2) if minimum else shared.view(rule.blocks(grid))
    return tiles[0], tiles[1] if minimum else None, shared


# ---- without minimums ------------------------------------------------------------------------------------------------

T = TypeVar("T")
#: From numbers to the nearest of a grid, in place.
Nearest = Callable[[Tensor], Tensor]


class _Grid(NamedTuple):
    """The values of codes as a search sees them.

    Attributes:
        nearest: see `Nearest`.
        top: the value that the largest magnitude of a tile is taken to: the end that is further from zero.
        either: whether the other end is nearer, so that the sign of the scale matters.
        factors: what `top` is multiplied with to make candidates.
    """

    nearest: Nearest
    top: float
    either: bool
    factors: tuple[float, ...]


def _rounding(low: float, high: float) -> Nearest:
    return lambda v: v.round_().clamp_(low, high)


def _grid_of(fmt: Format, weighted: bool) -> _Grid:
    element = fmt.element
    low, high = element.minimum, element.maximum
    nearest = _rounding(low, high) if isinstance(element, Integer) else partial(float32.nearest, element, over=True)
    return _Grid(nearest, low, low != -high, _nearest_of(_FACTORS, element.bits)[weighted])


#: Factors by the bits of codes, for plain and for weighted errors: those that together come nearest to the best of a
#: fine grid, on normal and heavy-tailed numbers. Weights call for wider ones: the largest number may count little.
_FACTORS: dict[int, tuple[tuple[float, ...], tuple[float, ...]]] = {
    1: ((1.0,), (1.0,)),
    2: ((2.0, 2.6, 1.5, 1.0), (2.0, 2.6, 1.5, 1.0)),
    3: ((1.05, 0.8, 1.16, 0.95), (1.06, 1.37, 0.81, 1.74, 0.96, 1.19)),
    4: ((1.03, 1.08, 0.9, 0.98), (1.03, 1.2, 0.9, 1.4, 0.98, 1.1, 0.8)),
    5: ((1.01, 0.94, 0.99, 1.03), (1.01, 0.94, 1.08, 1.2, 0.88, 0.99, 1.4)),
    6: ((1.0, 0.97, 0.93), (1.0, 0.97, 0.94, 0.9)),
    8: ((1.0,), (1.0, 0.97)),
}
#: The same of ranges: shares that are cut off (below zero: added) at the lower and the upper end, by the largest code.
_ENDS: dict[int, tuple[list[tuple[float, float]], list[tuple[float, float]]]] = {
    3: (
        [(0.1, 0.1), (0.16, 0.0), (0.02, 0.16), (0.12, 0.04)],
        [(0.12, 0.12), (0.24, 0.04), (0.04, 0.24), (0.04, 0.0), (-0.04, 0.14), (0.2, 0.24)],
    ),
    15: (
        [(0.02, 0.02), (0.0, 0.04), (0.03, 0.0), (0.0, 0.0)],
        [(0.02, 0.02), (0.06, 0.0), (0.0, 0.04), (0.02, 0.0), (0.02, 0.1), (0.12, 0.02), (-0.04, 0.02)],
    ),
    31: (
        [(0.0, 0.0), (0.0, -0.03), (0.0, 0.015), (0.015, 0.0)],
        [(0.0, 0.0), (0.0, -0.03), (0.03, 0.0), (-0.03, -0.03), (0.0, 0.015), (0.0, 0.045), (0.06, 0.0)],
    ),
}


class _Fit:
    """Numbers [L, ...] and their codes' values under candidates; scales of least error."""

    def __init__(self, x: Tensor, w: Tensor | None, room: Tensor | None = None) -> None:
        self.x, self.w = x, w
        self.q, self.product, weighted = (_like(x, None if room is None else room[i]) for i in range(3))
        self.weighted = x if w is None else torch.mul(x, w, out=weighted)

    def sums(self) -> tuple[Tensor, Tensor]:
        """(sum w x q, sum w q^2)."""
        along = torch.mul(self.q, self.weighted, out=self.product).sum(0)
        torch.mul(self.q, self.q, out=self.product)
        return along, (self.product if self.w is None else self.product.mul_(self.w)).sum(0)

    def best(self, grid: _Grid) -> tuple[Tensor, Tensor]:
        """`sums` of the best candidate of each tile."""
        high, low = self.x.amax(0), self.x.amin(0)
        largest = torch.where(high > -low, high, low) if grid.either else torch.maximum(high, -low)
        rate = _over(torch.full_like(largest, grid.top), largest)
        best: list[Tensor] = []
        for factor in grid.factors:
            grid.nearest(torch.mul(self.x, rate * factor, out=self.q))
            along, square = self.sums()
            gain = along * along / square.clamp_min(_LEAST)
            best = _better(best, [gain, along, square])
        return best[1], best[2]

    def under(self, unit: Tensor, grid: _Grid) -> tuple[Tensor, Tensor]:
        """`sums` for the codes nearest under scales."""
        grid.nearest(torch.mul(self.x, _over(torch.ones_like(unit), unit), out=self.q))
        return self.sums()


def _better(best: list[Tensor], found: list[Tensor]) -> list[Tensor]:
    """For each tile the list whose first number is larger; the one before wins ties."""
    if not best:
        return found
    better = found[0] > best[0]
    return [torch.where(better, new, old) for new, old in zip(found, best, strict=True)]


def _nearest_of(table: dict[int, T], key: int) -> T:
    return table[min(table, key=lambda known: abs(known - key))]


def _over(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b is 0 or so small that nothing is lost."""
    return torch.where(b.abs() > _LEAST, a / b, 0.0)


def _half(x: Tensor) -> Tensor:
    return x.clamp(-_LARGEST, _LARGEST).to(torch.float16).to(torch.float32)


def _kept(x: Tensor, rule: SearchedScale) -> Tensor:
    """A scale without super-blocks as it is stored."""
    most = torch.finfo(rule.stored_dtype).max
    return x.clamp(-most, most).to(rule.stored_dtype).to(torch.float32)


def _symmetric_scales(x: Tensor, w: Tensor | None, fmt: Format, rule: SearchedScale, room: Tensor) -> Iterator[Tensor]:
    grid, fit = _grid_of(fmt, w is not None), _Fit(x, w, room)
    along, square = fit.best(grid)
    if not rule.tiles:
        yield _kept(_over(*fit.under(_over(along, square), grid)), rule)
        return
    integers = _integers(rule)
    shared = _shared_scale(_over(along, square), square, integers)
    for _ in range(_TURNS - 1):
        codes = integers.nearest(_over(_over(along, square), shared.expand_as(along)))
        along, square = fit.under(codes * shared, grid)
        codes = integers.nearest(_over(_over(along, square), shared.expand_as(along)))
        shared = _half(_over((codes * along).sum(0), (codes * codes * square).sum(0)))
    yield integers.nearest(_over(_over(along, square), shared.expand_as(along)))
    yield shared


def _shared_scale(scales: Tensor, curvature: Tensor, integers: _Grid) -> Tensor:
    """The float16 number that scales are best rounded to integer multiples of."""
    return _half(_over(*_Fit(scales, curvature).best(integers)))


def _integers(rule: SearchedScale) -> _Grid:
    low, high = rule.limits
    top = low if rule.signed else high
    count = 8
    return _Grid(
        _rounding(low, high),
        top,
        rule.signed,
        tuple(1 + 0.9 / abs(top) * (2 * i / count - 1) for i in range(count + 1)),
    )


# ---- with minimums ---------------------------------------------------------------------------------------------------


class _AffineFit:
    """The same with minimums; they are at most 0 in super-blocks."""

    def __init__(self, x: Tensor, w: Tensor | None, fmt: Format, signed: bool, room: Tensor) -> None:
        self.x, self.w, self.signed = x, w, signed
        self.top = fmt.element.maximum
        self.nearest = _rounding(0.0, self.top)
        self.q, self.product, weighted = (_like(x, room[i]) for i in range(3))
        self.weighted = x if w is None else torch.mul(x, w, out=weighted)
        self.sw = torch.full_like(x[0], float(len(x))) if w is None else w.sum(0)
        self.sx = self.weighted.sum(0)

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """(sum w q, sum w q^2, sum w q x)."""
        along = torch.mul(self.q, self.weighted, out=self.product).sum(0)
        if self.w is None:
            return self.q.sum(0), torch.mul(self.q, self.q, out=self.product).sum(0), along
        torch.mul(self.q, self.w, out=self.product)
        return self.product.sum(0), self.q.mul_(self.product).sum(0), along

    def fitted(self, sq: Tensor, sqq: Tensor, sqx: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, minimum) of least error."""
        scale = _over(self.sw * sqx - sq * self.sx, self.sw * sqq - sq * sq)
        minimum = _over(self.sx - scale * sq, self.sw)
        if self.signed:
            return scale, minimum
        above = minimum > 0
        return torch.where(above, _over(sqx, sqq), scale), minimum.clamp_max(0.0)

    def under(self, scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`sums` for the codes nearest under scales and minimums."""
        torch.sub(self.x, minimum, out=self.q).mul_(_over(torch.ones_like(scale), scale))
        self.nearest(self.q)
        return self.sums()

    def best(self) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        high, low = self.x.amax(0), self.x.amin(0)
        if not self.signed:
            low = low.clamp_max(0.0)
        width = high - low
        ends = _nearest_of(_ENDS, int(self.top))[self.w is not None]
        best: list[Tensor] = []
        for down, up in ends:
            sq, sqq, sqx = self.under(width * ((1 - down - up) / self.top), low + down * width)
            scale, minimum = self.fitted(sq, sqq, sqx)
            gain = scale * (2 * sqx - scale * sqq) + minimum * (2 * (self.sx - scale * sq) - minimum * self.sw)
            best = _better(best, [gain, scale, minimum, sq, sqq, sqx])
        _, scale, minimum, sq, sqq, sqx = best
        return scale, minimum, (sq, sqq, sqx)


def _affine_scales(x: Tensor, w: Tensor | None, fmt: Format, rule: SearchedScale, room: Tensor) -> Iterator[Tensor]:
    fit = _AffineFit(x, w, fmt, signed=not rule.tiles, room=room)
    scale, minimum, sums = fit.best()
    if not rule.tiles:
        scale, minimum = fit.fitted(*fit.under(scale, minimum))
        yield _kept(scale, rule)
        yield _kept(minimum, rule)
        return
    integers = _integers(rule)
    sq, sqq, _ = sums
    curvature = torch.where(minimum < 0, sqq - _over(sq * sq, fit.sw), sqq)  # with minimums that follow, if they can
    d = _shared_scale(scale, curvature.clamp_min_(0.0), integers)
    m = _shared_scale(-minimum, fit.sw, integers)
    for turn in range(_TURNS + 1):
        codes, lows = _rounded(scale, sums, d, m, integers, fit)
        if turn == _TURNS:
            break
        sums = fit.under(codes * d, -(lows * m))
        codes, lows = _rounded(fit.fitted(*sums)[0], sums, d, m, integers, fit)
        d, m = _shared(codes, lows, sums, fit, d, m)
        scale = codes * d
    yield codes
    yield lows
    yield d
    yield m


def _rounded(
    scale: Tensor, sums: tuple[Tensor, Tensor, Tensor], d: Tensor, m: Tensor, integers: _Grid, fit: _AffineFit
) -> tuple[Tensor, Tensor]:
    """Integers for scales and minimums: the scales rounded, minimums that suit these, and scales that suit those."""
    sq, sqq, sqx = sums
    codes = integers.nearest(_over(scale, d.expand_as(scale)))
    lows = integers.nearest(_over(_over(codes * d * sq - fit.sx, fit.sw), m.expand_as(scale)))
    return integers.nearest(_over(_over(sqx + lows * m * sq, sqq), d.expand_as(scale))), lows


def _shared(
    codes: Tensor, lows: Tensor, sums: tuple[Tensor, Tensor, Tensor], fit: _AffineFit, d: Tensor, m: Tensor
) -> tuple[Tensor, Tensor]:
    """The two float16 numbers of least error of each super-block, for given codes and integers; `d` and `m` where the
    two equations for them say the same."""
    sq, sqq, sqx = sums
    a, b, c = ((p * s).sum(0) for p, s in ((codes * codes, sqq), (codes * lows, sq), (lows * lows, fit.sw)))
    e, f = (codes * sqx).sum(0), (lows * fit.sx).sum(0)
    det = a * c - b * b
    same = det <= 1e-6 * a * c
    d = torch.where(same, d, _over(e * c - b * f, det))
    m = torch.where(same, m, _over(b * e - a * f, det))
    return _half(d.clamp_min(0.0)), _half(m.clamp_min(0.0))
