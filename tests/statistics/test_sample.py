"""Samples of rows, and second moments estimated from them."""

from __future__ import annotations

import pytest
import torch

from detent.errors import DetentError
from detent.statistics import SiteStatistics
from detent.statistics.sample import Sample


def drawn(rows: torch.Tensor, size: int, *splits: int) -> torch.Tensor:
    sample, first = Sample(size, rows.shape[1]), 0
    for part in rows.split(list(splits) or [len(rows)]):
        sample.add(part, first)
        first += len(part)
    return sample.rows()


def test_the_draw_does_not_depend_on_batches() -> None:
    rows = torch.arange(1000.0).reshape(-1, 1)
    whole = drawn(rows, 64)
    assert whole.shape == (64, 1)
    assert torch.equal(whole, drawn(rows, 64, 10, 390, 100, 500))
    assert torch.equal(drawn(rows[:40], 64).sort(0).values, rows[:40])  # fewer than asked for: all of them


def test_every_row_is_as_likely() -> None:
    rows = torch.arange(20000.0).reshape(-1, 1)
    tenths = torch.bincount((drawn(rows, 2000, *[100] * 200).flatten() / 2000).long(), minlength=10)
    assert int(tenths.sum()) == 2000
    assert int((tenths - 200).abs().max()) < 60  # four standard deviations of a fair draw


def test_memory_is_bounded() -> None:
    sample = Sample(50, 3)
    for batch in range(200):
        sample.add(torch.randn(20, 3), 20 * batch)
        assert sum(len(part) for part in sample._rows) <= 100


def observed(x: torch.Tensor, size: int) -> SiteStatistics:
    statistics = SiteStatistics.empty(x.shape[1], second_moment=False, sample_size=size)
    for part in x.split(100):
        statistics.update(part)
    return statistics


def test_moments_are_estimated_from_the_sample() -> None:
    torch.manual_seed(0)
    x = torch.randn(3000, 20) @ torch.randn(20, 20)
    exact = x.double().T @ x.double()
    all_rows = observed(x, 3000)
    torch.testing.assert_close(all_rows.moment().double(), exact, rtol=1e-5, atol=1e-2)
    some = observed(x, 1000)
    estimate = some.moment().double()
    assert float((estimate - exact).norm() / exact.norm()) < 0.1
    torch.testing.assert_close(some.diagonal(), some.moment().diagonal(), rtol=1e-5, atol=1e-3)
    blocks = some.blocks(8)
    assert blocks.shape == (3, 8, 8)
    torch.testing.assert_close(blocks[1], some.moment()[8:16, 8:16], rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(blocks[2, :4, :4], some.moment()[16:, 16:], rtol=1e-4, atol=1e-2)
    assert not blocks[2, 4:].any()


def test_samples_are_scaled_and_merged_with_their_statistics() -> None:
    torch.manual_seed(1)
    x = torch.randn(600, 4)
    scale = torch.tensor([1.0, 2.0, 4.0, 0.5])
    halved = observed(x, 100).divided(scale)
    assert torch.equal(halved.drawn(), observed(x, 100).drawn() / scale)
    both = observed(x[:300], 100).merge(observed(x[300:], 100))
    assert both.tokens == 600
    assert both.drawn().shape == (100, 4)


def test_no_sample_no_rows() -> None:
    with pytest.raises(DetentError, match="no sample"):
        SiteStatistics.empty(3, second_moment=True).drawn()


@pytest.mark.parametrize("channels", [40, 1500])  # whole, and the upper half in strips
def test_second_moments_are_sums_over_all_rows(channels: int) -> None:
    torch.manual_seed(2)
    x = torch.randn(700, channels)
    statistics = SiteStatistics.empty(channels, second_moment=True)
    for part in x.split([1, 300, 399]):
        statistics.update(part)
    exact = x.double().T @ x.double()
    assert float((statistics.moment().double() - exact).norm() / exact.norm()) < 3e-3  # factors may be bfloat16
    assert torch.equal(statistics.moment(), statistics.moment().T)
    statistics.update(x[:100])
    exact += x[:100].double().T @ x[:100].double()
    assert float((statistics.moment().double() - exact).norm() / exact.norm()) < 3e-3


def test_evenly_spread_rows_stand_for_all() -> None:
    torch.manual_seed(3)
    x = torch.randn(4000, 12) @ torch.randn(12, 12)
    statistics = SiteStatistics.empty(12, second_moment=True, cross_moment=True)
    for part in x.split(400):
        statistics.update(part, reference=2 * part, most=100)
    exact = x.double().T @ x.double()
    assert statistics.tokens == 4000
    assert float((statistics.moment().double() - exact).norm() / exact.norm()) < 0.1
    assert statistics.cross_moment is not None
    torch.testing.assert_close(statistics.cross_moment, 2 * statistics.moment(), rtol=1e-4, atol=1e-2)
