"""Learned weights and distillation: gradients against finite differences, planted solutions, and nothing made worse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from detent.algorithms.distill import Rates, distill, divergence
from detent.algorithms.learned import LearnedWeight, nearest
from detent.algorithms.objective import requantize
from detent.errors import DetentError
from detent.formats import Format, Scales, encode, integer, micro_exponent, nvfp4, per_group
from rounding_problems import FORMATS, own_scales


def weight_of(rows: int = 6, width: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_begins_with_the_rounded_weight(fmt: Format) -> None:
    weight = weight_of()
    scales = own_scales(weight, fmt)
    rounded = requantize(weight * 0.9, fmt, scales)  # some codes other than the nearest to `weight`
    learned = LearnedWeight(weight, fmt, scales, rounded=rounded)
    values, kept = learned.result()
    assert torch.equal(learned().detach(), rounded)
    assert torch.equal(values, rounded)
    assert torch.equal(kept.scale.float(), scales.scale.float())


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_whatever_is_trained_stays_on_the_grid(fmt: Format) -> None:
    weight = weight_of()
    learned = LearnedWeight(weight, fmt, own_scales(weight, fmt))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        learned.position += 0.5 * torch.randn(learned.position.shape, generator=generator)
        if learned.stretch is not None:
            learned.stretch += 0.3 * torch.randn(learned.stretch.shape, generator=generator)
    learned.settle()
    values, scales = learned.result()
    again = encode(values, fmt, scales)
    assert torch.equal(values, learned().detach())
    assert torch.equal(requantize(values, fmt, again.scales), values)
    assert float(learned.position.detach().amax()) <= fmt.element.maximum
    assert (learned.stretch is None) == (fmt.scale.bits == 8)


def test_gradients() -> None:
    """Of the scale: exact, by finite differences. Of positions: the scale, since rounding counts as the identity."""
    fmt = integer(4, per_group(10))
    weight = weight_of().double().float()
    learned = LearnedWeight(weight, fmt, own_scales(weight, fmt))
    probe = weight_of(seed=2)
    (learned() * probe).sum().backward()
    assert learned.stretch is not None
    assert learned.stretch.grad is not None
    assert learned.position.grad is not None
    step = 1e-3
    for tile in range(3):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                learned.stretch[tile] += sign * step
                values.append(float((learned().double() * probe).sum()))
                learned.stretch[tile] -= sign * step
        assert float(learned.stretch.grad[tile]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-2)
    unit = own_scales(weight, fmt).scale.repeat_interleave(10, 1)
    assert torch.allclose(learned.position.grad.reshape(6, 20), probe * unit, rtol=1e-5)


def test_no_gradient_beyond_the_range() -> None:
    position = torch.tensor([-9.0, -8.4, 0.3, 7.4, 7.6], requires_grad=True)
    nearest(position, integer(4).element).sum().backward()
    assert position.grad is not None
    assert position.grad.tolist() == [0, 1, 1, 1, 0]


def model_of(width: int, classes: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.LayerNorm(24), nn.Linear(24, classes))


def test_distillation_brings_a_model_back() -> None:
    model = model_of(16, 10, 0)
    fmt = integer(2, per_group(8))
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(32, 16, generator=generator) for _ in range(24)]
    with torch.no_grad():
        references = [model(x) for x in inputs]
    first, last = model[0], model[3]
    weights = [LearnedWeight(m.weight.detach(), fmt, own_scales(m.weight.detach(), fmt)) for m in (first, last)]

    def objective(index: int) -> torch.Tensor:
        x = torch.nn.functional.linear(inputs[index], weights[0](), first.bias)
        x = torch.nn.functional.linear(model[2](model[1](x)), weights[1](), last.bias)
        return divergence(x, references[index])

    before = [w.result()[0] for w in weights]
    norms = list(model[2].parameters())
    done = distill(objective, range(20), range(20, 24), weights, norms, steps=60, rates=Rates(0.02, 0.01, 0.005))
    assert done.after < 0.6 * done.before
    assert done.kept > 0
    assert done.after == pytest.approx(sum(float(objective(i).detach()) for i in range(20, 24)) / 4, rel=1e-5)
    assert not torch.equal(weights[0].result()[0], before[0])
    assert all(p.grad is None for p in norms)


def test_ends_with_the_mean_of_the_last_steps() -> None:
    weight, fmt = weight_of(), integer(4, per_group(10))
    goal = torch.randn(6, 20, generator=torch.Generator().manual_seed(2))

    def train(average: float) -> tuple[list[torch.Tensor], torch.Tensor]:
        learned, seen = LearnedWeight(weight, fmt, own_scales(weight, fmt)), []

        def objective(_: int) -> torch.Tensor:
            seen.append(learned.position.detach().clone())
            return (learned() - goal).square().mean()

        done = distill(objective, [0], [0], [learned], steps=10, rates=Rates(0.05, 0, 0), average=average, checks=1)
        assert done.kept == 10
        return seen[1:-1], learned.position.detach()

    steps, last = train(0.0)
    assert len(steps) == 10
    *_, end = train(0.3)
    assert torch.allclose(end, (steps[8] + steps[9] + last) / 3, atol=1e-6)
    assert not torch.allclose(end, last, atol=1e-4)


def test_finds_planted_codes() -> None:
    """The best possible answer is on the grid: distillation from a few wrong codes finds it."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-2, 2, (4, 16), generator=generator).float()
    fmt = integer(2, per_group(16))
    scales = Scales(torch.full((4, 1), 0.5))
    truth = codes * 0.5
    wrong = truth.clone()
    wrong[:, ::5] = (codes[:, ::5] + torch.where(codes[:, ::5] > 0, -1, 1)) * 0.5
    learned = LearnedWeight(wrong, fmt, scales, rounded=wrong)
    inputs = [torch.randn(16, 16, generator=generator) for _ in range(10)]

    def objective(index: int) -> torch.Tensor:
        return (inputs[index] @ (learned() - truth).T).square().mean()

    done = distill(objective, range(8), [8, 9], [learned], steps=200, rates=Rates(0.02, 0.0005, 0.0))
    assert done.after < 1e-2 * done.before
    values, kept = learned.result()
    assert torch.equal((values / kept.scale).round(), codes)


