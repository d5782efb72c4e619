"""Algorithms under the second moment, against textbook versions in float64 that work on the tokens themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detent.algorithms.gptq import gptq
from detent.algorithms.objective import output_error, requantize
from detent.algorithms.scale_search import weighted_range
from detent.algorithms.smooth import awq_scale, smoothquant_scale
from detent.errors import DetentError
from detent.formats import (
    Format,
    encode,
    fake_quantize,
    fp8,
    integer,
    micro_exponent,
    mx,
    nvfp4,
    per_channel,
    per_group,
    scales_from_range,
)
from detent.statistics import SiteStatistics


def tokens(channels: int = 48, count: int = 400, seed: int = 0) -> torch.Tensor:
    """Correlated activations with an outlier channel and a dead one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, channels, generator=generator)
    x = x @ (torch.eye(channels) + 0.2 * torch.randn(channels, channels, generator=generator))
    x[:, 3] *= 30
    x[:, 7] = 0
    return x


def statistics_of(x: torch.Tensor) -> SiteStatistics:
    statistics = SiteStatistics.empty(x.shape[1], second_moment=True)
    statistics.update(x)
    return statistics


FORMATS = [
    integer(4, per_group(16)),
    integer(3, per_channel(0)),
    integer(2, per_group(16), symmetric=False),
    integer(8, per_channel(0), rule="qmax"),
    mx("e2m1"),
    nvfp4(),
    fp8(),
]


def weight(rows: int = 24, columns: int = 48) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(5)) * 0.1


def test_the_objective_is_the_output_error_over_all_tokens() -> None:
    x, d = tokens(), weight() * 0.01
    wanted = float(((x.double() @ d.double().T) ** 2).sum())
    assert float(output_error(d, statistics_of(x).moment())) == pytest.approx(wanted, rel=1e-5)


def textbook_gptq(w: np.ndarray, h: np.ndarray, round_to: list, order: np.ndarray, damping: float) -> np.ndarray:
    """Optimal brain quantization in a fixed order, with the inverse recomputed for the columns that are left."""
    w, h = w.astype(np.float64).copy(), h.astype(np.float64).copy()
    dead = np.diag(h) <= 0
    mean = np.diag(h)[~dead].mean()
    h[dead, dead] = mean
    h += damping * mean * np.eye(len(h))
    out, left = np.zeros_like(w), list(order)
    while left:
        j = left[0]
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        out[:, j] = round_to[j](w[:, j])
        error = (w[:, j] - out[:, j]) / inverse[0, 0]
        w[:, left] -= np.outer(error, inverse[0])
        left = left[1:]
    return out


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("fmt", [FORMATS[0], FORMATS[4]], ids=str)
def test_gptq_is_optimal_brain_quantization_column_by_column(fmt: Format, act_order: bool) -> None:
    x, w = tokens(), weight()
    moment = statistics_of(x).moment()
    q = encode(w, fmt)

    def rounding(j: int):  # type: ignore[no-untyped-def]
        def nearest(column: np.ndarray) -> np.ndarray:
            filled = w.clone()
            filled[:, j] = torch.from_numpy(column).float()
            return requantize(filled, fmt, q.scales)[:, j].double().numpy()

        return nearest

    diagonal = moment.diagonal()
    order = torch.argsort(diagonal, descending=True) if act_order else torch.arange(48)
    alive = [int(j) for j in order if diagonal[j] > 0]
    reference = textbook_gptq(w.numpy(), moment.numpy(), [rounding(j) for j in range(48)], np.array(alive), 0.01)
    result = gptq(w, moment, fmt, q.scales, act_order=act_order, block_size=16)
    alive_mask = diagonal > 0
    same = torch.isclose(result.weight[:, alive_mask].double(), torch.from_numpy(reference)[:, alive_mask.numpy()])
    assert float(same.double().mean()) > 0.99  # float32 updates may tip a tie the other way
    ours = ((x.double() @ (result.weight - w).double().T) ** 2).sum()
    theirs = reference.copy()
    theirs[:, ~alive_mask.numpy()] = requantize(w, fmt, q.scales)[:, ~alive_mask].numpy()
    textbook = ((x.double() @ torch.from_numpy(theirs - w.numpy()).T) ** 2).sum()
    assert float(ours) <= float(textbook) * 1.02


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_gptq_stays_on_the_grid_and_never_loses_to_plain_rounding(fmt: Format) -> None:
    x, w = tokens(), weight()
    q = encode(w, fmt)
    result = gptq(w, statistics_of(x).moment(), fmt, q.scales)
    assert torch.equal(requantize(result.weight, fmt, q.scales), result.weight)
    plain = ((x.double() @ (requantize(w, fmt, q.scales) - w).double().T) ** 2).sum(0)
    ours = ((x.double() @ (result.weight - w).double().T) ** 2).sum(0)
    assert bool((ours <= plain * (1 + 1e-4) + 1e-9).all())
    assert float(ours.sum()) < float(plain.sum())
    assert result.before == pytest.approx(float(plain.sum()), rel=1e-4)
    assert result.after == pytest.approx(float(ours.sum()), rel=1e-3)


