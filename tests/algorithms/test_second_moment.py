"""Algorithms under the second moment, against textbook versions in float64 that work on the tokens themselves."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import detent
from detent.algorithms import awq
from detent.algorithms.awq import Clipping, awq_scale
from detent.algorithms.gptq import Job, factorise, gptq
from detent.algorithms.objective import output_error, requantize, rounded_to_nearest
from detent.algorithms.scale_search import weighing_of, weighted_range
from detent.algorithms.smoothquant import smoothquant_scale
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
    (result,) = gptq([Job(w, fmt, q.scales)], factorise(moment, act_order=act_order))
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
    (result,) = gptq([Job(w, fmt, q.scales)], factorise(statistics_of(x).moment()))
    assert torch.equal(requantize(result.weight, fmt, q.scales), result.weight)
    plain = ((x.double() @ (requantize(w, fmt, q.scales) - w).double().T) ** 2).sum(0)
    ours = ((x.double() @ (result.weight - w).double().T) ** 2).sum(0)
    assert bool((ours <= plain * (1 + 1e-4) + 1e-9).all())
    assert float(ours.sum()) < float(plain.sum())
    quick = rounded_to_nearest(w, fmt, q.scales)
    assert result.before == pytest.approx(float(((x.double() @ (quick - w).double().T) ** 2).sum()), rel=1e-4)
    assert result.after == pytest.approx(float(ours.sum()), rel=1e-3)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_quick_rounding_differs_from_the_definition_between_two_codes_only(fmt: Format) -> None:
    w = torch.cat([weight(), 40 * weight(), torch.round(100 * weight()) / 64])
    scales = encode(w, fmt).scales
    quick, exact = rounded_to_nearest(w, fmt, scales), requantize(w, fmt, scales)
    assert torch.equal(requantize(quick, fmt, scales), quick)
    torch.testing.assert_close((quick - w).abs().double(), (exact - w).abs().double(), rtol=1e-5, atol=1e-6)
    assert float((quick != exact).double().mean()) < 0.1


def test_gptq_with_uncorrelated_inputs_is_plain_rounding() -> None:
    w, fmt = weight(), integer(4, per_group(16))
    q = encode(w, fmt)
    (result,) = gptq([Job(w, fmt, q.scales)], factorise(torch.eye(48)))
    assert torch.equal(result.weight, rounded_to_nearest(w, fmt, q.scales))


def test_gptq_refuses_what_it_cannot_serve() -> None:
    w = weight()
    micro, fmt = micro_exponent(6), integer(4, per_group(16))
    with pytest.raises(DetentError, match="one by one"):
        gptq([Job(w, micro, encode(w, micro).scales)], factorise(torch.eye(48)))
    with pytest.raises(DetentError, match="48 squared"):
        gptq([Job(w, fmt, encode(w, fmt).scales)], factorise(torch.eye(47)))
    with pytest.raises(DetentError, match="positive definite"):
        factorise(-torch.eye(48) + 2 * torch.ones(48, 48), damping=0.0)


def test_gptq_rounds_layers_of_one_site_as_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detent.algorithms.gptq._MOST_ELEMENTS", 10 * 48)
    x = tokens()
    factor = factorise(statistics_of(x).moment())
    jobs = []
    for rows, fmt in ((24, FORMATS[0]), (7, FORMATS[0]), (5, FORMATS[4])):
        w = weight(rows)
        jobs.append(Job(w, fmt, encode(w, fmt).scales, target=w * 1.01))
    together = gptq(jobs, factor)
    for job, result in zip(jobs, together, strict=True):
        (alone,) = gptq([job], factor)
        assert torch.equal(result.weight, alone.weight)
        assert (result.after, result.before) == pytest.approx((alone.after, alone.before), rel=1e-6)
        assert job.target is not None
        ours = ((x.double() @ (result.weight - job.target).double().T) ** 2).sum()
        assert result.after == pytest.approx(float(ours), rel=1e-3)
        assert result.energy == pytest.approx(float(((x.double() @ job.target.double().T) ** 2).sum()), rel=1e-4)


def test_smoothquant_scale_is_the_papers() -> None:
    x, w = tokens(), weight()
    seen = x.abs().amax(0)
    scale = smoothquant_scale(statistics_of(x).amax, (2 * w).abs().amax(0), 0.5)
    live = np.sort(seen[seen > 0].numpy())
    counted = seen.clamp_min(0.3 * float(live[(len(live) - 1) // 2]))
    wanted = counted.double().sqrt() / (2 * w.abs().amax(0).double()).sqrt()
    torch.testing.assert_close(scale.double(), wanted, rtol=1e-6, atol=0)
    usual = seen > 0.5 * seen.median()
    paper = seen.double().sqrt() / (2 * w.abs().amax(0).double()).sqrt()
    torch.testing.assert_close(scale.double()[usual], paper[usual], rtol=1e-6, atol=0)
    assert torch.equal(smoothquant_scale(seen, torch.zeros(48), 0.5), torch.ones(48))
    assert torch.equal(smoothquant_scale(torch.zeros(48), w.abs().amax(0), 0.5), torch.ones(48))


@pytest.mark.parametrize("level", [0.0, 1e-6, 1e-2, 1.0], ids=str)
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_smoothquant_helps_where_calibration_hardly_saw_some_channels(level: float, alpha: float) -> None:
    """Sixteen of 256 channels carry `level` of their usual size on calibration data, and all of it on held-out data."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.exp(torch.randn(256, generator=generator) * 0.7)
    spread[:3] *= 30
    calibration, held_out = (torch.randn(1024, 256, generator=generator) * spread for _ in range(2))
    calibration[:, torch.randperm(256, generator=generator)[:16]] *= level
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 64))
    config = {"*weight_quantizer": {"num_bits": 8, "axis": 0}, "*input_quantizer": {"num_bits": 8}}

    def error(algorithm: Any) -> float:
        rounded = copy.deepcopy(model)
        detent.quantize(rounded, {"quant_cfg": config, "algorithm": algorithm}, lambda m: m(calibration))
        with torch.no_grad():
            return float((rounded(held_out) - model(held_out)).norm() / model(held_out).norm())

    plain, smooth = error("max"), error({"method": "smoothquant", "alpha": alpha})
    assert smooth < 0.5 * plain


