"""Which rows of which weight or norm make the channels of an activation, and the proof that a scale can move there.

Where channel j of an activation x is y_i (row i's output) times anything that doesn't depend on y_i, it is homogeneous
of degree one in y_i, and Euler's identity holds: ``sum y_i dx_j/dy_i = x_j``. With random weights r over tokens and c
over channels, one backward pass gives ``d_i = sum y_i d(sum r c x)/dy_i`` for every row at once. A row that multiplies
channel j alone has ``d_i = c_j sum r x_j``, for each of several r; one that multiplies several equal channels (keys and
values shared by query heads, seen with one token, where attention is the identity on values) has d_i proportional to
sum r x_j. So rows are recognised by value, in any order and layout: slices, interleaving, repetition. What this leaves
open (channels that share a row and differ by a gate) is found by scaling all rows of one producer by distinct factors
and looking for them in the ratio of channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from detent.structure.trace import Leaf, Producer, Reading, Trace
from detent.structure.values import combinations, factors

#: An activation with more sources than this is a sum that no single row multiplies.
_MOST_SOURCES = 24
#: Relative difference below which two numbers of a probe count as equal.
TOLERANCE = 1e-5

#: By producer, for each channel of a reading the row that multiplies it.
Rows = dict[str, Tensor]


class Matcher:
    """Finds rows while a probe runs: `look` is to be called with each reading.

    Attributes:
        rows: for each reading, in order, what was matched; {} where nothing was.
    """

    def __init__(self) -> None:
        self.rows: list[Rows] = []
        self._known: dict[tuple[str, frozenset[str]], list[Rows]] = {}

    def look(self, reading: Reading) -> None:
        if reading.kind != "weight":
            self.rows.append({})
            return
        # All fused experts behave alike, which the proof confirms: looking at two of them is enough.
        known = self._known.setdefault((reading.name, frozenset(leaf.producer for leaf in reading.leaves)), [])
        if len(known) < 2:
            known.append(self._match(reading))
        self.rows.append(known[-1])

    def _match(self, reading: Reading) -> Rows:
        x, leaves = reading.tensor, reading.leaves
        if x is None or not x.requires_grad or not leaves or len(leaves) > _MOST_SOURCES or x.shape[0] == 0:
            return {}
        weights = combinations(x.shape[0]).to(x.device, x.dtype)
        channels = factors(x.shape[1], seed=x.shape[1]).to(x.device, x.dtype)
        values = list(leaves.values())
        moved: list[list[Tensor]] = [[] for _ in values]
        for r in weights:
            cotangent = r[:, None] * channels
            gradients = torch.autograd.grad(x, values, cotangent, retain_graph=True, allow_unused=True)
            for leaf, value, gradient, sums in zip(leaves, values, gradients, moved, strict=True):
                product = value * gradient if gradient is not None else torch.zeros_like(value)
                sums.append(product.detach().movedim(leaf.axis, -1).reshape(-1, leaf.size).sum(0).double().cpu())
        rows: Rows = {}
        for leaf, sums in zip(leaves, moved, strict=True):
            found = _same(torch.stack(sums), reading.sums, channels.double().cpu(), x.shape[0])
            if bool((found >= 0).any()):
                before = rows.get(leaf.producer)
                rows[leaf.producer] = found if before is None else torch.where(before >= 0, before, found)
        return rows


def _same(sources: Tensor, sums: Tensor, channels: Tensor, rows: int) -> Tensor:
    """For each column of `sums` the column of `sources` that is `channels` times it, or proportional to it; or -1."""
    found = _nearest(sources, sums * channels)
    open_ = (found < 0).nonzero().flatten()
    if rows > 2 * len(sums) and len(open_):
        found[open_] = _nearest(_normalised(sources), _normalised(sums[:, open_]))
    return found


def _normalised(x: Tensor) -> Tensor:
    norm = x.norm(dim=0)
    return torch.where(norm > 0, x / norm.clamp_min(1e-300) * x[0].sign(), torch.nan)


def _nearest(sources: Tensor, targets: Tensor) -> Tensor:
    """For each column of `targets` the equal column of `sources`, or -1."""
    valid = (sources.isfinite().all(0) & (sources != 0).any(0)).nonzero().flatten()
    result = torch.full((targets.shape[1],), -1, dtype=torch.long, device=targets.device)
    if not len(valid):
        return result
    direction = torch.tensor([1.0, 0.618, -0.731, 0.437], dtype=sources.dtype, device=sources.device)[: len(sources)]
    line, order = (direction @ sources[:, valid]).sort()
    wanted = direction @ targets
    place = torch.searchsorted(line, wanted)
    open_ = torch.arange(len(wanted))
    scale = targets.abs().amax(0)
    closest = TOLERANCE * 0.01 * scale
    for step in (0, -1, 1, -2):  # neighbours on the line, one of which is the equal column, if there is one
        candidate = valid[order[(place[open_] + step).clamp(0, len(valid) - 1)]]
        difference = (sources[:, candidate] - targets[:, open_]).abs().amax(0)
        closer = difference < closest[open_]
        result[open_[closer]], closest[open_[closer]] = candidate[closer], difference[closer]
        # Of thousands of columns some are close by chance where a single token was seen; the right one is exact.
        open_ = open_[closest[open_] > 1e-13 * scale[open_]]
    return result


def match_factors(before: Trace, after: Trace, scaled: dict[str, Tensor], wanted: dict[int, str]) -> dict[int, Tensor]:
    """Rows from the ratio of two runs, the second with all rows of some producers multiplied by distinct factors.

    Args:
        before, after: the runs.
        scaled: the factors by producer.
        wanted: by number of a reading, the producer to look for.

    Returns:
        Rows by number of the reading, where each of its channels carries a factor.
    """
    found = {}
    for index, producer in wanted.items():
        old, new = before.readings[index].sums, after.readings[index].sums
        ratio = new / old
        spread = (ratio - ratio.mean(0)).abs().amax(0)
        line, order = scaled[producer].sort()
        place = torch.searchsorted(line, ratio.mean(0)).clamp(0, len(line) - 1)
        place = torch.where(
            (line[place] - ratio.mean(0)).abs() < (line[place - 1] - ratio.mean(0)).abs(), place, place - 1
        )
        rows = order[place]
        close = (line[place] - ratio.mean(0)).abs() < 1e-8
        if bool((close & (spread < 1e-8)).all()):
            found[index] = rows
    return found


@dataclass
class Group:
    """The readings of one site and what was found about its fold.

    Attributes:
        readings: their numbers in the trace.
        producer: the one producer of all channels, or None.
        rows: the row of each channel.
        reason: why it can't be folded; "" while it may.
        bound: whether the weights that read it are the reason, so that no fold at all is possible.
    """

    readings: list[int]
    producer: str | None = None
    rows: Tensor | None = None
    reason: str = ""
    bound: bool = False
    _scale: Tensor | None = field(default=None, repr=False)

    def scale(self, seed: int) -> Tensor:
        """A random scale of the site's channels, the same where channels share a row; float64."""
        if self._scale is None:
            assert self.rows is not None
            self._scale = factors(int(self.rows.max()) + 1, seed)[self.rows]
        return self._scale


