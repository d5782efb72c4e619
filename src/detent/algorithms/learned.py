"""`LearnedWeight`: a weight on the grid of its format whose codes and scales are trained by gradient descent.

Every element has a *position* on the axis of codes; what the layer computes with is the value of the code nearest to
it, ``(nearest(position) - zero_point) * scale``. Rounding passes its gradient on unchanged (straight-through, Bengio et
al., arXiv 1308.3432), and the scale's gradient is then the code itself: learned step size quantization (arXiv
1902.08153) with the position as a separate variable, so that a scale that moves does not move the codes.

Invariants: the values are always on the grid, whatever was trained, so nothing is lost when training ends; at
first they are exactly the rounded weight that was passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detent.algorithms.objective import check_elementwise, has_free_scale, requantize
from detent.errors import DetentError
from detent.formats import FloatScale, Format, Integer, Scales, SearchedScale, float32
from detent.formats.elements import Element
from detent.formats.granularity import from_tiles, to_tiles
from detent.formats.stored_scales import tile_scale
from detent.formats.tiles import multiplier

#: Elements rounded at once: float64 intermediates then stay in the processor's cache.
_PIECE = 1 << 16


class GridWeight(nn.Module):
    """The base of weights on the grid of a format, which are trained. Calling one gives the values, float32.

    Attributes:
        free: whether scales are trained, or taken from a coarse set (powers of two, FP8) and stay as they are.
    """

    def __init__(self, weight: Tensor, fmt: Format, scales: Scales, algorithm: str) -> None:
        """
        Args:
            weight: float [out, in].
            fmt: a format whose codes are chosen one by one.
            scales: those to begin with, in the shape of the format's grid.
            algorithm: for messages.

        Raises:
            DetentError: the format chooses codes jointly (MX4, MX6, MX9, progressive).
        """
        super().__init__()
        check_elementwise(fmt, algorithm)
        self._fmt, self._shape, self._scales = fmt, tuple(weight.shape), scales
        self.free = has_free_scale(fmt)
        scale = tile_scale(fmt, scales)
        self._zero_point = scale.zero_point
        #: A stored minimum, where the format has one: it isn't trained.
        self._minimum = scale.zero_point if fmt.zero_point == "minimum" else None
        self._unit = multiplier(fmt, scale).to(torch.float32)

    def _affine(self) -> tuple[Tensor, Tensor | None]:
        """(scale, zero point) of each tile as they can be stored, with the gradient of their unrounded values."""
        raise NotImplementedError

    @torch.no_grad()
    def result(self) -> tuple[Tensor, Scales]:
        """(the values, float32 [out, in]; their scales): encoding the values under the scales is exact."""
        scales = self._scales
        if self.free:
            assert isinstance(self._fmt.scale, FloatScale | SearchedScale)
            unit, zero_point = self._affine()
            stored, zeros = self._fmt.scale.store(unit).reshape(scales.scale.shape), scales.zero_point
            if zeros is not None and zero_point is not None:
                zeros = zero_point.to(zeros.dtype).reshape(zeros.shape)
            scales = Scales(stored, zeros, scales.outer_scale)
        return requantize(self(), self._fmt, scales), scales

    def latent(self) -> Tensor | None:
        """What the values are rounded from, float32 [out, in], where training can go on from that."""
        return None


class LearnedWeight(GridWeight):
    """A rounded weight that can be trained. Calling it gives the values, float32 in the weight's shape.

    Attributes:
        position: parameter, float32 [tiles, elements per tile], in units of the element (steps, for integers).
        stretch: parameter, float32 [tiles, 1]: the scale's relative change; None where scales aren't `free`.
    """

    def __init__(
        self, weight: Tensor, fmt: Format, scales: Scales, *, rounded: Tensor | None = None, reach: float = 0.45
    ) -> None:
        """
        Args:
            weight: float [out, in], what rounding started from: positions are as near to it as their codes allow.
            fmt, scales: see `GridWeight`.
            rounded: float [out, in], values on the grid of `scales` to begin with, by default round-to-nearest.
            reach: how far a position may at first be from its code, in units of the element; below half a step, so that
                the smallest update doesn't flip codes at random.
        """
        super().__init__(weight, fmt, scales, "learned rounding")
        weight = weight.detach().to(torch.float32)
        rounded = requantize(weight, fmt, scales) if rounded is None else rounded.detach().to(torch.float32)
        start = self._position(rounded)
        self.position = nn.Parameter(_towards(nearest(start, fmt.element), self._position(weight), fmt.element, reach))
        self.stretch = nn.Parameter(torch.zeros_like(self._unit)) if self.free else None

    def _position(self, weight: Tensor) -> Tensor:
        tiles = to_tiles(weight, self._fmt.granularity).double()
        if self._minimum is not None:
            tiles = tiles - self._minimum
        quotient = torch.where(self._unit == 0, 0.0, tiles / self._unit.double())
        if self._zero_point is not None and self._minimum is None:
            quotient += self._zero_point
        return quotient.float()

    def forward(self) -> Tensor:
        scale, zero_point = self._affine()
        if self._minimum is not None:
            tiles = _on_grid(self.position, scale, None, self._fmt.element) + self._minimum
        else:
            tiles = _on_grid(self.position, scale, zero_point, self._fmt.element)
        return from_tiles(tiles, self._fmt.granularity, self._shape)

    def _affine(self) -> tuple[Tensor, Tensor | None]:
        if self.stretch is None:
            return self._unit, self._zero_point
        return passed_on(self._unit * (1 + self.stretch), self._fmt), self._zero_point

    @torch.no_grad()
    def settle(self) -> None:
        """After an update: bring positions back to the range of codes, beyond which their gradient is zero, and keep
        scales from changing sign."""
        self.position.clamp_(self._fmt.element.minimum, self._fmt.element.maximum)
        if self.stretch is not None:
            self.stretch.clamp_min_(-0.9)

    @torch.no_grad()
    def latent(self) -> Tensor:
        """The weight whose positions these are, float32 in the weight's shape."""
        scale, zero_point = self._affine()
        if self._minimum is not None:
            tiles = self.position * scale + self._minimum
        else:
            tiles = (self.position - (0.0 if zero_point is None else zero_point)) * scale
        return from_tiles(tiles, self._fmt.granularity, self._shape)