@pytest.mark.parametrize("level", [1e-6, 1e-3, 1.0], ids=str)
@pytest.mark.parametrize("method", ["awq_lite", "awq_full"])
def test_awq_helps_where_calibration_hardly_saw_some_channels(level: float, method: str) -> None:
    """A tenth of the channels carries `level` of its usual size on calibration data, and all of it on held-out data."""
    generator = torch.Generator().manual_seed(0)
    calibration, held_out = (torch.randn(256, 64, generator=generator) for _ in range(2))
    calibration[:, ::10] *= level
    calibration[:, 3] *= 30
    held_out[:, 3] *= 30
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    config = {"*weight_quantizer": {"num_bits": 4, "block_sizes": {-1: 16}}, "*input_quantizer": {"enable": False}}

    def error(algorithm: str) -> float:
        rounded = copy.deepcopy(model)
        detent.quantize(rounded, {"quant_cfg": config, "algorithm": algorithm}, lambda m: m(calibration))
        with torch.no_grad():
            return float((rounded(held_out) - model(held_out)).norm() / model(held_out).norm())

    assert error(method) < 0.8 * error("max")


@pytest.mark.parametrize("fmt", [FORMATS[0], FORMATS[2], FORMATS[5]], ids=str)
def test_awq_scale_lowers_the_error_that_it_says(fmt: Format) -> None:
    x, w = tokens(), weight()
    choice = awq_scale(statistics_of(x), [w], [fmt])

    def rounded(w: torch.Tensor) -> torch.Tensor:
        if fmt != FORMATS[0]:
            return fake_quantize(w, fmt)
        # The largest weight of a group lies midway between two codes: the one taken is what float32 division says.
        groups = w.reshape(24, 3, 16).numpy()
        unit = np.abs(groups).max(2, keepdims=True) / np.float32(7.5)
        return torch.from_numpy((np.rint(groups / unit).clip(-8, 7) * unit).reshape(24, 48))

    def loss(scale: torch.Tensor) -> float:
        return float(((x.double() @ (rounded(w * scale) / scale - w).double().T) ** 2).sum())

    assert choice.before == pytest.approx(loss(torch.ones(48)), rel=1e-4)
    assert choice.after == pytest.approx(loss(choice.scale), rel=1e-4)
    assert loss(choice.scale) < loss(torch.ones(48))


def test_weighted_range_is_the_best_candidate_of_each_group() -> None:
    x, w, fmt = tokens(), weight(), integer(3, per_group(16))
    factors = [1 - 0.05 * i for i in range(1, 11)]
    choice = weighted_range(w, fmt, weighing_of(statistics_of(x), fmt), factors)
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


def test_finer_factors_come_near_the_whole_grid() -> None:
    x, w, fmt = tokens(), weight(200), integer(3, per_group(16))
    weighing = weighing_of(statistics_of(x), fmt)
    coarse = [0.75, 0.5]
    whole = weighted_range(w, fmt, weighing, [1 - 0.05 * i for i in range(1, 11)])
    first = weighted_range(w, fmt, weighing, coarse)
    found = weighted_range(w, fmt, weighing, coarse, finer=(0.1, 0.05))
    assert whole.after <= found.after * (1 + 1e-6)
    assert found.after < first.after - 0.8 * (first.after - whole.after)
    shares = (found.high / weighted_range(w, fmt, weighing, []).high).flatten()
    assert float(shares.min()) >= 0.5 - 1e-6
    assert float(shares.max()) <= 1 + 1e-6


@pytest.mark.parametrize("rows", [20, 400])  # fewer and more than channels: measured on rows, or under G
def test_awq_from_a_sample(rows: int) -> None:
    x, w, fmt = tokens(count=rows), weight(), integer(4, per_group(16))
    sampled = SiteStatistics.empty(48, second_moment=False, sample_size=400)
    sampled.update(x)
    choice, wanted = (awq_scale(statistics, [w], [fmt]) for statistics in (sampled, statistics_of(x)))
    assert choice.before == pytest.approx(wanted.before, rel=1e-4)
    assert (choice.alpha, choice.beta) == (wanted.alpha, wanted.beta)
    torch.testing.assert_close(choice.scale, wanted.scale)


def test_objectives_measured_on_some_rows_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awq, "_MEASURED", 1 << 14)
    x, fmt = tokens(), integer(4, per_group(16))
    w = weight(2000)  # more than are measured
    choice = awq_scale(statistics_of(x), [w], [fmt])
    error = (fake_quantize(w, fmt) - w).double()
    assert choice.before == pytest.approx(float(((x.double() @ error.T) ** 2).sum()), rel=0.05)
    assert choice.after < choice.before


def test_nothing_is_clipped_where_the_whole_range_is_asked_for() -> None:
    x, w, fmt = tokens(), weight(), integer(4, per_group(16))
    statistics = statistics_of(x)
    kept = Clipping(1.0, 0.05, False).search(w, fmt, weighing_of(statistics, fmt))
    plain = weighted_range(w, fmt, weighing_of(statistics, fmt), [])
    assert torch.equal(kept.high, plain.high)
    assert kept.after == kept.before