def scale_change(
    groups: Iterable[tuple[int, Group]], sizes: dict[str, int]
) -> dict[str, Callable[[Tensor, int], Tensor]]:
    """What a probe's leaves go on as while the scales of `groups` (with their seeds) are folded into their rows."""
    divisors: dict[str, Tensor] = {}
    for seed, group in groups:
        if group.producer is None or group.rows is None:
            continue
        divisor = divisors.setdefault(group.producer, torch.ones(sizes[group.producer], dtype=torch.float64))
        divisor[group.rows] *= group.scale(seed)
    return {name: multiply(1 / divisor) for name, divisor in divisors.items()}


def multiply(factor: Tensor) -> Callable[[Tensor, int], Tensor]:
    """Multiply a leaf along its channel axis."""

    def change(value: Tensor, axis: int) -> Tensor:
        return value * factor.to(value).reshape(-1, *[1] * (-1 - axis))

    return change


def failures(before: Trace, after: Trace, scales: dict[int, Tensor]) -> list[int]:
    """Numbers of readings that are not what they were, once divided scales are multiplied back."""
    if [(r.kind, r.name, r.rows) for r in before.readings] != [(r.kind, r.name, r.rows) for r in after.readings]:
        return list(range(len(before.readings)))
    failed = []
    for index, (old, new) in enumerate(zip(before.readings, after.readings, strict=True)):
        sums = new.sums if index not in scales else new.sums * scales[index].to(new.sums)
        size = old.sums.abs().amax(0)
        if not bool(((sums - old.sums).abs().amax(0) <= TOLERANCE * size + 1e-9 * size.max()).all()):
            failed.append(index)
    return failed


def dependents(trace: Trace) -> dict[str, list[int]]:
    """By producer, the numbers of the readings that its leaves reach."""
    reached: dict[str, list[int]] = {}
    for index, reading in enumerate(trace.readings):
        for name in dict.fromkeys(leaf.producer for leaf in reading.leaves):
            reached.setdefault(name, []).append(index)
    return reached


def sizes(trace: Trace) -> dict[str, int]:
    """By producer, its number of rows."""
    return {leaf.producer: leaf.size for reading in trace.readings for leaf in reading.leaves}


__all__ = ["Group", "Leaf", "Matcher", "Producer", "dependents", "failures", "match_factors", "scale_change", "sizes"]