def passed_on(scale: Tensor, fmt: Format) -> Tensor:
    """The storable scale, with the gradient of the one before it was rounded."""
    return scale + (storable(scale.detach(), fmt) - scale.detach())


def storable(scale: Tensor, fmt: Format) -> Tensor:
    """The float32 scale nearest to `scale` that the format can store; its sign is kept."""
    assert isinstance(fmt.scale, FloatScale | SearchedScale)
    return torch.copysign(fmt.scale.quantize(scale.abs(), None), scale)


def _towards(code: Tensor, position: Tensor, element: Element, reach: float) -> Tensor:
    """From `code` towards `position`, at most by `reach` and never so far that another code is nearer."""
    code = code.detach()
    step = (position.clamp(element.minimum, element.maximum) - code).clamp(-reach, reach)
    while bool((strays := nearest(code + step, element) != code).any()):
        step = torch.where(strays, torch.where(step.abs() < 1e-3, 0.0, step * 0.8), step)
    return code + step


def nearest(position: Tensor, element: Element) -> Tensor:
    """The grid values nearest to float32 positions, float32; the gradient is passed on except beyond the range."""
    return _nearest(position, element)


def _round(position: Tensor, element: Element) -> Tensor:
    """The same without a gradient. Positions are float32, so that no quotient is rounded and float32 is exact."""
    if isinstance(element, Integer):
        return float32.nearest(element, position.detach())
    flat = position.detach().reshape(-1)
    out = torch.empty_like(flat)
    for start in range(0, len(flat), _PIECE):
        out[start : start + _PIECE] = element.nearest(flat[start : start + _PIECE].double())
    return out.view(position.shape)


class _Nearest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, position: Tensor, element: Element) -> Tensor:
        ctx.save_for_backward(position)
        ctx.element = element
        return _round(position, element)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (position,) = ctx.saved_tensors
        element: Element = ctx.element
        beyond = 0.5 if isinstance(element, Integer) else 0.0  # half a step past the last code still rounds to it
        inside = (position >= element.minimum - beyond) & (position <= element.maximum + beyond)
        return grad * inside, None


class _OnGrid(torch.autograd.Function):
    """``(nearest(position) - zero_point) * scale`` for positions within the range, in as few passes as possible."""

    @staticmethod
    def forward(ctx: Any, position: Tensor, scale: Tensor, zero_point: Tensor | None, element: Element) -> Tensor:
        grid = _round(position, element)
        if zero_point is not None:
            grid -= zero_point
        ctx.save_for_backward(grid, scale)
        return grid * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        grid, scale = ctx.saved_tensors
        of_scale = torch.linalg.vecdot(grad, grid).unsqueeze(1) if ctx.needs_input_grad[1] else None
        return grad * scale, of_scale, None, None


# `apply` has no annotations in PyTorch.
_nearest: Callable[[Tensor, Element], Tensor] = _Nearest.apply
_on_grid: Callable[[Tensor, Tensor, Tensor | None, Element], Tensor] = _OnGrid.apply


class Snapshot:
    """The values of parameters at some step, and the objective there."""

    def __init__(self, parameters: Sequence[Tensor], objective: float, step: int) -> None:
        self._values = [p.detach().clone() for p in parameters]
        self.objective, self.step = objective, step

    @torch.no_grad()
    def blend(self, parameters: Sequence[Tensor], share: float) -> None:
        """Move the values towards those that the parameters have now, by that share of the way."""
        for value, parameter in zip(self._values, parameters, strict=True):
            value.lerp_(parameter, share)

    def restore(self, parameters: Sequence[Tensor]) -> None:
        """Give the parameters the values they had."""
        with torch.no_grad():
            for parameter, value in zip(parameters, self._values, strict=True):
                parameter.copy_(value)


def shuffled(count: int, steps: int, seed: int) -> list[int]:
    """Which of `count` batches each step takes: every one once in random order, then every one again."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps:
        order += torch.randperm(count, generator=generator).tolist()
    return order[:steps]


def check_some(weights: Any, algorithm: str) -> None:
    """Raises DetentError where there is nothing to train."""
    if not weights:
        raise DetentError(f"{algorithm}: there are no weights to train")