def test_gptq_with_uncorrelated_inputs_is_plain_rounding() -> None:
    w, fmt = weight(), integer(4, per_group(16))
    q = encode(w, fmt)
    result = gptq(w, torch.eye(48), fmt, q.scales)
    assert torch.equal(result.weight, requantize(w, fmt, q.scales))


def test_gptq_refuses_what_it_cannot_serve() -> None:
    w = weight()
    with pytest.raises(DetentError, match="one by one"):
        gptq(w, torch.eye(48), micro_exponent(6), encode(w, micro_exponent(6)).scales)
    fmt = integer(4, per_group(16))
    with pytest.raises(DetentError, match="48 x 48"):
        gptq(w, torch.eye(47), fmt, encode(w, fmt).scales)
    with pytest.raises(DetentError, match="positive definite"):
        gptq(w, -torch.eye(48) + 2 * torch.ones(48, 48), fmt, encode(w, fmt).scales, damping=0.0)


def test_smoothquant_scale_is_the_papers() -> None:
    x, w = tokens(), weight()
    scale = smoothquant_scale(statistics_of(x).amax, (2 * w).abs().amax(0), 0.5)
    wanted = x.abs().amax(0).double().sqrt() / (2 * w.abs().amax(0).double()).sqrt()
    alive = torch.arange(48) != 7
    torch.testing.assert_close(scale.double()[alive], wanted[alive], rtol=1e-6, atol=0)
    assert float(scale[7]) == 1.0


@pytest.mark.parametrize("fmt", [FORMATS[0], FORMATS[2], FORMATS[5]], ids=str)
def test_awq_scale_lowers_the_error_that_it_says(fmt: Format) -> None:
    x, w = tokens(), weight()
    choice = awq_scale(statistics_of(x), [w], [fmt])

    def loss(scale: torch.Tensor) -> float:
        rounded = fake_quantize(w * scale, fmt) / scale
        return float(((x.double() @ (rounded - w).double().T) ** 2).sum())

    assert choice.before == pytest.approx(loss(torch.ones(48)), rel=1e-4)
    assert choice.after == pytest.approx(loss(choice.scale), rel=1e-4)
    assert choice.after < choice.before


def test_weighted_range_is_the_best_candidate_of_each_group() -> None:
    x, w, fmt = tokens(), weight(), integer(3, per_group(16))
    factors = [1 - 0.05 * i for i in range(1, 11)]
    choice = weighted_range(w, fmt, statistics_of(x).moment(), factors, block=True)
    low, high = choice.low, choice.high
    for row in range(w.shape[0]):
        for group in range(3):
            columns = slice(16 * group, 16 * group + 16)
            part, inputs = w[row : row + 1, columns], x[:, columns].double()
            losses = []
            for k in [1.0, *factors]:
                amax = part.abs().amax() * k
                scales = scales_from_range(fmt, -amax.reshape(1, 1), amax.reshape(1, 1))
                losses.append(float(((inputs @ (fake_quantize(part, fmt, scales) - part).double().T) ** 2).sum()))
            chosen = float(high[row, group] / part.abs().amax())
            index = int(np.argmin([abs(chosen - k) for k in [1.0, *factors]]))
            assert losses[index] <= min(losses) * (1 + 1e-4)
    assert torch.equal(low, -high)
