"""`autoround`: the rounding and the clipping ranges of a block's weights, learned by signed gradient descent.

SignRound (arXiv 2309.05516, version 2 with learned ranges, as AutoRound has it): the weight is rounded after an offset
V in [-1/2, 1/2] steps is added, under scales that are factors of at most 1 on the plain range:
``Q(w) = (nearest(w / s + zero_point + V) - zero_point) * s``, ``s = s(k_low * low, k_high * high)``. Objective: the
squared error of the block's outputs on the calibration batches. Each step moves every offset and factor by the learning
rate against the sign of its gradient; the rate falls linearly from 1 / iterations to 0, so an offset can just reach
either end of its range.

The step of least objective is kept, relative to what the same batch gave at first. In the end it, the last step and
plain rounding are measured on all batches, and the best of the three stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detent.algorithms.learned import Snapshot, check_some, nearest, shuffled, storable
from detent.algorithms.objective import check_elementwise, has_free_scale, requantize
from detent.errors import DetentError
from detent.formats import FloatScale, Format, Scales
from detent.formats.elements import Element, Float, Integer, power_below
from detent.formats.granularity import from_tiles, to_tiles
from detent.formats.qtensor import _tile_scale
from detent.formats.tiles import multiplier


class OffsetWeight(nn.Module):
    """A weight rounded after an offset, in a range that may shrink. Calling it gives the values, float32.

    Attributes:
        offset: parameter, float32 [tiles, elements per tile] in [-1/2, 1/2]: V, in steps of the element.
        low, high: parameters, float32 [tiles, 1] in [0, 1]: factors on the range. Symmetric formats use `high` only;
            both are None where the scale isn't free (powers of two, FP8), and then offsets alone are learned.
    """

    def __init__(self, weight: Tensor, fmt: Format, scales: Scales) -> None:
        """
        Args:
            weight: float [out, in].
            fmt: a format whose codes are chosen one by one.
            scales: those of the range to begin with, in the shape of the format's grid.

        Raises:
            DetentError: the format chooses codes together (MX4, MX6, MX9, progressive).
        """
        super().__init__()
        check_elementwise(fmt, "autoround")
        self._fmt, self._shape, self._scales = fmt, tuple(weight.shape), scales
        self._tiles = to_tiles(weight.detach().to(torch.float32), fmt.granularity)
        tile_scale = _tile_scale(fmt, scales)
        self._zero_point = tile_scale.zero_point
        self._unit = multiplier(fmt, tile_scale).to(torch.float32)
        self.offset = nn.Parameter(torch.zeros_like(self._tiles))
        free = has_free_scale(fmt)
        self.high = nn.Parameter(torch.ones_like(self._unit)) if free else None
        self.low = nn.Parameter(torch.ones_like(self._unit)) if free and not fmt.symmetric else None

    def forward(self) -> Tensor:
        unit, zero_point = self._affine()
        position = self._tiles / torch.where(unit == 0, 1.0, unit)
        if zero_point is not None:
            position = position + zero_point
        position = position + self.offset * _gap(position.detach(), self._fmt.element)
        grid = nearest(position, self._fmt.element)
        if zero_point is not None:
            grid = grid - zero_point
        return from_tiles(grid * unit, self._fmt.granularity, self._shape)

    def _affine(self) -> tuple[Tensor, Tensor | None]:
        """(scale, zero point) of each tile as they can be stored, with the gradient of their unrounded values."""
        if self.high is None:
            return self._unit, self._zero_point
        if self.low is None:
            return _passed_on(self._unit * self.high, self._fmt), self._zero_point
        element, zero_point = self._fmt.element, self._zero_point
        assert zero_point is not None
        low = (element.minimum - zero_point) * self._unit * self.low
        high = (element.maximum - zero_point) * self._unit * self.high
        scale = _passed_on((high - low) / (element.maximum - element.minimum), self._fmt)
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
        """After an update: bring offsets and factors back to where they belong."""
        self.offset.clamp_(-0.5, 0.5)
        for factor in (self.low, self.high):
            if factor is not None:
                factor.clamp_(0.01, 1.0)

    @torch.no_grad()
    def result(self) -> tuple[Tensor, Scales]:
        """(the values, float32 [out, in]; their scales): encoding the values under the scales is exact."""
        scales = self._scales
        if self.high is not None:
            assert isinstance(self._fmt.scale, FloatScale)
            unit, zero_point = self._affine()
            stored = self._fmt.scale.store(unit).reshape(scales.scale.shape)
            zeros = scales.zero_point
            if zeros is not None and zero_point is not None:
                zeros = zero_point.to(zeros.dtype).reshape(zeros.shape)
            scales = Scales(stored, zeros, scales.outer_scale)
        return requantize(self(), self._fmt, scales), scales


def _passed_on(scale: Tensor, fmt: Format) -> Tensor:
    """The storable scale, with the gradient of the one before it was rounded."""
    return scale + (storable(scale.detach(), fmt) - scale.detach())


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
    kept: after how many of them the state that was kept; 0: plain rounding.
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
