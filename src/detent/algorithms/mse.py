"""`mse`: for each tile the range whose format reproduces the weights with the least squared error.

Objective: ``sum (w - Q(w; k * range))^2`` over each tile, minimised over a list of factors k. Round-to-nearest (k = 1)
is always among the candidates and wins ties, so no tile is ever worse than under round-to-nearest (RTN).

With the sweep, for formats that keep E4M3 scales under an outer scale, the candidates are instead all 126 positive
finite E4M3 scales (ModelOpt's ``fp8_scale_sweep``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from detent.algorithms.max import weight_range
from detent.algorithms.registry import Handler, LayerFacts, register
from detent.config.algorithm import MseCalibConfig
from detent.errors import DetentError
from detent.formats import E4M3, FloatScale, Format
from detent.formats.granularity import to_tiles
from detent.formats.tiles import scale_from_range, simulate

#: Elements worked on at once, so that float64 intermediates of a large weight stay small.
_PIECE = 1 << 22


def multipliers(step_size: float = 0.1, start: float = 0.25, stop: float = 4.0) -> list[float]:
    """The factors tried on a range: evenly spaced from `start` to `stop`, both included, at most `step_size` apart.

    ``linspace(start, stop, ceil((stop - start) / step_size) + 1)``: 39 factors by default, 1 and 1.5 for a step of 0.5.
    """
    if not (step_size > 0 and 0 < start <= stop):
        raise DetentError(f"mse: needs 0 < start <= stop and step_size > 0, not {start}, {stop}, {step_size}")
    count = math.ceil((stop - start) / step_size - 1e-9) + 1
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
        factors: what the range of round-to-nearest is multiplied by; 1 is always tried.
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
    search = _Search(fmt, tuple(factors), outer, fp8_scale_sweep)
    tiles = to_tiles(weight.detach(), fmt.granularity, repeat_edge=fmt.zero_point == "float")
    # Where the last blocks are short, only elements that exist count.
    whole = tiles.numel() == weight.numel()
    exists = None if whole else to_tiles(torch.ones_like(weight, dtype=torch.float64), fmt.granularity)
    best = [
        search.best(tiles[rows], None if exists is None else exists[rows], lo, hi)
        for rows, lo, hi in pieces(tiles, low.reshape(-1, 1), high.reshape(-1, 1))
    ]
    if not best:
        return low, high
    return torch.cat([b[0] for b in best]).reshape(low.shape), torch.cat([b[1] for b in best]).reshape(high.shape)


def pieces(tiles: Tensor, low: Tensor, high: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(which tiles, their low, their high), as many at once as keep float64 intermediates small."""
    count = max(1, _PIECE // max(1, tiles.shape[1]))
    for i in range(0, tiles.shape[0], count):
        yield slice(i, i + count), low[i : i + count], high[i : i + count]


def e4m3_ranges(fmt: Format, high: Tensor, outer: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The (low, high) that each positive finite E4M3 scale under an outer one gives, in the shape of `high`."""
    for scale in E4M3.values()[1:127]:
        amax = (scale * fmt.element.maximum * outer).expand_as(high)
        yield -amax, amax


@dataclass(frozen=True)
class _Search:
    """What is tried on every tile."""

    fmt: Format
    factors: tuple[float, ...]
    outer: Tensor | None
    sweep: bool

    def best(self, tiles: Tensor, exists: Tensor | None, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The (low, high) with the least error for each tile; the given ones where nothing is better."""
        best_low, best_high, least = low, high, self._error(tiles, exists, low, high)
        for lo, hi in self._candidates(low, high):
            error = self._error(tiles, exists, lo, hi)
            better = error < least
            best_low, best_high = torch.where(better, lo, best_low), torch.where(better, hi, best_high)
            least = torch.minimum(least, error)
        return best_low, best_high

    def _candidates(self, low: Tensor, high: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.sweep:
            return ((low * k, high * k) for k in self.factors)
        assert self.outer is not None
        return e4m3_ranges(self.fmt, high, self.outer)

    def _error(self, tiles: Tensor, exists: Tensor | None, low: Tensor, high: Tensor) -> Tensor:
        values = simulate(tiles, self.fmt, scale_from_range(self.fmt, low, high, self.outer))
        squares = (values.double() - tiles.double()) ** 2
        return (squares if exists is None else squares * exists).sum(1, keepdim=True)


@register(MseCalibConfig)
class MseHandler(Handler[MseCalibConfig]):
    """The range of least squared error of each weight."""

    scope = "weight"

    def refusal(self, step: MseCalibConfig, layer: LayerFacts) -> str | None:
        rule = layer.weight.scale if layer.weight is not None else None
        if step.fp8_scale_sweep and isinstance(rule, FloatScale) and rule.outer and rule.dtype != "e4m3":
            return f"fp8_scale_sweep needs E4M3 scales under an outer scale, not {layer.weight}"
        return None

    def range_of(self, step: MseCalibConfig, weight: Tensor, fmt: Format) -> tuple[Tensor, Tensor] | None:
        factors = multipliers(step.step_size, step.start_multiplier, step.stop_multiplier)
        sweep = step.fp8_scale_sweep and isinstance(fmt.scale, FloatScale) and fmt.scale.outer
        return least_error_range(weight, fmt, factors, fp8_scale_sweep=sweep)
