"""Observers: what a quantizer remembers of the tensors it has seen, and the range it makes of them.

Invariant: observing two batches in either order, or merging two observers that saw one batch each, gives the same range
(histograms: up to the resolution of their bins).

Formulas: percentile, entropy (KL divergence) and MSE calibration as in "Integer Quantization for Deep Learning
Inference" (arXiv 2004.09602, section 5.1) and NVIDIA's 8-bit inference talk (GTC 2017) for the entropy search.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from detent.errors import DetentError, NothingObserved
from detent.formats import FloatScale, Format, Integer, all_finite, encode, fake_quantize, scales_from_range
from detent.formats.granularity import to_tiles
from detent.formats.kernels import ranges

NOT_FINITE = "NaN or infinity in the data seen during calibration"


class Observer(Protocol):
    """What every observer offers."""

    def observe(self, x: Tensor) -> None:
        """Take in one tensor of finite values; `MinMaxObserver` refuses others itself."""

    def range(self, fmt: Format) -> tuple[Tensor, Tensor]:
        """(low, high), float32 of the grid's shape; NothingObserved without data."""


class MinMaxObserver:
    """The smallest and the largest value seen by each tile."""

    def __init__(self, fmt: Format) -> None:
        self._fmt = fmt
        self._low: Tensor | None = None
        self._high: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        x = x.detach()
        granularity = self._fmt.granularity
        low, high = ranges(to_tiles(x, granularity, repeat_edge=True), self._fmt)
        if not (all_finite(low) and all_finite(high)):
            raise DetentError(NOT_FINITE)
        shape = granularity.grid(tuple(x.shape))
        self.merge(low.reshape(shape), high.reshape(shape))

    @property
    def seen(self) -> tuple[Tensor, Tensor] | None:
        """The smallest and the largest values so far."""
        return None if self._low is None or self._high is None else (self._low, self._high)

    def merge(self, low: Tensor, high: Tensor) -> None:
        """Take in what another observer has seen.

        Raises:
            DetentError: of another number of tiles.
        """
        if self._low is not None and self._high is not None:
            if self._low.numel() != low.numel():
                raise DetentError(
                    f"a static {self._fmt.granularity} scale needs the same number of scales in every batch, but saw"
                    f" grids {tuple(self._low.shape)} and {tuple(low.shape)}; use type 'dynamic' for activations"
                )
            low, high = (
                torch.minimum(self._low, low.view_as(self._low)),
                torch.maximum(self._high, high.view_as(self._high)),
            )
        self._low, self._high = low, high

    def range(self, fmt: Format) -> tuple[Tensor, Tensor]:
        if self.seen is None:
            raise NothingObserved("no data was observed")
        return self.seen


