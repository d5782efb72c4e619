"""Statistics of a site, against float64 sums over all tokens at once."""

from __future__ import annotations

import pytest
import torch

from detent.errors import DetentError
from detent.statistics import SiteStatistics


def observed(*batches: torch.Tensor) -> SiteStatistics:
    statistics = SiteStatistics.empty(batches[0].shape[-1], second_moment=True)
    for batch in batches:
        statistics.update(batch)
    return statistics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_those_of_all_tokens(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(3, 50, 8) * torch.logspace(-2, 2, 8)).to(dtype)
    statistics = observed(*x)
    rows = x.reshape(-1, 8).double()
    assert statistics.tokens == 150
    assert torch.equal(statistics.amax.double(), rows.abs().amax(0))
    torch.testing.assert_close(statistics.mean_abs.double(), rows.abs().mean(0), rtol=1e-5, atol=0)
    scale = rows.abs().T @ rows.abs()
    assert float(((statistics.moment().double() - rows.T @ rows).abs() / scale).max()) < 1e-5


def test_merging_is_associative_and_commutative() -> None:
    torch.manual_seed(1)
    a, b, c = (observed(torch.randn(20, 5)) for _ in range(3))
    left, right = a.merge(b).merge(c), c.merge(b.merge(a))
    assert left.tokens == right.tokens == 60
    assert torch.equal(left.amax, right.amax)
    torch.testing.assert_close(left.moment(), right.moment(), rtol=1e-6, atol=1e-6)


def test_a_bad_activation_is_named() -> None:
    with pytest.raises(DetentError, match="block 3"):
        SiteStatistics.empty(2, second_moment=False).update(torch.tensor([[1.0, float("nan")]]), "block 3")


def test_a_moment_has_to_be_asked_for() -> None:
    with pytest.raises(DetentError, match="no second moment"):
        SiteStatistics.empty(2, second_moment=False).moment()
