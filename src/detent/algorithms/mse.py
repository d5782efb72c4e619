"""`mse`: for each tile the range whose format reproduces the weights with the least squared error.

Objective: ``sum (w - Q(w; k * range))^2`` over each tile, minimised over a list of factors k. The plain range (k = 1)
is always among the candidates and wins ties, so no tile is ever worse than plain rounding.

With the sweep, for formats that keep E4M3 scales under an outer scale, the candidates are instead all 126 positive
finite E4M3 scales (ModelOpt's ``fp8_scale_sweep``).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from detent.algorithms.max import weight_range
from detent.errors import DetentError
from detent.formats import E4M3, FloatScale, Format
from detent.formats.granularity import to_tiles
from detent.formats.tiles import scale_from_range, simulate

#: Elements worked on at once, so that float64 intermediates of a large weight stay small.
_PIECE = 1 << 22


def multipliers(step_size: float = 0.1, start: float = 0.25, stop: float = 4.0) -> list[float]:
    """The factors tried on a range: from `start` to `stop`, about `step_size` apart, both ends included."""
    if not (step_size > 0 and 0 < start <= stop):
        raise DetentError(f"mse: needs 0 < start <= stop and step_size > 0, not {start}, {stop}, {step_size}")
    count = int((stop - start) / step_size + 1e-9) + 2 if stop > start else 1
    return [float(k) for k in torch.linspace(start, stop, count, dtype=torch.float64)]


def least_error_range(
    weight: Tensor,
    fmt: Format,
    factors: Iterable[float],
    *,
    fp8_scale_sweep: bool = False,
    global_amax: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(low, high) of each tile, float32 in the shape of the scales.

    Args:
        weight: float tensor of any shape.
        fmt: a static format with a float scale.
        factors: what the plain range is multiplied with, 1 being tried in any case.
        fp8_scale_sweep: try every E4M3 scale instead of `factors`; for formats with an E4M3 scale under an outer one.
        global_amax: the largest magnitude behind the outer scale, by default that of `weight`.

    Raises:
        DetentError: the format has no float scale, or the sweep is asked of one without E4M3 scales.
    """
    rule = fmt.scale
    if not isinstance(rule, FloatScale):
        raise DetentError(f"mse: {fmt} has no scale to search; its scale follows from the largest magnitude")
    if fp8_scale_sweep and not (rule.outer and rule.dtype == "e4m3"):
        raise DetentError(f"mse: fp8_scale_sweep needs E4M3 scales under an outer scale, not {fmt}")
    low, high = weight_range(weight, fmt)
    outer = None
    if rule.outer:
        amax = weight.detach().abs().amax() if global_amax is None else global_amax
        outer = rule.outer_scale(amax, fmt.element)
    tiles = to_tiles(weight.detach(), fmt.granularity, repeat_edge=fmt.zero_point == "float")
    rows = max(1, _PIECE // max(1, tiles.shape[1]))
    best = [
        _search(tiles[i : i + rows], fmt, lo, hi, factors, outer, fp8_scale_sweep)
        for i, lo, hi in _pieces(low.reshape(-1, 1), high.reshape(-1, 1), rows)
    ]
    return torch.cat([b[0] for b in best]).reshape(low.shape), torch.cat([b[1] for b in best]).reshape(high.shape)


def _pieces(low: Tensor, high: Tensor, rows: int) -> Iterable[tuple[int, Tensor, Tensor]]:
    for i in range(0, low.shape[0], rows):
        yield i, low[i : i + rows], high[i : i + rows]


def _search(
    tiles: Tensor,
    fmt: Format,
    low: Tensor,
    high: Tensor,
    factors: Iterable[float],
    outer: Tensor | None,
    sweep: bool,
) -> tuple[Tensor, Tensor]:
    def error(lo: Tensor, hi: Tensor) -> Tensor:
        difference = simulate(tiles, fmt, scale_from_range(fmt, lo, hi, outer)) - tiles.float()
        return (difference.double() ** 2).sum(1, keepdim=True)

    if sweep:
        assert outer is not None
        amaxes = [s * fmt.element.maximum * outer for s in E4M3.values()[1:127]]
        candidates = [(-torch.ones_like(low) * a, torch.ones_like(high) * a) for a in amaxes]
    else:
        candidates = [(low * k, high * k) for k in factors]
    best_low, best_high, least = low, high, error(low, high)
    for lo, hi in candidates:
        e = error(lo, hi)
        better = e < least
        best_low, best_high = torch.where(better, lo, best_low), torch.where(better, hi, best_high)
        least = torch.minimum(least, e)
    return best_low, best_high
