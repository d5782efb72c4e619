"""The choice under budgets, against all choices that there are."""

from __future__ import annotations

import itertools
import random

import pytest

from detent import DetentError
from detent.search.problem import Limit, solve

#: Seconds per layer, of which no sum is a round number in binary.
UNEVEN = (0.1, 0.2, 0.3)


def best_of_all(scores: list[list[float]], limits: list[Limit]) -> float | None:
    """The least score of all choices that keep the limits."""
    found = [
        sum(row[pick] for row, pick in zip(scores, picks, strict=True))
        for picks in itertools.product(*(range(len(row)) for row in scores))
        if all(limit.spent(picks) <= limit.most for limit in limits)
    ]
    return min(found, default=None)


@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_best_of_all_choices(seed: int) -> None:
    dice = random.Random(seed)
    units = [dice.randint(1, 4) for _ in range(6)]
    scores = [[dice.random() * 10 ** dice.uniform(-6, 6) for _ in range(count)] for count in units]
    costs = [[dice.choice(UNEVEN) * dice.randint(1, 9) for _ in range(count)] for count in units]
    others = [[float(dice.randint(1, 100)) for _ in range(count)] for count in units]
    limits = [Limit("seconds", 6.0, costs), Limit("bytes", 250.0, others, fixed=17.0)]
    expected = best_of_all(scores, limits)
    if expected is None:
        with pytest.raises(DetentError):
            solve(scores, limits)
        return
    solution = solve(scores, limits)
    assert all(limit.spent(solution.picks) <= limit.most for limit in limits)
    assert solution.score <= expected * (1 + 1e-5)
    assert solution.score - solution.gap <= expected * (1 + 1e-9)


def test_a_budget_is_kept_to_the_last_bit() -> None:
    """A solver's row may be off by 1e-6; a budget may not."""
    costs = [[1e9, 1e9 + 100.0]] * 3
    scores = [[1.0, 0.0]] * 3
    limit = Limit("bits", 3e9 + 199.0, costs)
    solution = solve(scores, [limit])
    assert limit.spent(solution.picks) == 3e9 + 100.0


def test_what_cannot_be_met_says_the_least() -> None:
    costs = [[4.0, 8.0], [6.0, 16.0]]
    with pytest.raises(DetentError, match="bits can't be 4.5: the least that the formats reach is 5;"):
        solve([[1.0, 0.0]] * 2, [Limit("bits", 9.0, costs, per=2)])


def test_budgets_that_exclude_each_other() -> None:
    limits = [Limit("bits", 5.0, [[4.0, 8.0]]), Limit("latency", 1.0, [[2.0, 1.0]])]
    with pytest.raises(DetentError, match="bits 5 and latency 1 can't be met together, though each can alone"):
        solve([[0.0, 0.0]], limits)
