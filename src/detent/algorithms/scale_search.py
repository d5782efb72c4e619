"""Scale search under the second moment: for each tile the range that changes the layer's outputs least.

Two approximations of ``tr(D G D^T)``, D = W - Q(W): its diagonal (``sum_j G_jj D_ij^2``, exact where channels are
uncorrelated), and its block diagonal over the tile's own columns (``local_hessian``), which keeps the correlations
inside a tile. Either splits into tiles, so every tile is searched by itself and all at once. The plain range is among
the candidates and wins ties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from detent.algorithms.max import weight_range
from detent.algorithms.mse import e4m3_ranges
from detent.algorithms.objective import quick_tile_values, tile_values
from detent.errors import DetentError
from detent.formats import FloatScale, Format
from detent.formats.granularity import to_tiles
from detent.formats.tiles import scale_from_range

#: What a range is multiplied with, where scales are powers of two: other factors round to one of these.
_POWERS = (0.25, 0.5, 2.0)
#: Elements that all candidates are tried on before the next ones.
_PIECE = 1 << 17


@dataclass(frozen=True)
class RangeChoice:
    """Attributes: low, high: float32 in the shape of the scales. before, after: the objective, summed over all tiles,
    of the plain range and of this one."""

    low: Tensor
    high: Tensor
    before: float
    after: float


def weighted_range(
    weight: Tensor,
    fmt: Format,
    moment: Tensor,
    factors: Iterable[float],
    *,
    block: bool = False,
    fp8_scale_sweep: bool = False,
    global_amax: Tensor | None = None,
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
    for piece in _pieces(tiles, weight.shape[0]):
        part, plain_lo, plain_hi = tiles[piece], lo[piece], hi[piece]
        plain = least = measure(tile_values(part, fmt, scale_from_range(fmt, plain_lo, plain_hi, outer)) - part, piece)
        for new_lo, new_hi in _candidates(fmt, plain_lo, plain_hi, factors, outer, fp8_scale_sweep):
            error = measure(
                quick_tile_values(part, fmt, scale_from_range(fmt, new_lo, new_hi, outer)).sub_(part), piece
            )
            better = error < least
            best_lo[piece] = torch.where(better, new_lo, best_lo[piece])
            best_hi[piece] = torch.where(better, new_hi, best_hi[piece])
            least = torch.minimum(least, error)
        total += float(plain.sum(dtype=torch.float64))
        reached += float(least.sum(dtype=torch.float64))
    return RangeChoice(best_lo.reshape(low.shape), best_hi.reshape(high.shape), total, reached)


def _pieces(tiles: Tensor, rows: int) -> Iterator[slice]:
    """Whole rows of the weight at once, few enough to stay in a core's cache while all candidates are tried."""
    count = tiles.shape[0]
    per_row = count // rows if rows and count % rows == 0 else 1
    step = max(1, _PIECE // max(1, tiles.shape[1] * per_row)) * per_row
    for start in range(0, count, step):
        yield slice(start, start + step)


def _candidates(
    fmt: Format, low: Tensor, high: Tensor, factors: Iterable[float], outer: Tensor | None, sweep: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    if sweep:
        assert outer is not None
        yield from e4m3_ranges(fmt, high, outer)
        return
    for k in factors if isinstance(fmt.scale, FloatScale) else _POWERS:
        yield low * k, high * k


#: From the difference of some tiles, and which they are, to the error of each, [tiles, 1].
Measure = Callable[[Tensor, slice], Tensor]


def _diagonal_error(weight: Tensor, fmt: Format, diagonal: Tensor) -> Measure:
    """Squared differences weighed by G's diagonal."""
    expanded = to_tiles(diagonal.clamp_min(0).float().expand_as(weight), fmt.granularity)
    return lambda difference, piece: torch.linalg.vecdot(difference.square_(), expanded[piece]).unsqueeze(1)


def _block_error(weight: Tensor, moment: Tensor, size: int) -> Measure:
    """The same with the whole block of G that belongs to a group of columns; a short last group counts as padded."""
    width = weight.shape[1]
    groups = -(-width // size)
    padded = torch.zeros(groups * size, groups * size, dtype=torch.float32, device=moment.device)
    padded[:width, :width] = moment
    blocks = torch.stack([padded[i : i + size, i : i + size] for i in range(0, groups * size, size)])

    def measure(difference: Tensor, piece: slice) -> Tensor:
        d = difference.reshape(-1, groups, size).transpose(0, 1)
        product = torch.bmm(d, blocks)
        return torch.linalg.vecdot(product, d).clamp_min(0.0).T.reshape(-1, 1)

    return measure