def test_keeps_the_start_when_training_makes_it_worse() -> None:
    weight = weight_of()
    fmt = integer(4, per_group(10))
    learned = LearnedWeight(weight, fmt, own_scales(weight, fmt))
    start = learned.result()
    # Held out is the opposite of what is trained on.
    done = distill(lambda sign: sign * (learned() - weight).square().sum() + 10, [-1.0], [1.0], [learned], steps=20)
    values, scales = learned.result()
    assert (done.kept, done.after) == (0, done.before)
    assert torch.equal(values, start[0])
    assert torch.equal(scales.scale, start[1].scale)


def test_divergence_is_the_textbook_one() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 5, generator=generator), torch.randn(2, 3, 5, generator=generator)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    p, q = torch.softmax(b.double(), -1), torch.softmax(a.double(), -1)
    per_token = (p * (p.log() - q.log())).sum(-1)
    assert float(divergence(a, b)) == pytest.approx(float(per_token.mean()), rel=1e-5)
    assert float(divergence(a, b, mask)) == pytest.approx(float(per_token[mask].mean()), rel=1e-5)


def test_refuses_what_it_cannot_serve() -> None:
    weight = weight_of(width=32)
    with pytest.raises(DetentError, match="learned rounding: .*chooses codes jointly"):
        LearnedWeight(weight, micro_exponent(4), own_scales(weight, micro_exponent(4)))
    learned = LearnedWeight(weight, nvfp4(), own_scales(weight, nvfp4()))
    with pytest.raises(DetentError, match="no weights to train"):
        distill(lambda _: torch.zeros(()), [0], [0], [], steps=1)
    with pytest.raises(DetentError, match="at least one batch"):
        distill(lambda _: torch.zeros(()), [0], [], [learned], steps=1)
    with pytest.raises(DetentError, match="became nan in step 1; use lower rates"):
        distill(lambda _: learned().sum() * math.nan, [0], [0], [learned], steps=3)
