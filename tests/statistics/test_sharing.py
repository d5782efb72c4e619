"""Statistics of shares of the data, put together."""

from __future__ import annotations

import torch

from detent.statistics import SiteStatistics


def test_a_sample_of_shares_has_the_rows_of_a_sample_of_all() -> None:
    """Batches are dealt out to two observers, which know where in the data each begins; 20 of 96 rows are kept."""
    batches = torch.randn(6, 16, 8, generator=torch.Generator().manual_seed(0))
    one, *two = (SiteStatistics.empty(8, second_moment=False, sample_size=20) for _ in range(3))
    for number, batch in enumerate(batches):
        one.update(batch)
        two[number % 2].update(batch, first=16 * number)
    both = two[0].merge(two[1])
    assert both.drawn().shape == (20, 8)
    assert torch.equal(both.drawn(), one.drawn())
    # Bit by bit: nothing that is made of it depends on who saw which batch.
    assert torch.equal(both.mean_abs, one.mean_abs)
