"""Calibrators against the same definitions written out in NumPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from detent.errors import DetentError
from detent.formats import Format, fp8, integer, per_channel
from detent.nn.observers import HistogramObserver, MinMaxObserver, make_observer

INT8 = integer(8, rule="qmax")
ASYM = integer(8, signed=False, symmetric=False)


def data(seed: int = 0, count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Later batches are wider: the histogram has to grow.
    return [torch.randn(4000, generator=generator) ** 3 * (1 + 2 * i) for i in range(count)]


def observed(calibrator: object, fmt: Format, batches: list[torch.Tensor]) -> tuple[float, float]:
    observer = make_observer(calibrator, fmt)
    for batch in batches:
        observer.observe(batch)
    low, high = observer.range(fmt)
    return float(low), float(high)


def bin_width(batches: list[torch.Tensor], signed: bool = False) -> float:
    limit = float(batches[0].abs().max())
    largest = max(float(b.abs().max()) for b in batches)
    while limit < largest:
        limit *= 2
    return limit * (2 if signed else 1) / HistogramObserver.BINS


def test_max() -> None:
    batches = data()
    assert observed("max", INT8, batches)[1] == max(float(b.abs().max()) for b in batches)
    low, high = observed("max", ASYM, batches)
    assert (low, high) == (min(float(b.min()) for b in batches), max(float(b.max()) for b in batches))


@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.99, 100.0])
def test_percentile(percentile: float) -> None:
    batches = data()
    values = np.abs(torch.cat(batches).numpy().astype(np.float64))
    exact = np.percentile(values, percentile, method="inverted_cdf")
    high = observed(("percentile", {"percentile": percentile}), INT8, batches)[1]
    assert exact <= high * (1 + 1e-6)
    assert high - exact <= bin_width(batches) * 1.001


def test_percentile_of_asymmetric_formats_cuts_both_ends() -> None:
    batches = [b + 1 for b in data()]
    values = torch.cat(batches).numpy().astype(np.float64)
    low, high = observed(("percentile", {"percentile": 98.0}), ASYM, batches)
    width = bin_width(batches, signed=True) * 1.001
    assert abs(low - np.percentile(values, 1, method="inverted_cdf")) <= width
    assert abs(high - np.percentile(values, 99, method="inverted_cdf")) <= width


def search(batches: list[torch.Tensor], loss: Callable[[np.ndarray, np.ndarray, float], float]) -> dict[float, float]:
    """The loss of each of 128 ranges on a histogram of magnitudes, NumPy only."""
    limit = bin_width(batches) * HistogramObserver.BINS
    edges = np.linspace(0, limit, HistogramObserver.BINS + 1)
    counts = np.histogram(np.abs(torch.cat(batches).numpy().astype(np.float64)), edges)[0].astype(float)
    top = edges[np.nonzero(counts)[0][-1] + 1]
    return {top * k / 128: loss(counts, edges, top * k / 128) for k in range(1, 129)}


def test_mse() -> None:
    def error(counts: np.ndarray, edges: np.ndarray, high: float) -> float:
        centres = (edges[1:] + edges[:-1]) / 2
        q = np.clip(np.rint(centres * 127 / high), -128, 127) * high / 127
        return float((counts * (q - centres) ** 2).sum())

    batches = data()
    losses = search(batches, error)
    chosen = observed("mse", INT8, batches)[1]
    nearest = min(losses, key=lambda high: abs(high - chosen))
    assert nearest == pytest.approx(chosen, rel=1e-5)
    # Values on a bin's edge may be counted on either side, so the best of two equal ranges can differ.
    assert losses[nearest] <= min(losses.values()) * 1.001


def test_entropy() -> None:
    def divergence(counts: np.ndarray, edges: np.ndarray, high: float) -> float:
        centres = (edges[1:] + edges[:-1]) / 2
        inside = centres <= high
        if (edges[1:] <= high).sum() < 2:
            return np.inf
        last = np.nonzero(inside)[0][-1]
        p = counts[: last + 1].copy()
        p[-1] += counts[last + 1 :].sum()
        codes = np.rint(centres[: last + 1] * 127 / high).astype(int)
        q = np.zeros_like(p)
        for code in np.unique(codes):
            members = codes == code
            filled = members & (counts[: last + 1] > 0)
            if filled.any():
                q[filled] = counts[: last + 1][members].sum() / filled.sum()
        p, q = p / p.sum(), q / q.sum()
        seen = p > 0
        return float((p[seen] * np.log(p[seen] / np.maximum(q[seen], 1e-12))).sum())

    batches = data()
    losses = search(batches, divergence)
    chosen = observed("entropy", INT8, batches)[1]
    nearest = min(losses, key=lambda high: abs(high - chosen))
    assert nearest == pytest.approx(chosen, rel=1e-5)
    assert losses[nearest] <= min(losses.values()) * 1.01 + 1e-9
    assert chosen < float(torch.cat(batches).abs().max())  # the tail of this distribution is worth clipping


@pytest.mark.parametrize("calibrator", ["percentile", "mse", "entropy"])
def test_order_hardly_matters_and_zeros_count(calibrator: str) -> None:
    batches = [torch.zeros(100), *data()]
    forward, backward = observed(calibrator, INT8, batches), observed(calibrator, INT8, batches[::-1])
    assert forward[1] == pytest.approx(backward[1], rel=0.02)
    assert observed(calibrator, INT8, [torch.zeros(5)]) == (0.0, 0.0)
    with pytest.raises(DetentError, match="no data"):
        observed(calibrator, INT8, [])


@pytest.mark.parametrize("fmt", [INT8, ASYM])
@pytest.mark.parametrize("calibrator", ["percentile", "mse", "entropy", "max"])
def test_constant_data(fmt: Format, calibrator: str) -> None:
    low, high = observed(calibrator, fmt, [torch.full((10,), 2.5)])
    assert low <= 2.5 <= high * (1 + 1e-6)


def test_what_does_not_go_together_is_refused_at_once() -> None:
    with pytest.raises(DetentError, match="per tensor"):
        make_observer("mse", INT8.with_granularity(per_channel(0)))
    with pytest.raises(DetentError, match="defined for integers"):
        make_observer("entropy", fp8())
    with pytest.raises(DetentError, match="unknown option 'percent'"):
        make_observer(("percentile", {"percent": 9}), INT8)
    with pytest.raises(DetentError, match="in \\(0, 100\\]"):
        make_observer(("percentile", {"percentile": 0}), INT8)


def test_own_class() -> None:
    class Fixed:
        def __init__(self, fmt: Format, value: float) -> None:
            self.value = value

        def observe(self, x: torch.Tensor) -> None: ...

        def range(self, fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.tensor(-self.value), torch.tensor(self.value)

    assert observed((Fixed, 3.0), INT8, data()) == (-3.0, 3.0)


def test_shapes_must_agree() -> None:
    observer = MinMaxObserver(INT8.with_granularity(per_channel(0)))
    observer.observe(torch.ones(3, 2))
    with pytest.raises(DetentError, match="same number of scales"):
        observer.observe(torch.ones(4, 2))
