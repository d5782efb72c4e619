"""`awq_lite`, `awq_clip`, `awq_full`: scales that protect salient channels, and clipping (AWQ, arXiv 2306.00978).

A scale s per input channel divides the activation and multiplies the weight's columns; the product is unchanged until
both are rounded. Eq. 4, 5: ``s = mean|x|^alpha / w_mean^beta``, normalised so that ``max(s) * min(s) = 1``; searched on
``tr((W - Q(W s) / s) G (W - Q(W s) / s)^T)``, over all weights that read the activation: first on a grid with
beta = 1 - alpha and with beta = 0, then between the neighbours of the best. No scale wins ties.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detent.algorithms.channel_scales import LEAST, MOST, ScaleChoice, leave_alone, take_scale
from detent.algorithms.max import weight_range
from detent.algorithms.objective import error_measure, rounded_to_nearest, rounded_under
from detent.algorithms.registry import Handler, LayerFacts, codes_together, register, scale_after_branch
from detent.algorithms.scale_search import (
    RangeChoice,
    can_turn,
    divided_weighing,
    leans_up,
    range_factors,
    take_ranges,
    weighing_of,
    weighings,
    weighted_range,
)
from detent.algorithms.site import Wanted
from detent.algorithms.site_work import SiteWork, Tie
from detent.config.algorithm import AWQClipCalibConfig, AWQFullCalibConfig, AWQLiteCalibConfig
from detent.formats import FloatScale, Format, fake_quantize
from detent.formats.granularity import from_tiles, to_tiles
from detent.formats.tiles import TileScale, scale_from_range
from detent.statistics import SiteStatistics

#: Output rows of a site's layers that candidates are compared on: as many as hold `_COMPARED` weights, and at least
#: `_LEAST_ROWS`.
_COMPARED, _LEAST_ROWS = 1 << 17, 128
#: Scales, and none at all, that are compared after clipping.
_FINALISTS = 3
#: As `_COMPARED` for what is measured of all weights and of the chosen scale.
_MEASURED = 1 << 20
#: The share of the median channel's mean magnitude that any channel counts with at least: what calibration hardly saw
#: may carry more later, and its weights should then not be rounded away.
_LEAST_SEEN = 0.1
#: Tokens that they are compared on, where that takes less work than the whole second moment.
_TOKENS = 512


def awq_scale(
    statistics: SiteStatistics,
    weights: Sequence[Tensor],
    formats: Sequence[Format],
    *,
    alpha_step: float = 0.1,
    refine: bool = True,
    clip: Clipping | None = None,
    tie: Tie = lambda scale: scale,
) -> ScaleChoice:
    """The channel scale under which the weights of a site, rounded, change its outputs least.

    Args:
        statistics: of the site, with its second moment or a sample.
        weights: float [out, in] of every layer that reads the site.
        formats: their formats.
        alpha_step: distance of the exponents tried in [0, 1].
        refine: also try values between the best grid point and its neighbours.
        clip: how each tile is clipped afterwards: the best scales, and none at all, are then compared as they are after
            clipping, and the objectives are those of clipped weights.
        tie: makes a scale usable.
    """
    rounded = _quickly_rounded if clip is None or not clip.signed_scales else _roughly_clipped
    measure, quick = error_measure(statistics), error_measure(statistics, _TOKENS)
    ones = torch.ones_like(statistics.amax)
    some, measured = _some_rows(weights, formats, _COMPARED), _some_rows(weights, formats, _MEASURED)
    plain = _loss(ones, some, formats, quick, rounded)
    tried = [ScaleChoice(ones, 0.0, 0.0, plain, plain)]
    magnitude = _weight_magnitude(measured, formats)
    activation = statistics.mean_abs.double()
    dead = activation == 0
    if not bool(dead.all()):
        activation = activation.clamp_min(_LEAST_SEEN * activation[~dead].median())

    def attempt(alpha: float, beta: float) -> None:
        scale = (activation.clamp_min(1e-30) ** alpha / magnitude**beta).clamp(LEAST, MOST)
        live = scale[~dead] if bool((~dead).any()) else scale
        scale = scale / (live.amax() * live.amin()).sqrt()
        scale = tie(torch.where(dead, 1.0, scale).clamp(LEAST, MOST).float())
        tried.append(ScaleChoice(scale, alpha, beta, plain, _loss(scale, some, formats, quick, rounded)))

    steps = max(1, round(1 / alpha_step))
    for i in range(steps + 1):
        attempt(i / steps, 1 - i / steps)
    for i in range(1, steps + 1, 2):
        attempt(i / steps, 0.0)
    best = min(tried, key=lambda choice: choice.after)
    if refine and best.after < plain:
        half = 0.5 / steps
        for da, db in ((-half, 0.0), (half, 0.0), (0.0, -2 * half), (0.0, 2 * half)):
            attempt(max(0.0, best.alpha + da), max(0.0, best.beta + db))
    ranked = sorted(tried, key=lambda choice: choice.after)
    if clip is None:
        share = _share(weights, measured)
        before, best = share * _loss(ones, measured, formats, measure, rounded), ranked[0]
        after = before if best is tried[0] else share * _loss(best.scale, measured, formats, measure, rounded)
        if after >= before:
            return ScaleChoice(ones, 0.0, 0.0, before, before)
        return ScaleChoice(best.scale, best.alpha, best.beta, before, after)
    weighings = {fmt: weighing_of(statistics, fmt) for fmt in set(formats)}

    def clipped_loss(scale: Tensor) -> float:
        differences = []
        for weight, fmt in zip(some, formats, strict=True):
            wide = weight.detach().float() * scale
            choice = clip.search(wide, fmt, divided_weighing(weighings[fmt], scale))
            clipped = rounded_to_nearest(wide, fmt, choice.scales(fmt, wide.abs().amax()))
            differences.append(clipped.sub_(wide).div_(scale))
        return _share(weights, some) * quick(torch.cat(differences))

    before = clipped_loss(ones)
    choices = [ScaleChoice(ones, 0.0, 0.0, before, before)]
    for choice in ranked[:_FINALISTS]:
        if choice is not tried[0]:
            choices.append(replace(choice, before=before, after=clipped_loss(choice.scale)))
    return min(choices, key=lambda choice: choice.after)


def _some_rows(weights: Sequence[Tensor], formats: Sequence[Format], elements: int) -> list[Tensor]:
    """Evenly spread rows of all weights, of about `elements` elements; all where rows share scales."""
    most = max(_LEAST_ROWS, elements // weights[0].shape[1])
    step = max(1, sum(weight.shape[0] for weight in weights) // most)
    apart = all(fmt.granularity.lengths(tuple(w.shape))[0] == 1 for w, fmt in zip(weights, formats, strict=True))
    return [weight[::step] if apart else weight for weight in weights]


def _share(weights: Sequence[Tensor], some: Sequence[Tensor]) -> float:
    """How many rows each of the chosen rows represents."""
    return sum(map(len, weights)) / max(1, sum(map(len, some)))


def _loss(
    scale: Tensor,
    weights: Sequence[Tensor],
    formats: Sequence[Format],
    measure: Callable[[Tensor], float],
    rounded: Callable[[Tensor, Format], Tensor],
) -> float:
    differences = []
    for weight, fmt in zip(weights, formats, strict=True):
        w = weight.detach().float()
        differences.append(rounded(w * scale, fmt).div_(scale).sub_(w))
    return measure(torch.cat(differences))


def _quickly_rounded(weight: Tensor, fmt: Format) -> Tensor:
    """`weight` rounded to nearest; see `quick_tile_values`."""
    rule = fmt.scale
    if fmt.base is not None or not isinstance(rule, FloatScale) or rule.four_over_six or fmt.zero_point == "float":
        return fake_quantize(weight, fmt)
    low, high = (bound.reshape(-1, 1) for bound in weight_range(weight, fmt))
    outer = rule.outer_scale(weight.abs().amax(), fmt.element) if rule.outer else None
    return rounded_under(weight, fmt, scale_from_range(fmt, low, high, outer))


def _roughly_clipped(weight: Tensor, fmt: Format) -> Tensor:
    """`weight` rounded about as it is after its tiles are clipped under scales of either sign."""
    if not can_turn(fmt):
        return _quickly_rounded(weight, fmt)
    factor = range_factors(fmt, 3)[1]
    low, high = (bound.reshape(-1, 1) * factor for bound in weight_range(weight, fmt))
    scale = scale_from_range(fmt, low, high)
    negative = leans_up(to_tiles(weight, fmt.granularity))
    return rounded_under(weight, fmt, TileScale(torch.where(negative, -scale.value, scale.value)))


def _weight_magnitude(weights: Sequence[Tensor], formats: Sequence[Format]) -> Tensor:
    """How much of the grid each column uses: the mean over rows of |w| relative to its tile's largest, float64 [in]."""
    rows = []
    for weight, fmt in zip(weights, formats, strict=True):
        w = weight.detach().float().abs()
        low, high = weight_range(w, fmt)
        tiles = to_tiles(w, fmt.granularity)
        largest = torch.maximum(-low, high).reshape(-1, 1).clamp_min(1e-30)
        rows.append(from_tiles(tiles / largest, fmt.granularity, tuple(w.shape)))
    return torch.cat(rows).mean(0, dtype=torch.float64).clamp_min(1e-6)


