"""`autoround`: the rounding and the clipping ranges of a block's weights, learned by signed gradient descent.

SignRound (arXiv 2309.05516, version 2 with learned ranges, as AutoRound has it): the weight is rounded after an offset
V in [-1/2, 1/2] steps is added, under scales that are factors of at most 1 on the range of round-to-nearest:
``Q(w) = (nearest(w / s + zero_point + V) - zero_point) * s``, ``s = s(k_low * low, k_high * high)``. Objective: the
squared error of the block's outputs on the calibration batches. Each step moves every offset and factor by the learning
rate against the sign of its gradient; the rate falls linearly from 1 / iterations to 0, so an offset can just reach
either end of its range.

The step of least objective is kept, relative to what the same batch gave at first. In the end it, the last step and
round-to-nearest are measured on all batches, and the best of the three stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detent.algorithms.block_work import BLOCK_OBJECTIVE, BlockWork, adopt, computing_with
from detent.algorithms.learned import GridWeight, Snapshot, check_some, nearest, passed_on, shuffled
from detent.algorithms.outcome import Outcome
from detent.algorithms.registry import Handler, LayerFacts, codes_together, quantized_twice, register
from detent.algorithms.scale_search import searched_scales
from detent.algorithms.site import Wanted
from detent.algorithms.site_work import SiteWork, Stage
from detent.config.algorithm import AutoRoundCalibConfig
from detent.errors import DetentError
from detent.formats import Format, Scales
from detent.formats.elements import Element, Float, Integer, power_below
from detent.formats.granularity import from_tiles, to_tiles


class OffsetWeight(GridWeight):
    """A weight rounded after an offset, in a range that may shrink. Calling it gives the values, float32.

    Attributes:
        offset: parameter, float32 [tiles, elements per tile] in [-1/2, 1/2]: V, in steps of the element.
        low, high: parameters, float32 [tiles, 1] in [0, 1]: factors on the range. Symmetric formats use `high` only;
            both are None where scales aren't `free`, and then offsets alone are learned.
    """

    def __init__(self, weight: Tensor, fmt: Format, scales: Scales) -> None:
        """
        Args:
            weight, fmt, scales: see `GridWeight`.
        """
        super().__init__(weight, fmt, scales, "autoround")
        self._tiles = to_tiles(weight.detach().to(torch.float32), fmt.granularity)
        self.offset = nn.Parameter(torch.zeros_like(self._tiles))
        self.high = nn.Parameter(torch.ones_like(self._unit)) if self.free else None
        self.low = nn.Parameter(torch.ones_like(self._unit)) if self.free and not fmt.symmetric else None

    def forward(self) -> Tensor:
        unit, zero_point = self._affine()
        tiles, minimum = self._tiles, None
        if self._minimum is not None and zero_point is not None:
            minimum, zero_point = zero_point, None
            tiles = tiles - minimum
        position = tiles / torch.where(unit == 0, 1.0, unit)
        if zero_point is not None:
            position = position + zero_point
        position = position + self.offset * _gap(position.detach(), self._fmt.element)
        grid = nearest(position, self._fmt.element)
        if zero_point is not None:
            grid = grid - zero_point
        tiles = grid * unit if minimum is None else grid * unit + minimum
        return from_tiles(tiles, self._fmt.granularity, self._shape)

    def _affine(self) -> tuple[Tensor, Tensor | None]:
        # The formula of `formats.tiles` for a range's scale and zero point, written out with a gradient.
        if self.high is None:
            return self._unit, self._zero_point
        if self.low is None:
            return passed_on(self._unit * self.high, self._fmt), self._zero_point
        element, zero_point = self._fmt.element, self._zero_point
        assert zero_point is not None
        if self._minimum is not None:
            low = self._minimum * self.low
            high = (self._minimum + element.maximum * self._unit) * self.high
            stored = low.detach().to(self._fmt.scale.stored_dtype).to(torch.float32)
            return passed_on((high - low) / element.maximum, self._fmt), low + (stored - low.detach())
        low = (element.minimum - zero_point) * self._unit * self.low
        high = (element.maximum - zero_point) * self._unit * self.high
        scale = passed_on((high - low) / (element.maximum - element.minimum), self._fmt)
        exact = element.minimum - low / scale
        if self._fmt.zero_point == "float":
            return scale, exact
        rounded = torch.round(exact.detach()).clamp(element.minimum, element.maximum)
        return scale, exact + (rounded - exact.detach())

    @property
    def trained(self) -> list[nn.Parameter]:
        """What is learned."""
        return [p for p in (self.offset, self.low, self.high) if p is not None]

    @torch.no_grad()
    def settle(self) -> None:
        """After an update: clamp offsets and factors to their ranges."""
        self.offset.clamp_(-0.5, 0.5)
        for factor in (self.low, self.high):
            if factor is not None:
                factor.clamp_(0.01, 1.0)


def _gap(position: Tensor, element: Element) -> Tensor | float:
    """The distance between grid values around a position: what one step of an offset is."""
    if isinstance(element, Integer):
        return 1.0
    if isinstance(element, Float):
        power = power_below(position.double().clamp(element.minimum, element.maximum))
        return (power.clamp_min(2.0**element.min_exponent) * 2.0**-element.mantissa_bits).float()
    return (element.maximum - element.minimum) / (len(element.entries) - 1)


@dataclass(frozen=True)
class Tuned:
    """Attributes:
    before, after: the objective over all batches, rounded under the scales to begin with and of what was kept; never
        larger.
    iterations: how many were run.
    kept: after how many of them the state that was kept; 0: round-to-nearest.
    """

    before: float
    after: float
    iterations: int
    kept: int


def autoround(
    objective: Callable[[Any], Tensor],
    batches: Sequence[Any],
    weights: Sequence[OffsetWeight],
    *,
    iterations: int = 200,
    rate: float | None = None,
    seed: int = 0,
) -> Tuned:
    """Learn the offsets and ranges of `weights` in place.

    Args:
        objective: of a batch, the squared error of the block's outputs: a scalar that is differentiable with respect to
            the parameters of `weights`, with which the block computes.
        batches: one is taken in each iteration (AutoRound: 8 sequences), in random order, each as often as the others.
        weights: of all the block's quantized layers.
        iterations: steps.
        rate: the learning rate at first, by default 1 / iterations.
        seed: of the order of the batches.

    Raises:
        DetentError: nothing to learn, no batches, or an objective that isn't finite.
    """
    check_some(weights, "autoround")
    if not batches:
        raise DetentError("autoround: needs at least one batch")
    rate = 1 / iterations if rate is None else rate
    trained = [parameter for weight in weights for parameter in weight.trained]
    at_first = _measure(objective, batches)
    start = Snapshot(trained, sum(at_first) / len(at_first), 0)
    best, least = start, 1.0
    for step, index in enumerate(shuffled(len(batches), iterations, seed)):
        with torch.enable_grad():
            loss = objective(batches[index])
            loss.backward()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise DetentError(f"autoround: the objective became {value} in iteration {step}")
        relative = value / at_first[index] if at_first[index] else 1.0
        if relative < least:
            best, least = Snapshot(trained, relative, step), relative
        _step(trained, rate * (1 - step / iterations))
        for weight in weights:
            weight.settle()
    last = Snapshot(trained, 0.0, iterations)
    for candidate in {id(s): s for s in (best, last)}.values():
        candidate.restore(trained)
        values = _measure(objective, batches)
        candidate.objective = sum(values) / len(values)
    chosen = min((start, best, last), key=lambda s: s.objective)
    chosen.restore(trained)
    return Tuned(start.objective, chosen.objective, iterations, chosen.step)


@torch.no_grad()
def _step(parameters: Sequence[nn.Parameter], rate: float) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.sub_(rate * parameter.grad.sign())
            parameter.grad = None


@torch.no_grad()
def _measure(objective: Callable[[Any], Tensor], batches: Sequence[Any]) -> list[float]:
    return [float(objective(batch)) for batch in batches]


@register(AutoRoundCalibConfig)
class AutoRoundHandler(Handler[AutoRoundCalibConfig]):
    """Scales of least error at each site, unless an algorithm before chose some; then trains the block."""

    scope = "block"

    def wants(self, step: AutoRoundCalibConfig) -> Wanted:
        return Wanted(references=True, estimate=step.scale_search)

    def refusal(self, step: AutoRoundCalibConfig, layer: LayerFacts) -> str | None:
        return codes_together(layer) or quantized_twice(layer)

    def sees_quantized(self, step: AutoRoundCalibConfig, layers: Iterable[LayerFacts]) -> bool:
        return True

    def solve(self, step: AutoRoundCalibConfig, site: SiteWork) -> None:
        for layer in site.layers:
            if step.scale_search and site.state(layer).stage < Stage.SEARCHED:
                site.set_scales(layer, searched_scales(site, layer, step.search_steps, signed=step.signed_scales))

    def train(self, step: AutoRoundCalibConfig, block: BlockWork) -> None:
        weights = {layer.name: OffsetWeight(layer.matrix(), layer.format, layer.scales()) for layer in block.layers}
        with computing_with(weights, block.layers):
            tuned = autoround(
                block.objective,
                block.portions,
                list(weights.values()),
                iterations=step.iterations,
                rate=step.lr,
            )
        decided = {"iterations": tuned.iterations, "kept": tuned.kept}
        notice = "" if tuned.kept else "no step was better, so round-to-nearest under the first scales is kept"
        outcome = Outcome(str(step.method), BLOCK_OBJECTIVE, tuned.before, tuned.after, decided=decided, notice=notice)
        adopt(block.ledger, block.layers, weights, tuned.kept, outcome)
