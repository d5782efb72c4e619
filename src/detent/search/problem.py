"""The choice of one option for each unit under budgets: a multiple-choice knapsack, solved exactly by HiGHS.

Invariant: a solution keeps every limit exactly, not only within the solver's tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from detent.errors import DetentError

#: How far a solution may be from the best one, relative to it, before the search for a better one ends.
GAP = 1e-5
#: Seconds after which the best solution so far is taken; its gap says how good it is.
TIME_LIMIT = 60.0


@dataclass(frozen=True)
class Limit:
    """A budget.

    Attributes:
        name: what the user calls it.
        most: the most that a choice may cost.
        costs: for each unit, the cost of each of its options.
        fixed: what is spent whatever is chosen.
        per: what a cost is divided by where it is shown: a number of weights, for bits of each.
        text: how it is shown then.
    """

    name: str
    most: float
    costs: Sequence[Sequence[float]]
    fixed: float = 0.0
    per: float = 1.0
    text: str = "{:.6g}"

    def spent(self, picks: Sequence[int]) -> float:
        """What a choice costs."""
        return self.fixed + math.fsum(costs[pick] for costs, pick in zip(self.costs, picks, strict=True))

    def show(self, cost: float) -> str:
        """A cost as a message has it."""
        return self.text.format(cost / self.per)

    @property
    def least(self) -> float:
        """The least that any choice costs."""
        return self.fixed + math.fsum(min(costs) for costs in self.costs)


@dataclass(frozen=True)
class Solution:
    """The best choice.

    Attributes:
        picks: the number of the option of each unit.
        score: the sum of its scores.
        gap: no choice is better than ``score - gap``.
    """

    picks: tuple[int, ...]
    score: float
    gap: float


def solve(scores: Sequence[Sequence[float]], limits: Sequence[Limit]) -> Solution:
    """The choice with the least sum of scores that keeps all limits.

    Args:
        scores: for each unit, the score of each of its options.
        limits: the budgets.

    Raises:
        DetentError: no choice keeps the limits; the message says the least that is reachable.

    Example:
        >>> from detent.search.problem import Limit, solve
        >>> costs = [[4.0, 8.0], [4.0, 8.0]]
        >>> solve([[3.0, 1.0], [2.0, 1.5]], [Limit("bits", 12.0, costs)]).picks
        (1, 0)
    """
    for limit in limits:
        if limit.least > limit.most:
            raise DetentError(
                f"{limit.name} can't be {limit.show(limit.most)}: the least that the formats reach is"
                f" {limit.show(limit.least)}; raise it, or allow formats with fewer bits"
            )
    tight = list(limits)
    while True:
        solution = _solved(scores, tight)
        if solution is None:
            names = " and ".join(f"{limit.name} {limit.show(limit.most)}" for limit in limits)
            raise DetentError(f"{names} can't be met together, though each can alone; raise one of them")
        over = [limit.spent(solution.picks) - limit.most for limit in limits]
        if all(excess <= 0 for excess in over):
            return solution
        # HiGHS keeps a row within 1e-6; what that let through is taken off the limit.
        tight = [
            limit if excess <= 0 else replace(limit, most=limit.most - excess - 1e-9 * (limit.most - limit.least))
            for limit, excess in zip(tight, over, strict=True)
        ]


def _solved(scores: Sequence[Sequence[float]], limits: Sequence[Limit]) -> Solution | None:
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    unit = np.repeat(np.arange(len(scores)), [len(options) for options in scores])
    flat = np.concatenate([np.asarray(options, dtype=float) for options in scores])
    count = len(flat)
    choice = csr_array((np.ones(count), (unit, np.arange(count))), shape=(len(scores), count))
    constraints = [LinearConstraint(choice, 1, 1)]
    for limit in limits:
        # Above the least, and near 1: the solver's tolerance is then one of what there is to spend.
        row = np.concatenate([np.asarray(options, dtype=float) - min(options) for options in limit.costs])
        size = float(row.max()) or 1.0
        constraints.append(LinearConstraint(row[None] / size, -np.inf, max(0.0, limit.most - limit.least) / size))
    # HiGHS also stops at a gap of 1e-6 as such, which is far below any relative one where the largest score is 1e6.
    scale = float(np.abs(flat).max()) / 1e6 or 1.0
    found = milp(
        flat / scale,
        constraints=constraints,
        integrality=np.ones(count),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": GAP, "time_limit": TIME_LIMIT},
    )
    if found.x is None:
        return None
    starts = np.searchsorted(unit, np.arange(len(scores)))
    picks = tuple(int(np.argmax(found.x[s : s + len(o)])) for s, o in zip(starts, scores, strict=True))
    score = math.fsum(options[pick] for options, pick in zip(scores, picks, strict=True))
    bound = found.mip_dual_bound
    return Solution(picks, score, max(0.0, score - (found.fun if bound is None else bound) * scale))