class HistogramObserver:
    """A histogram of magnitudes (or, for asymmetric formats, of values) that widens as larger values come.

    Bins double in width by merging neighbours, so no observation is ever binned twice and merging is exact.
    Per-tensor formats only.
    """

    BINS = 4096

    def __init__(self, fmt: Format, method: str, percentile: float = 99.99) -> None:
        if fmt.granularity.kind != "per_tensor":
            raise DetentError(f"calibrator {method!r} works per tensor; this quantizer is {fmt.granularity}")
        if not 0 < percentile <= 100:
            raise DetentError(f"a percentile is in (0, 100], not {percentile}")
        if method == "entropy" and not isinstance(fmt.element, Integer):
            raise DetentError(f"the entropy calibrator is defined for integers, not {fmt.element.name}; use 'mse'")
        if not isinstance(fmt.scale, FloatScale) or fmt.scale.outer:
            raise DetentError(f"calibrator {method!r} chooses a float scale; this quantizer has a {fmt.scale}")
        self._method, self._percentile = method, percentile
        self._signed = not fmt.symmetric
        self._limit = 0.0
        self._zeros = 0  # elements of tensors that held nothing but zeros, before any other value gave a bin width
        self._counts = torch.zeros(self.BINS, dtype=torch.float64)

    def observe(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        values = x.detach().to(torch.float32).flatten()
        if not self._signed:
            values = values.abs()
        largest = float(values.abs().amax())
        if largest == 0 and self._limit == 0:
            self._zeros += values.numel()
            return
        if self._limit == 0:
            self._limit = largest
            self._counts = self._binned(torch.zeros(1)) * self._zeros
        while largest > self._limit:
            self._widen()
        self._counts = self._counts + self._binned(values)

    def _binned(self, values: Tensor) -> Tensor:
        low = -self._limit if self._signed else 0.0
        return torch.histc(values, self.BINS, low, self._limit).to("cpu", torch.float64)

    def _widen(self) -> None:
        """Double the range, merging pairs of bins."""
        merged = self._counts.view(-1, 2).sum(1)
        counts = torch.zeros_like(self._counts)
        start = self.BINS // 4 if self._signed else 0
        counts[start : start + self.BINS // 2] = merged
        self._counts, self._limit = counts, self._limit * 2

    def range(self, fmt: Format) -> tuple[Tensor, Tensor]:
        if self._limit == 0:
            if not self._zeros:
                raise NothingObserved("no data was observed")
            return torch.zeros(()), torch.zeros(())
        search = {"percentile": self._by_percentile, "entropy": self._by_entropy, "mse": self._by_error}
        low, high = search[self._method](fmt)
        return torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32)

    def _edges(self) -> Tensor:
        low = -self._limit if self._signed else 0.0
        return torch.linspace(low, self._limit, self.BINS + 1, dtype=torch.float64)

    def _by_percentile(self, fmt: Format) -> tuple[float, float]:
        """The range that the given share of values falls into; half of the rest on each side when asymmetric."""
        share = self._percentile / 100
        cumulative = self._counts.cumsum(0) / self._counts.sum()
        edges = self._edges()
        if not self._signed:
            high = float(edges[int(torch.searchsorted(cumulative, share).clamp_max(self.BINS - 1)) + 1])
            return -high, high
        tail = (1 - share) / 2
        low_bin = int(torch.searchsorted(cumulative, tail, right=True).clamp_max(self.BINS - 1))
        high_bin = int(torch.searchsorted(cumulative, 1 - tail).clamp_max(self.BINS - 1))
        return float(edges[low_bin]), float(edges[high_bin + 1])

    def _candidates(self) -> list[tuple[float, float]]:
        """Ranges to try: from the full one inwards, in 128 steps."""
        edges = self._edges()
        used = torch.nonzero(self._counts).flatten()
        low, high = float(edges[used[0]]), float(edges[used[-1] + 1])
        if not self._signed:
            low = -high
        return [(low * k / 128, high * k / 128) for k in range(128, 0, -1)]

    def _by_error(self, fmt: Format) -> tuple[float, float]:
        """The range whose format reproduces the histogram's bin centres with the least squared error."""
        edges = self._edges()
        centres = ((edges[1:] + edges[:-1]) / 2).to(torch.float32)

        def error(bounds: tuple[float, float]) -> float:
            scales = scales_from_range(fmt, torch.tensor(bounds[0]), torch.tensor(bounds[1]))
            return float((((fake_quantize(centres, fmt, scales) - centres).double() ** 2) * self._counts).sum())

        return min(self._candidates(), key=error)

    def _by_entropy(self, fmt: Format) -> tuple[float, float]:
        """The range whose quantized distribution has the least KL divergence from the clipped one."""
        edges = self._edges()
        centres = ((edges[1:] + edges[:-1]) / 2).to(torch.float32)

        def divergence(bounds: tuple[float, float]) -> float:
            low, high = bounds if self._signed else (0.0, bounds[1])
            inside = (centres >= low) & (centres <= high)
            clipped = self._counts * inside
            index = torch.nonzero(inside).flatten()
            clipped[index[0]] += self._counts[: index[0]].sum()
            clipped[index[-1]] += self._counts[index[-1] + 1 :].sum()
            scales = scales_from_range(fmt, torch.tensor(bounds[0]), torch.tensor(bounds[1]))
            codes = encode(centres, fmt, scales).codes.long() + 128
            counted = (self._counts * inside > 0).double()
            mass = torch.zeros(512, dtype=torch.float64).index_add_(0, codes, self._counts * inside)
            width = torch.zeros(512, dtype=torch.float64).index_add_(0, codes, counted)
            model = counted * (mass / width.clamp_min(1))[codes]
            p, q = clipped / clipped.sum(), model / model.sum().clamp_min(1e-300)
            seen = p > 0
            return float((p[seen] * (p[seen] / q[seen].clamp_min(1e-12)).log()).sum())

        full, *others = self._candidates()
        return min([full, *(c for c in others if self._bins_inside(c) >= 2)], key=divergence)

    def _bins_inside(self, bounds: tuple[float, float]) -> int:
        low, high = bounds if self._signed else (0.0, bounds[1])
        edges = self._edges()
        return int(((edges[1:] <= high) & (edges[:-1] >= low)).sum())


def make_observer(calibrator: Any, fmt: Format) -> Observer:
    """The observer that a configuration's `calibrator` asks for.

    Args:
        calibrator: ``max``, ``percentile`` (also called ``histogram``), ``entropy`` or ``mse``; ``(name, {option:
            value})``; or a custom class, called with the format and the arguments that follow it in a tuple.
        fmt: the format that the range is for.
    """
    name, *arguments = calibrator if isinstance(calibrator, (tuple, list)) else (calibrator,)
    if isinstance(name, type):
        own: Observer = name(fmt, *arguments)
        return own
    if name == "max":
        return MinMaxObserver(fmt)
    method = "percentile" if name == "histogram" else name
    options = dict(arguments[0]) if arguments else {}
    percentile = options.pop("percentile", 99.99) if method == "percentile" else 99.99
    if options:
        allowed = "'percentile'" if method == "percentile" else "none"
        raise DetentError(f"calibrator {name!r}: unknown option {next(iter(options))!r}; options: {allowed}")
    return HistogramObserver(fmt, method, percentile)
