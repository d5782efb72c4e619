"""`smoothquant`: moving range between activations and weights, channel by channel (SmoothQuant, arXiv 2211.10438).

A scale s per input channel divides the activation and multiplies the weight's columns; the product is unchanged until
both are rounded. Eq. 4: ``s_j = amax|x_j|^alpha / amax|W_:j|^(1 - alpha)``. With ``alpha="auto"`` the alpha with the
least squared error of the outputs on a sample of tokens, activations and weights both rounded.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from detent.algorithms.channel_scales import LEAST, MOST, ScaleChoice, leave_alone, take_scale
from detent.algorithms.objective import tile_values
from detent.algorithms.outcome import Outcome
from detent.algorithms.registry import Handler, LayerFacts, register, scale_after_branch
from detent.algorithms.site import Wanted
from detent.algorithms.site_work import SiteWork, Tie
from detent.config.algorithm import SmoothQuantCalibConfig
from detent.formats import FloatScale, Format, fake_quantize
from detent.formats.tiles import scale_from_range
from detent.statistics import SiteStatistics

_log = logging.getLogger(__name__)

#: This to the power of 1 - alpha is the share of the median channel's largest magnitude that any channel counts with
#: at least: 0.3 for the usual 0.5, and the median itself for 1, where the scaled range leaves no channel room for more
#: than it was seen to carry. Errors on data with channels that calibration didn't see then stay below those without
#: channel scales, and those on data like calibration's are as they were.
_LEAST_SEEN = 0.09
#: The alphas that a search tries.
_ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def smoothquant_scale(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """s of SmoothQuant, float32 [channels]: what columns are multiplied with and the activation is divided by.

    A channel that calibration hardly saw may carry more later: with a scale as small as what it was seen to carry, it
    would then be clipped in a static range. So no channel counts as smaller than a share of the median one. Channels
    that no weight reads get 1.

    Args:
        activation: the largest magnitude of each channel.
        weight: the largest magnitude of each channel's columns, over all weights that read it.
        alpha: how much of the range moves, from 0 to 1.
    """
    a, w = activation.double(), weight.double()
    live = a[a > 0]
    least = _LEAST_SEEN ** (1 - alpha) * live.median() if len(live) else a.new_zeros(())
    scale = a.clamp_min(least) ** alpha / w.clamp_min(1e-300) ** (1 - alpha)
    return torch.where((w == 0) | (least == 0), 1.0, scale.clamp(LEAST, MOST)).float()


def smoothquant_search(
    statistics: SiteStatistics,
    weights: Sequence[Tensor],
    formats: Sequence[Format],
    input_format: Format,
    *,
    alphas: Sequence[float] = _ALPHAS,
    tie: Tie = lambda scale: scale,
) -> ScaleChoice:
    """The SmoothQuant scale whose alpha gives the rounded layer the least squared error on the sample of tokens.

    Objective: ``||Q(x / s) Q(W s)^T - x W^T||^2`` over the rows of `statistics.sample`. Static activation ranges are
    taken from the channel ranges of all tokens. No scale at all is among the candidates and wins ties.

    Raises:
        DetentError: no sample was drawn.
    """
    x = statistics.drawn()
    targets = [x @ w.detach().float().T for w in weights]
    largest = torch.stack([w.detach().abs().amax(0).float() for w in weights]).amax(0)

    def loss(scale: Tensor) -> float:
        smooth = _activation_values(x / scale, statistics.divided(scale), input_format)
        total = 0.0
        for w, fmt, target in zip(weights, formats, targets, strict=True):
            total += float((smooth @ fake_quantize(w.detach().float() * scale, fmt).T - target).square().sum())
        return total

    ones = torch.ones_like(statistics.amax)
    plain = loss(ones)
    best = ScaleChoice(ones, 0.0, 0.0, plain, plain)
    for alpha in alphas:
        scale = tie(smoothquant_scale(statistics.amax, largest, alpha))
        error = loss(scale)
        if error < best.after:
            best = ScaleChoice(scale, alpha, 1 - alpha, plain, error)
    return best


def _activation_values(x: Tensor, statistics: SiteStatistics, fmt: Format) -> Tensor:
    """`x` quantized: dynamically, or under the range of all tokens that were seen."""
    if fmt.dynamic or fmt.granularity.kind != "per_tensor" or not isinstance(fmt.scale, FloatScale) or fmt.scale.outer:
        return fake_quantize(x, fmt)
    low, high = statistics.low.amin().reshape(1, 1), statistics.high.amax().reshape(1, 1)
    return tile_values(x.reshape(1, -1), fmt, scale_from_range(fmt, low, high)).reshape(x.shape)


@register(SmoothQuantCalibConfig)
class SmoothQuantHandler(Handler[SmoothQuantCalibConfig]):
    """A channel scale for each site whose weights and activation are both quantized."""

    block_by_block = False
    scales_channels = True

    def wants(self, step: SmoothQuantCalibConfig) -> Wanted:
        return Wanted(sample_size=step.sample_size if step.alpha == "auto" else 0)

    def refusal(self, step: SmoothQuantCalibConfig, layer: LayerFacts) -> str | None:
        if layer.input is None:
            return None  # left alone
        if step.alpha == "auto" and layer.is_convolution and (not layer.shape or math.prod(layer.shape[2:]) > 1):
            return "alpha is searched for linear layers; give a number for others"
        return scale_after_branch(layer, step.method)

    def solve(self, step: SmoothQuantCalibConfig, site: SiteWork) -> None:
        quantizers = [layer.input_quantizer for layer in site.readers]
        on = [q for q in quantizers if q is not None and q.is_enabled]
        name = str(step.method)
        if len(on) != len(quantizers):
            _log.info("%s: %s isn't quantized, so it is left alone", name, site.name)
            return
        reason = site.cannot_scale()
        if reason:
            leave_alone(site, name, _OBJECTIVE, reason)
            return
        if step.alpha == "auto":
            choice = smoothquant_search(
                site.statistics,
                [layer.matrix() for layer in site.readers],
                [layer.format for layer in site.readers],
                on[0].format,
                tie=site.tie,
            )
            take_scale(site, name, "squared error of the outputs on a sample of tokens", choice)
            return
        activation, weight = site.channel_amax, site.weight_amax
        scale = site.tie(smoothquant_scale(activation, weight, float(step.alpha)))
        before = float(activation.amax() * weight.amax())
        after = float((activation / scale).amax() * (weight * scale).amax())
        for layer in site.layers:
            site.note(layer, Outcome(name, _OBJECTIVE, before, after, decided={"alpha": step.alpha}))
        site.scale_channels(scale)


_OBJECTIVE = "largest activation times largest weight"
