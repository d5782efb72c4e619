"""Gradients, errors, saturation and known values of the three verbs."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from detent import formats as df
from detent.errors import DetentError
from detent.formats import FloatScale, Format, Integer
from formats.cases import BY_NAME, CASES, DTYPES, Case, bits, random_tensor

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
UNSIGNED = Format(Integer(8, signed=False), df.per_tensor(), FloatScale(rule="qmax"))


@every_case
def test_gradient_passes_straight_through(case: Case) -> None:
    fmt, _ = case.native()
    x = random_tensor((3, 37), "float32").requires_grad_()
    y = df.fake_quantize(x, fmt)
    assert torch.equal(y, df.fake_quantize(x.detach(), fmt))
    upstream = torch.randn(3, 37)
    y.backward(upstream)
    assert torch.equal(x.grad, upstream)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_is_zero_outside_the_clipping_range(dtype: str) -> None:
    x = torch.tensor([[-2.0, -1.0, 0.5, 1.0], [3.0, 4.0, -4.5, float(torch.finfo(DTYPES[dtype]).max)]])
    x = x.to(DTYPES[dtype]).requires_grad_()
    fmt = df.integer(8, df.per_channel(0))
    amax = torch.tensor([[1.0], [4.0]])
    scales = df.scales_from_range(fmt, -amax, amax)
    upstream = torch.full((2, 4), 7.0, dtype=x.dtype)
    upstream[1, 3] = torch.inf
    df.fake_quantize(x, fmt, scales, clip=(-amax, amax)).backward(upstream)
    assert x.grad.dtype == x.dtype
    assert x.grad.tolist() == [[0, 7, 7, 7], [7, 7, 0, 0]]


def test_clipping_bounds_are_not_rounded_to_the_inputs_dtype() -> None:
    """1.003 lies below 1.0078125, the next bfloat16; rounding the bound would let the value just above it pass."""
    x = torch.tensor([1.0078125, 1.0], dtype=torch.bfloat16, requires_grad=True)
    bound = torch.tensor(1.0059)  # rounds up to 1.0078125
    fmt = df.integer(8)
    df.fake_quantize(x, fmt, df.scales_from_range(fmt, -bound, bound), clip=(-bound, bound)).sum().backward()
    assert x.grad.tolist() == [0, 1]


def test_gradient_of_strided_input_and_groups() -> None:
    base = random_tensor((40, 6), "float32").requires_grad_()
    x = base.t()
    amax = torch.full((6, 3), 1.0)
    fmt = df.integer(4, df.per_group(16))
    df.fake_quantize(x, fmt, df.scales_from_range(fmt, -amax, amax), clip=(-amax, amax)).sum().backward()
    assert torch.equal(base.grad, (base.abs() <= 1).float())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@every_case
def test_not_a_number_is_refused_by_name(case: Case, bad: float) -> None:
    fmt, _ = case.native()
    good = random_tensor((4, 40), "float32")
    scales = df.encode(good, fmt).scales
    for dtype, where in zip(DTYPES.values(), [(0, 0), (2, 17), (3, 39)], strict=True):
        x = good.to(dtype, copy=True)
        x[where] = bad
        for call in (
            lambda: df.encode(x, fmt, name="decoder.3.weight"),  # noqa: B023
            lambda: df.encode(x, fmt, scales, name="decoder.3.weight"),  # noqa: B023
            lambda: df.fake_quantize(x, fmt, name="decoder.3.weight"),  # noqa: B023
            lambda: df.fake_quantize(x, fmt, scales, name="decoder.3.weight"),  # noqa: B023
            lambda: df.fake_quantize(x.clone().requires_grad_(), fmt, name="decoder.3.weight"),  # noqa: B023
        ):
            with pytest.raises(DetentError, match=r"decoder\.3\.weight: 1 of 160 values are NaN or infinite"):
                call()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_is_found_in_tensors_of_any_size(bad: float) -> None:
    """Long tiles, many tiles, one scale, groups of any length: each takes another way through the code."""
    x = torch.ones(40, 5000)
    x[39, 4999] = bad
    groups = df.nvfp4().with_granularity(df.per_group(5000))
    formats = [
        df.integer(8),
        df.integer(8, df.per_token()),
        df.integer(4, df.per_group(128)),
        df.mx("e2m1"),
        df.nvfp4(),
    ]
    asymmetric = df.integer(4, df.per_token(), signed=False, symmetric=False)
    for fmt in [*formats, groups, df.fp8(), df.progressive(), df.bfp16(), asymmetric]:
        for call in (df.fake_quantize, df.encode):
            with pytest.raises(DetentError, match="layer: 1 of 200000 values"):
                call(x, fmt, name="layer")
    static = df.encode(torch.ones(40, 5000), df.integer(8)).scales
    with pytest.raises(DetentError, match="layer: 1 of 200000 values"):
        df.fake_quantize(x, df.integer(8), static, name="layer")


def test_negative_values_need_a_format_that_holds_them() -> None:
    x = torch.tensor([0.0, 1.0, -0.25])
    for call in (df.encode, df.fake_quantize):
        with pytest.raises(DetentError, match=r"gelu\.out: negative values \(down to -0\.25\)"):
            call(x, UNSIGNED, name="gelu.out")
    scales = df.encode(x.abs(), UNSIGNED).scales
    for call in (df.encode, df.fake_quantize):
        with pytest.raises(DetentError, match=r"gelu\.out: negative values"):
            call(x, UNSIGNED, scales, name="gelu.out")


def test_unsigned_integers_from_zero_up_use_every_code() -> None:
    x = torch.arange(256.0)
    assert df.encode(x, UNSIGNED).codes.tolist() == list(range(256))
    assert df.encode(x, Format(Integer(8, signed=False), df.per_tensor(), FloatScale())).scale == 1.0
    assert torch.equal(df.fake_quantize(torch.tensor([0.0, -0.0, 255.0]), UNSIGNED), torch.tensor([0.0, 0.0, 255.0]))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    for call in (df.encode, df.fake_quantize):
        with pytest.raises(DetentError, match="head: can quantize float32, bfloat16 and float16"):
            call(torch.zeros(4, dtype=torch.float32).to(dtype), df.integer(8), name="head")


def test_an_axis_that_the_tensor_lacks_is_refused() -> None:
    for granularity in (df.per_channel(2), df.per_channel(-3), df.per_block({3: 4})):
        for call in (df.encode, df.fake_quantize):
            with pytest.raises(DetentError, match=r"needs axis .* shape \(2, 3\)"):
                call(torch.ones(2, 3), df.integer(8, granularity))
    with pytest.raises(DetentError, match="needs axis -1"):
        df.encode(torch.ones(()), df.integer(8, df.per_group(16)))


def test_scales_of_another_shape_are_refused() -> None:
    fmt = df.integer(8, df.per_channel(0))
    scales = df.encode(torch.ones(3, 4), fmt).scales
    for call in (df.encode, df.fake_quantize):
        with pytest.raises(DetentError, match=r"q_proj: .* takes scales of shape \(5, 1\)"):
            call(torch.ones(5, 4), fmt, scales, name="q_proj")


def test_ranges_must_be_finite_and_in_order() -> None:
    for low, high in [(0.0, float("nan")), (float("-inf"), 1.0), (2.0, 1.0)]:
        with pytest.raises(DetentError, match="calibrated ranges must be finite"):
            df.scales_from_range(df.integer(8), torch.tensor(low), torch.tensor(high))


def test_static_scales_saturate() -> None:
    one = torch.ones(())
    x = torch.tensor([100.0, -100.0, 3e38, -3e38])
    for fmt, top, bottom in [
        (df.integer(8, rule="qmax"), 1.0, -128 / 127),
        (df.integer(8, rule="qmax", narrow=True), 1.0, -1.0),
        (df.integer(4, signed=False, rule="qmax"), 1.0, -8 / 7),
        (df.fp8(), 1.0, -1.0),
        (df.nf4(df.per_tensor()), 1.0, -1.0),
    ]:
        y = df.fake_quantize(x, fmt, df.scales_from_range(fmt, -one, one))
        torch.testing.assert_close(y, torch.tensor([top, bottom, top, bottom]), msg=str(fmt))


@every_case
def test_the_largest_numbers_stay_finite(case: Case) -> None:
    fmt, _ = case.native()
    for dtype in DTYPES.values():
        top = torch.finfo(dtype).max
        x = torch.tensor(
            [[top, -top, top / 2, 0.0], [-top, -top, -top, -top], [top, 1.0, -1.0, 0.0]], dtype=torch.float64
        )
        x = x.to(dtype)
        assert torch.isfinite(df.fake_quantize(x, fmt)).all()
        q = df.encode(x, fmt)
        assert torch.isfinite(df.decode(q, dtype)).all()
        if fmt.base is None:
            assert df.encode(df.decode(q), fmt, q.scales) == q


def test_group_scale_that_underflows_stands_for_zero() -> None:
    """2^-9 (the smallest E4M3) times a subnormal outer scale can be 0 in float32; nothing may turn into NaN."""
    x = torch.zeros(3, 32)
    x[0, 0], x[1, 5], x[1, 20] = 1e-40, -3e-45, 1e-42
    q = df.encode(x, df.nvfp4())
    assert q.outer_scale > 0
    y = df.fake_quantize(x, df.nvfp4())
    assert torch.isfinite(y).all()
    assert (bits(y) == bits(df.decode(q))).all()
    assert df.encode(df.decode(q), df.nvfp4(), q.scales) == q
    assert y[0, 0] == pytest.approx(1e-40, rel=0.05)


def test_outer_scale_far_below_the_values_saturates() -> None:
    x = torch.full((1, 16), 1e30)
    y = df.fake_quantize(x, df.nvfp4(), outer_scale=torch.tensor(1e-30))
    torch.testing.assert_close(y, torch.full((1, 16), 6 * 448 * 1e-30))
    assert (bits(df.decode(df.encode(x, df.nvfp4(), outer_scale=torch.tensor(1e-30)))) == bits(y)).all()


def test_subnormals_flushed_by_the_processor_give_no_nan() -> None:
    """torch.set_flush_denormal is the user's choice; zeros beside tiny numbers must still come out as numbers."""
    x = torch.tensor([[0.0, 1e-38, -1e-38, 2e-38] * 8, [0.0, 1e-40, -1e-45, 0.0] * 8])
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor can't flush subnormals")
    try:
        for case in CASES:
            assert torch.isfinite(df.fake_quantize(x, case.native()[0])).all(), case.name
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("state", ["dtype", "device", "inference", "autocast"])
def test_global_torch_state_changes_nothing(state: str) -> None:
    x = random_tensor((5, 40), "bfloat16")
    expected = {case.name: df.encode(x, case.native()[0]) for case in CASES}
    before = torch.get_default_dtype()
    context = {
        "dtype": torch.no_grad(),
        "device": torch.device("meta"),
        "inference": torch.inference_mode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
    }[state]
    try:
        if state == "dtype":
            torch.set_default_dtype(torch.float64)
        with context:
            for case in CASES:
                fmt = case.native()[0]
                q, y = df.encode(x, fmt), df.fake_quantize(x, fmt)
                assert q == expected[case.name], case.name
                assert y.dtype == x.dtype
                assert (bits(y) == bits(df.decode(q, x.dtype))).all()
    finally:
        torch.set_default_dtype(before)