@dataclass(frozen=True)
class Clipping:
    """AWQ's search for how much of each tile's range to give up: every fifth of the shares from 1 down to `least`,
    `step` apart, then those on both sides of the best, two steps and one step away.

    Attributes:
        least: the smallest share of the range.
        step: distance of shares.
        signed_scales: whether scales may be negative.
    """

    least: float
    step: float
    signed_scales: bool

    def search(self, weight: Tensor, fmt: Format, weighing: Tensor, global_amax: Tensor | None = None) -> RangeChoice:
        """The range of each tile, under differences weighed with `weighing`; see `weighted_range`."""
        steps = round((1 - self.least) / self.step)
        factors = [1 - i * self.step for i in sorted({*range(5, steps, 5), steps} - {0})]
        turn = self.signed_scales and can_turn(fmt)
        finer = (2 * self.step, self.step)
        return weighted_range(weight, fmt, weighing, factors, finer=finer, turn=turn, global_amax=global_amax)


# ---- at a site ------------------------------------------------------------------------------------------------------

_OBJECTIVE = "tr(D G D^T)"


def search_channel_scale(site: SiteWork, step: AWQLiteCalibConfig, name: str, clip: Clipping | None = None) -> None:
    """Give a site the channel scale of least error, if it takes one and one is better than none."""
    reason = site.cannot_scale() or ("" if site.is_linear else "channel scales are searched for linear layers")
    if reason:
        leave_alone(site, name, _OBJECTIVE, reason)
        return
    choice = awq_scale(
        site.statistics,
        [layer.matrix() for layer in site.layers],
        [layer.format for layer in site.layers],
        alpha_step=step.alpha_step,
        refine=step.refine,
        clip=clip,
        tie=site.tie,
    )
    of = site.statistics.sampled
    objective = _OBJECTIVE + (" after clipping" if clip else "") + (f", G from {of}" if of else "")
    take_scale(site, name, objective, choice, error_measure(site.statistics))


