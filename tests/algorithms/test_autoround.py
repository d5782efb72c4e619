"""`autoround` and coordinate descent, against brute force over all codes of tiny problems and planted solutions."""

from __future__ import annotations

import itertools

import pytest
import torch

from detent.algorithms.autoround import OffsetWeight, autoround
from detent.algorithms.objective import requantize
from detent.errors import DetentError
from detent.formats import Format, Scales, integer, micro_exponent, per_channel, per_group
from rounding_problems import FORMATS, own_scales, problem


def is_encoded_exactly(weight: torch.Tensor, fmt: Format, scales: Scales) -> bool:
    return torch.equal(requantize(weight, fmt, scales), weight)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_begins_with_plain_rounding(fmt: Format) -> None:
    weight, _ = problem()
    scales = own_scales(weight, fmt)
    learned = OffsetWeight(weight, fmt, scales)
    values, kept = learned.result()
    # The zero point may move to the other side of a tie: then a value is as near from the other side.
    plain = requantize(weight, fmt, scales)
    assert torch.allclose((values - weight).abs(), (plain - weight).abs(), atol=1e-5)
    assert torch.allclose(kept.scale.float(), scales.scale.float(), rtol=1e-6)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_learns_and_stays_on_the_grid(fmt: Format) -> None:
    weight, x = problem()
    learned = OffsetWeight(weight, fmt, own_scales(weight, fmt))
    reference = x @ weight.T
    batches = list(range(3))

    def objective(index: int) -> torch.Tensor:
        rows = slice(20 * index, 20 * index + 20)
        return (x[rows] @ learned().T - reference[rows]).square().mean()

    tuned = autoround(objective, batches, [learned], iterations=60)
    values, scales = learned.result()
    error = float((x @ values.T - reference).square().mean())
    assert is_encoded_exactly(values, fmt, scales)
    assert error == pytest.approx(tuned.after, rel=1e-4)
    assert tuned.after <= tuned.before
    if fmt.symmetric:
        assert tuned.after < tuned.before


def test_comes_near_the_best_rounding_there_is() -> None:
    weight, x = problem(rows=2, width=8, seed=3)
    fmt = integer(3, per_channel(0))
    scales = own_scales(weight, fmt)
    moment = (x.T @ x).double()
    unit = scales.scale.double()
    floor = torch.floor(weight.double() / unit)
    best = torch.full((2,), torch.inf, dtype=torch.float64)
    for up in itertools.product((0, 1), repeat=8):  # every way of rounding up or down
        codes = (floor + torch.tensor(up)).clamp(-4, 3)
        d = codes * unit - weight.double()
        best = torch.minimum(best, ((d @ moment) * d).sum(1))
    learned = OffsetWeight(weight, fmt, scales)
    reference = x @ weight.T
    tuned = autoround(lambda _: (x @ learned().T - reference).square().sum(), [0], [learned], iterations=200)
    # Ranges are learned too, so it may even beat every rounding under the plain scales.
    assert tuned.after < 1.3 * float(best.sum())
    assert tuned.after < 0.5 * tuned.before


@pytest.mark.parametrize("zero_point", [None, 4])
def test_finds_a_planted_range(zero_point: int | None) -> None:
    """A range a quarter too wide: the weight is on the grid of 0.8 times that."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (4, 32), generator=generator).float() - (8 if zero_point is None else zero_point)
    weight = codes * 0.1
    wide = torch.full((4, 1), 0.125)
    if zero_point is None:
        fmt, scales = integer(4, per_group(32)), Scales(wide)
    else:
        fmt = integer(4, per_group(32), symmetric=False, signed=False)
        scales = Scales(wide, torch.full((4, 1), zero_point, dtype=torch.int32))
    x = torch.randn(200, 32, generator=generator)
    learned = OffsetWeight(weight, fmt, scales)
    tuned = autoround(lambda _: (x @ (learned() - weight).T).square().mean(), [0], [learned], iterations=200)
    assert tuned.after < 0.1 * tuned.before


def test_keeps_plain_rounding_when_nothing_is_better() -> None:
    fmt = integer(4, per_group(8))
    weight = requantize(torch.randn(4, 16), fmt, Scales(torch.full((4, 2), 0.25)))
    learned = OffsetWeight(weight, fmt, Scales(torch.full((4, 2), 0.25)))
    tuned = autoround(lambda _: (learned() - weight).square().sum(), [0], [learned], iterations=20)
    assert (tuned.before, tuned.after, tuned.kept) == (0.0, 0.0, 0)
    assert torch.equal(learned.result()[0], weight)


def test_refuses_what_it_cannot_serve() -> None:
    weight = torch.randn(4, 16)
    with pytest.raises(DetentError, match="autoround: .*chooses codes jointly"):
        OffsetWeight(weight, micro_exponent(4), own_scales(weight, micro_exponent(4)))
    with pytest.raises(DetentError, match="no weights to train"):
        autoround(lambda _: torch.zeros(()), [0], [])
    learned = OffsetWeight(weight, integer(4, per_group(8)), own_scales(weight, integer(4, per_group(8))))
    with pytest.raises(DetentError, match="at least one batch"):
        autoround(lambda _: torch.zeros(()), [], [learned])
    with pytest.raises(DetentError, match="became nan"):
        autoround(lambda _: learned().sum() * torch.nan, [0], [learned])