def test_equality_sees_every_bit() -> None:
    q = df.encode(torch.tensor([[0.0, 1.0]]), df.mx("e2m1"))
    assert q == df.encode(torch.tensor([[0.0, 1.0]]), df.mx("e2m1"))
    assert q != df.encode(torch.tensor([[-0.0, 1.0]]), df.mx("e2m1"))
    assert q != df.encode(torch.tensor([[0.0, 1.0]]), df.mx("e2m1", rounding="floor"))
    assert q != "codes"


def test_known_values_of_modelopt() -> None:
    """Row 0 of what ModelOpt 0.47 gives for `torch.manual_seed(0); torch.randn(2, 8)`."""
    torch.manual_seed(0)
    x = torch.randn(2, 8)
    for fmt, row in [
        (
            df.integer(8, rule="qmax"),
            [-1.132558, -1.149214, -0.249829, -0.433037, 0.849419, 0.699521, -0.31645, -2.115219],
        ),
        (
            df.integer(4, df.per_group(4), rule="qmax"),
            [-1.15236, -1.15236, -0.329246, -0.493869, 0.906523, 0.604348, -0.302174, -2.115219],
        ),
        (df.fp8(), [-1.133153, -1.133153, -0.245517, -0.41549, 0.830979, 0.679892, -0.302174, -2.11522]),
    ]:
        torch.testing.assert_close(df.fake_quantize(x, fmt)[0], torch.tensor(row), atol=2e-6, rtol=0, msg=str(fmt))


