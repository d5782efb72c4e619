"""`mse` against trying every candidate on every tile, one after the other."""

from __future__ import annotations

import pytest
import torch

import detent
from detent.algorithms import least_error_range, multipliers, weight_range
from detent.config import parse_format
from detent.errors import DetentError
from detent.formats import E4M3, Format, Scales, encode, fake_quantize, fp8, integer, nvfp4, per_channel, per_group
from detent.formats import scales_from_range as scales_of


def squared(weight: torch.Tensor, fmt: Format, scales: Scales) -> torch.Tensor:
    return (fake_quantize(weight, fmt, scales).double() - weight.double()) ** 2


def per_row_group(errors: torch.Tensor, size: int) -> torch.Tensor:
    """Sums over groups of a matrix's last axis, a short last one included."""
    return torch.stack([part.sum(1) for part in errors.split(size, 1)], 1)


FORMATS = [
    (integer(4, per_group(16), rule="qmax"), 16),
    (integer(2, per_group(16), rule="qmax"), 16),
    (parse_format("uint4_per_group_asym").with_granularity(per_group(16)), 16),
    (integer(3, per_group(16), signed=False, symmetric=False, float_zero_point=True), 16),
    (integer(3, per_channel(0), rule="qmax"), 40),
    (fp8("e4m3", per_channel(0)), 40),
]


@pytest.mark.parametrize(("fmt", "size"), FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_brute_force(fmt: Format, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(6, 40) ** 3 + 0.2).to(dtype)  # 40: the last group of 16 is short
    factors = multipliers()
    low, high = least_error_range(weight, fmt, factors)
    plain_low, plain_high = weight_range(weight, fmt)
    tried = [(plain_low, plain_high)] + [(plain_low * k, plain_high * k) for k in factors]
    errors = torch.stack([per_row_group(squared(weight, fmt, scales_of(fmt, lo, hi)), size) for lo, hi in tried])
    chosen = per_row_group(squared(weight, fmt, scales_of(fmt, low, high)), size)
    torch.testing.assert_close(chosen, errors.amin(0), rtol=1e-12, atol=0)
    assert (chosen <= errors[0]).all()  # never worse than round-to-nearest
    assert (chosen < errors[0]).any()


def test_sweep_tries_every_scale() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 32)
    fmt = nvfp4()
    low, high = least_error_range(weight, fmt, [], fp8_scale_sweep=True)
    outer = weight.abs().amax() / (6 * 448)
    chosen = squared(weight, fmt, scales_of(fmt, low, high, amax_tensor=weight.abs().amax()))
    errors = []
    for value in E4M3.values()[1:127]:
        scale = torch.full((4, 2), value).to(torch.float8_e4m3fn)
        errors.append(per_row_group(squared(weight, fmt, Scales(scale, None, outer)), 16))
    assert len(errors) == 126
    assert torch.equal(per_row_group(chosen, 16), torch.stack(errors).amin(0))


def test_four_over_six_preset_chooses_as_the_format_does() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 64)
    own = encode(weight, nvfp4(four_over_six=True))
    for algorithm in (detent.NVFP4_FOUR_OVER_SIX_CFG["algorithm"], "max"):
        model = torch.nn.Linear(64, 16, bias=False)
        model.weight.data = weight.clone()
        config = {"quant_cfg": detent.NVFP4_FOUR_OVER_SIX_CFG["quant_cfg"], "algorithm": algorithm}
        detent.quantize(model, config, lambda m: m(weight))
        codes = model.weight_quantizer.quantize_to_codes(weight)
        assert torch.equal(codes.outer_scale, own.outer_scale)  # type: ignore[arg-type]
        assert torch.equal(codes.scale.float(), own.scale.float())
        assert torch.equal(codes.codes, own.codes)
    six = encode(weight, nvfp4())
    assert not torch.equal(six.codes, own.codes)


def test_factors() -> None:
    assert len(multipliers()) == 39
    assert (multipliers()[0], multipliers()[-1]) == (0.25, 4.0)
    assert multipliers(0.5, 1.0, 1.5) == [1.0, 1.5]
    assert multipliers(0.1, 1.0, 1.0) == [1.0]
    assert multipliers(0.1, 0.5, 1.0) == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    for bad in ((0.0, 1.0, 2.0), (0.1, 2.0, 1.0), (0.1, 0.0, 1.0)):
        with pytest.raises(DetentError, match="mse"):
            multipliers(*bad)


def test_formats_without_a_scale_to_search() -> None:
    with pytest.raises(DetentError, match="no scale to search"):
        least_error_range(torch.randn(2, 32), parse_format("mxfp4"), [1.0])
    with pytest.raises(DetentError, match="fp8_scale_sweep needs"):
        least_error_range(torch.randn(2, 32), integer(4), [1.0], fp8_scale_sweep=True)


def test_zero_and_empty_weights() -> None:
    fmt = integer(4, per_group(16))
    low, high = least_error_range(torch.zeros(2, 32), fmt, multipliers())
    assert torch.equal(low, torch.zeros(2, 2))
    assert torch.equal(high, torch.zeros(2, 2))
    low, high = least_error_range(torch.zeros(0, 32), fmt, multipliers())
    assert low.shape == high.shape == (0, 2)
