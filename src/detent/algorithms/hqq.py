"""`hqq`: ranges from the weights alone, chosen so that few weights are far off (half-quadratic quantization, Badri and
Shaji 2023, mobiusml.github.io/hqq_blog).

Objective: ``sum |w - Q(w)|^p`` over each tile, p <= 1: unlike the squared error, it forgives a few large errors for
many small ones. The publication has p = 0.7; on trained weights of 2 to 4 bits in groups, p = 1 gave lower perplexities
and is the default. The objective is split with an auxiliary error e,

    minimise  sum |e|^p + beta/2 (w - Q(w) - e)^2,

and solved in turns: e by generalised soft thresholding, ``sign(x) max(|x| - |x|^(p-1) / beta, 0)``, then the tile's
scale, and zero point where the format has a free one, by least squares of ``w - e`` on the values of the codes; beta
grows by kappa at each step. The start is the best of the range of round-to-nearest and
shrunken ones. Every step's range is measured by the objective itself, and the best is kept; the range of
round-to-nearest is among them and wins ties.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from detent.algorithms.max import weight_range
from detent.algorithms.mse import pieces
from detent.algorithms.registry import Handler, LayerFacts, register
from detent.config.transforms import HQQConfig
from detent.errors import DetentError
from detent.formats import FloatScale, Format
from detent.formats.granularity import to_tiles
from detent.formats.tiles import scale_from_range, simulate

#: Shares of the range of round-to-nearest to start from, besides all of it.
_SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)
#: Steps without a better range for any tile, after which no more are made.
_PATIENCE = 3


@dataclass(frozen=True)
class HQQResult:
    """Attributes: low, high: of each tile, float32 in the shape of the scales. before, after: the objective of
    round-to-nearest and of this range."""

    low: Tensor
    high: Tensor
    before: float
    after: float


def hqq_range(
    weight: Tensor,
    fmt: Format,
    *,
    lp_norm: float = 1.0,
    beta: float = 10.0,
    kappa: float = 1.01,
    iters: int = 20,
    global_amax: Tensor | None = None,
) -> HQQResult:
    """The range of each tile under which the weights' error has the least p-norm.

    Args:
        weight: float tensor of any shape.
        fmt: a static format with a float scale.
        lp_norm: p, in (0, 1].
        beta: weight of the quadratic term, for weights divided by their tile's largest magnitude.
        kappa: growth of beta at each step.
        iters: steps at most.
        global_amax: the largest magnitude behind an outer scale, by default that of `weight`.

    Raises:
        DetentError: the format has no float scale to choose or is built on another format's codes; p is out of range.
    """
    if not isinstance(fmt.scale, FloatScale) or fmt.base is not None:
        raise DetentError(f"hqq: {fmt} has no float scale to choose; use 'max', or a format with one")
    if not 0 < lp_norm <= 1:
        raise DetentError(f"hqq: lp_norm must be in (0, 1], not {lp_norm}")
    low, high = weight_range(weight, fmt)
    outer = None
    if fmt.scale.outer:
        amax = weight.detach().abs().amax() if global_amax is None else global_amax
        outer = fmt.scale.outer_scale(amax, fmt.element)
    solver = _HalfQuadratic(fmt, outer, lp_norm, beta, kappa, iters)
    tiles = to_tiles(weight.detach(), fmt.granularity, repeat_edge=fmt.zero_point == "float").to(torch.float32)
    exists = to_tiles(torch.ones_like(weight, dtype=torch.float32), fmt.granularity)
    found = [
        solver.solve(tiles[rows], exists[rows], lo, hi)
        for rows, lo, hi in pieces(tiles, low.reshape(-1, 1), high.reshape(-1, 1))
    ]
    if not found:
        return HQQResult(low, high, 0.0, 0.0)
    best_low, best_high, before, after = (torch.cat(parts) for parts in zip(*found, strict=True))
    return HQQResult(
        best_low.reshape(low.shape), best_high.reshape(high.shape), float(before.sum()), float(after.sum())
    )


@dataclass(frozen=True)
class _HalfQuadratic:
    """The half-quadratic iteration on tiles [tiles, elements per tile]; `exists` is 0 for padding, else 1."""

    fmt: Format
    outer: Tensor | None
    p: float
    beta: float
    kappa: float
    iters: int

    def solve(self, tiles: Tensor, exists: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(low, high, objective of round-to-nearest, objective of the result), [tiles, 1] each."""
        before = self._objective(tiles, self._values(tiles, low, high), exists)
        best_low, best_high, least = low, high, before
        for share in _SHARES:
            objective = self._objective(tiles, self._values(tiles, low * share, high * share), exists)
            better = objective < least
            best_low, best_high = (
                torch.where(better, low * share, best_low),
                torch.where(better, high * share, best_high),
            )
            least = torch.minimum(least, objective)
        unit = torch.maximum(-low, high).clamp_min(1e-30)  # beta is for weights of about 1
        lo, hi, beta, waited = best_low, best_high, self.beta, 0
        for _ in range(self.iters):
            lo, hi = self._refit(tiles, self._values(tiles, lo, hi), exists, lo, hi, unit, beta)
            objective = self._objective(tiles, self._values(tiles, lo, hi), exists)
            better = objective < least
            best_low, best_high = torch.where(better, lo, best_low), torch.where(better, hi, best_high)
            least = torch.minimum(least, objective)
            beta *= self.kappa
            waited = 0 if bool(better.any()) else waited + 1
            if waited == _PATIENCE:
                break
        return best_low, best_high, before, least

    def _values(self, tiles: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return simulate(tiles, self.fmt, scale_from_range(self.fmt, low, high, self.outer))

    def _objective(self, tiles: Tensor, values: Tensor, exists: Tensor) -> Tensor:
        return ((tiles - values).abs().pow(self.p) * exists).sum(1, keepdim=True, dtype=torch.float64)

    def _refit(
        self, tiles: Tensor, values: Tensor, exists: Tensor, low: Tensor, high: Tensor, unit: Tensor, beta: float
    ) -> tuple[Tensor, Tensor]:
        """The range that maps the codes in use best onto the weights without their sparse errors."""
        error = (tiles - values) / unit
        size = error.abs()
        sparse = error.sign() * (size - size.clamp_min(1e-8).pow(self.p - 1) / beta).clamp_min(0)
        target, values, exists = (tiles - sparse * unit).double(), values.double(), exists.double()
        if self.fmt.zero_point in ("int", "float"):
            count = exists.sum(1, keepdim=True)
            mean_v = (values * exists).sum(1, keepdim=True) / count
            mean_t = (target * exists).sum(1, keepdim=True) / count
            centred = (values - mean_v) * exists
            slope = _slope((centred * (target - mean_t)).sum(1, keepdim=True), centred.pow(2).sum(1, keepdim=True))
            offset = mean_t - slope * mean_v
        else:
            slope = _slope(
                (values * target * exists).sum(1, keepdim=True), (values.pow(2) * exists).sum(1, keepdim=True)
            )
            offset = torch.zeros_like(slope)
        return (slope * low + offset).float(), (slope * high + offset).float()


def _slope(products: Tensor, squares: Tensor) -> Tensor:
    """products / squares, kept near 1 so that no step flips or collapses a tile; 1 where all values are zero."""
    return torch.where(squares > 0, products / squares.clamp_min(1e-300), 1.0).clamp(0.5, 2.0)


@register(HQQConfig)
class HQQHandler(Handler[HQQConfig]):
    """The range of least p-norm of each weight."""

    scope = "weight"

    def refusal(self, step: HQQConfig, layer: LayerFacts) -> str | None:
        fmt = layer.weight
        if fmt is not None and fmt.base is not None and isinstance(fmt.scale, FloatScale) and not fmt.dynamic:
            return f"its format {fmt} is built on the codes of another format; use 'max' or 'mse'"
        return None

    def range_of(self, step: HQQConfig, weight: Tensor, fmt: Format) -> tuple[Tensor, Tensor] | None:
        found = hqq_range(weight, fmt, lp_norm=step.lp_norm, beta=step.beta, kappa=step.kappa, iters=step.iters)
        return found.low, found.high