@pytest.mark.parametrize(("name", "block", "mantissa"), [("bfp16", 8, 7), ("mx9", 16, 7), ("mx6", 16, 4)])
def test_error_on_normal_numbers(name: str, block: int, mantissa: int) -> None:
    """Relative root-mean-square error on N(0, 1): rounding to steps leaves step / sqrt(12), and the step follows from
    the distribution of a block's exponent and, for MX, of the pairs that lie a binade below it."""
    normal = statistics.NormalDist()
    below = {k: 2 * normal.cdf(2.0**k) - 1 for k in range(-12, 6)}  # P(|x| < 2^k)
    mean_square = 0.0
    for k in range(-12, 5):
        probability = below[k + 1] ** block - below[k] ** block
        if name != "bfp16":
            small_pair = below[k] ** 2 * (below[k + 1] ** (block - 2) - below[k] ** (block - 2))
            probability -= 0.75 * small_pair  # half the step, a quarter of its square
        mean_square += 4.0**k * probability
    expected = math.sqrt(mean_square / 12) / 2 ** (mantissa - 1)
    x = random_tensor((4096, 128), "float32", 11)
    error = (df.fake_quantize(x, BY_NAME[name].native()[0]) - x).double().norm() / x.double().norm()
    # With few mantissa bits the values that saturate above the last code weigh in.
    assert float(error) == pytest.approx(expected, rel=0.01 if mantissa == 7 else 0.06)
