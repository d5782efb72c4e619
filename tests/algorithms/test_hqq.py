"""`hqq`: its objective recomputed in float64 from what the format makes of the weight."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from detent.algorithms.hqq import hqq_range
from detent.algorithms.max import weight_range
from detent.errors import DetentError
from detent.formats import Format, fake_quantize, scales_from_range
from detent.formats.format import bfp16, fp8, integer, mx, nf4, nvfp4, progressive
from detent.formats.granularity import per_block, per_channel, per_group

FLOAT_ZERO = {"signed": False, "symmetric": False, "float_zero_point": True}
FORMATS = [
    integer(4, per_group(16)),
    integer(3, per_channel(0), rule="qmax"),
    integer(4, per_group(16), signed=False),
    integer(2, per_group(16), **FLOAT_ZERO),
    integer(4, per_group(16), **FLOAT_ZERO),
    integer(4, per_group(16), signed=False, symmetric=False),
    integer(8),
    integer(4, per_block({-1: 16, -2: 16})),
    nf4(per_group(16)),
    fp8(),
    nvfp4(),
]


def weights() -> Tensor:
    torch.manual_seed(0)
    weight = torch.randn(24, 56) * torch.rand(24, 1)  # groups of 16 leave a short one
    weight[3, 5] = 30.0
    return weight + 0.2


def oracle(weight: Tensor, fmt: Format, low: Tensor, high: Tensor, p: float) -> float:
    outer = weight.abs().amax() if getattr(fmt.scale, "outer", False) else None
    values = fake_quantize(weight, fmt, scales_from_range(fmt, low, high, amax_tensor=outer))
    return float((weight.double() - values.double()).abs().pow(p).sum())


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("p", [0.7, 1.0])
def test_objective_is_what_it_says_and_never_rises(fmt: Format, p: float) -> None:
    weight = weights()
    result = hqq_range(weight, fmt, lp_norm=p)
    assert result.low.shape == result.high.shape == fmt.granularity.grid((24, 56))
    assert result.before == pytest.approx(oracle(weight, fmt, *weight_range(weight, fmt), p), rel=1e-5)
    assert result.after == pytest.approx(oracle(weight, fmt, result.low, result.high, p), rel=1e-5)
    assert result.after <= result.before


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.bits <= 4], ids=str)
def test_few_bits_gain(fmt: Format) -> None:
    result = hqq_range(weights(), fmt)
    assert result.after < 0.99 * result.before


@pytest.mark.parametrize("fmt", FORMATS[:2], ids=str)
def test_every_tile_is_at_least_as_good_as_plain(fmt: Format) -> None:
    weight = weights()
    result = hqq_range(weight, fmt)
    plain = fake_quantize(weight, fmt)
    ours = fake_quantize(weight, fmt, scales_from_range(fmt, result.low, result.high))
    group = fmt.granularity.group_size or 56
    for start in range(0, 56, group):
        part = slice(start, start + group)
        errors = [(weight - q)[:, part].double().abs().sum(1) for q in (ours, plain)]
        assert bool((errors[0] <= errors[1] + 1e-6).all())


def test_a_free_zero_point_moves() -> None:
    """The published case: codes whose zero point is optimised beside the scale."""
    fmt = integer(2, per_group(16), **FLOAT_ZERO)
    weight = weights()
    result = hqq_range(weight, fmt, lp_norm=0.7)
    plain_low, plain_high = weight_range(weight, fmt)
    centre, plain_centre = result.low + result.high, plain_low + plain_high
    assert bool(((centre - plain_centre).abs() > 1e-3).any())


def test_zeros_and_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = integer(4, per_group(16))
    zeros = hqq_range(torch.zeros(4, 32), fmt)
    assert (zeros.before, zeros.after) == (0, 0)
    weight = weights()
    whole = hqq_range(weight, fmt, iters=2)
    monkeypatch.setattr("detent.algorithms.mse._PIECE", 100)
    pieces = hqq_range(weight, fmt, iters=2)
    torch.testing.assert_close(pieces.high, whole.high)


@pytest.mark.parametrize("fmt", [mx("e2m1"), bfp16(), progressive()], ids=str)
def test_formats_without_a_scale_to_choose_are_refused(fmt: Format) -> None:
    with pytest.raises(DetentError, match="hqq: .* has no float scale to choose"):
        hqq_range(weights(), fmt)


@pytest.mark.parametrize("p", [0.0, 1.5])
def test_other_norms_are_refused(p: float) -> None:
    with pytest.raises(DetentError, match="lp_norm must be in"):
        hqq_range(weights(), replace(FORMATS[0]), lp_norm=p)