def _clip(site: SiteWork, clip: Clipping, name: str) -> None:
    weighed = weighings(site)
    for layer in site.layers:
        fmt = layer.format
        choice = clip.search(layer.matrix(), fmt, weighed[fmt], site.amax_behind(fmt))
        take_ranges(site, layer, name, weighed[fmt], choice)


def _clipping(step: AWQClipCalibConfig | AWQFullCalibConfig) -> Clipping:
    return Clipping(step.min_clip_ratio, step.shrink_step, step.signed_scales)


@register(AWQLiteCalibConfig)
class AWQLiteHandler(Handler[AWQLiteCalibConfig]):
    """A channel scale for each site."""

    scales_channels = True

    def wants(self, step: AWQLiteCalibConfig) -> Wanted:
        return Wanted(estimate=True)

    def refusal(self, step: AWQLiteCalibConfig, layer: LayerFacts) -> str | None:
        return scale_after_branch(layer, step.method)

    def solve(self, step: AWQLiteCalibConfig, site: SiteWork) -> None:
        search_channel_scale(site, step, str(step.method))


@register(AWQClipCalibConfig)
class AWQClipHandler(Handler[AWQClipCalibConfig]):
    """How much of each tile's range to give up."""

    def wants(self, step: AWQClipCalibConfig) -> Wanted:
        return Wanted(estimate=True)

    def refusal(self, step: AWQClipCalibConfig, layer: LayerFacts) -> str | None:
        return codes_together(layer)

    def solve(self, step: AWQClipCalibConfig, site: SiteWork) -> None:
        _clip(site, _clipping(step), str(step.method))


@register(AWQFullCalibConfig)
class AWQFullHandler(Handler[AWQFullCalibConfig]):
    """A channel scale, chosen by what is left after clipping, and clipping."""

    scales_channels = True

    def wants(self, step: AWQFullCalibConfig) -> Wanted:
        return Wanted(estimate=True)

    def refusal(self, step: AWQFullCalibConfig, layer: LayerFacts) -> str | None:
        return codes_together(layer) or scale_after_branch(layer, step.method)

    def solve(self, step: AWQFullCalibConfig, site: SiteWork) -> None:
        clip = _clipping(step)
        search_channel_scale(site, step, str(step.method), clip)
        _clip(site, clip, f"{step.method} (clip)")
