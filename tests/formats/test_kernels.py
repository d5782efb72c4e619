"""The fast ways give the bits of the definition: in pieces, in float32, packed at once, and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from detent import formats as df
from detent.errors import DetentError
from detent.formats import Format, codes32, compiled, kernels
from detent.formats import tiles as tl
from detent.formats.packing import pack
from formats.cases import BY_NAME, CASES, DTYPES, Case, adversarial, assert_same_codes, bits, random_tensor

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
#: One of each arithmetic.
COMPILED = ["uint4_not_symmetric", "e4m3_float32", "mx_e2m1_even", "nvfp4"]


def granularities(case: Case) -> list[Format]:
    fmt, _ = case.native()
    if case.block is not None or case.name == "nf4":
        return [fmt]
    return [fmt, case.make(df.per_tensor()), case.make(df.per_channel(1)), case.make(df.per_group(16))]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETENT_COMPILE", "0")


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of any size take the way of large ones."""
    monkeypatch.setattr(kernels, "_SMALL", 1)


def defined(x: Tensor, fmt: Format) -> tuple[df.QTensor, Tensor]:
    """(encode, fake_quantize) by the definition, which `test_codecs` holds against an oracle."""
    before, kernels._SMALL = kernels._SMALL, 1 << 60
    try:
        return df.encode(x, fmt), df.fake_quantize(x, fmt)
    finally:
        kernels._SMALL = before


@every_dtype
@every_case
@pytest.mark.usefixtures("fast")
def test_bits_are_those_of_the_definition(case: Case, dtype: str) -> None:
    formats = granularities(case)[:: 2 if dtype == "float16" else 1]
    for what, x in adversarial(case, dtype).items():
        for fmt in formats:
            want, simulated = defined(x, fmt)
            assert df.encode(x, fmt) == want, (what, str(fmt))
            assert (bits(df.fake_quantize(x, fmt)) == bits(simulated)).all(), (what, str(fmt))
            if not fmt.scale.micro:
                packed, scales = df.encode_packed(x, fmt)
                assert torch.equal(packed, pack(want.codes, fmt.bits)), (what, str(fmt))
                assert df.same_bits(scales.scale, want.scale)


@every_case
@pytest.mark.usefixtures("fast")
def test_pieces_are_seamless(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    x = random_tensor((37, 72), "bfloat16", 2)
    x[5, 3] = 40.0
    for fmt in granularities(case):
        q, whole = defined(x, fmt)
        for piece in (96, 504):
            monkeypatch.setattr(kernels, "_PIECE", piece)
            assert df.encode(x, fmt) == q, (str(fmt), piece)
            assert (bits(df.decode(q, x.dtype)) == bits(whole)).all(), (str(fmt), piece, "decoded")
            assert (bits(df.fake_quantize(x, fmt)) == bits(whole)).all(), (str(fmt), piece)
            assert (bits(df.fake_quantize(x, fmt, q.scales)) == bits(whole)).all(), (str(fmt), piece, "static")
            if not fmt.scale.micro:
                packed = df.encode_packed(x, fmt, q.scales, word_bytes=4)[0]
                assert torch.equal(packed, pack(q.codes, fmt.bits, word_bytes=4)), (str(fmt), piece)


@pytest.mark.usefixtures("fast")
def test_threads_share_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_PIECE", 96)
    monkeypatch.setattr(kernels, "_PER_THREAD", 192)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    x = random_tensor((40, 64), "bfloat16", 2)
    with torch.inference_mode():
        assert df.encode(x, df.nvfp4()) == defined(x, df.nvfp4())[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "fmt", [df.integer(8), df.integer(4), df.fp8(), df.fp8("e5m2"), df.small_float("e2m1", df.per_tensor())], ids=str
)
def test_every_short_number_under_scales_beside_ratios(fmt: Format, dtype: str) -> None:
    """All positive numbers of two binades, and scales a hair from (number / tie): where a float32 quotient misleads."""
    kind, element = DTYPES[dtype], fmt.element
    short = torch.arange(1 << 10, dtype=torch.float64).div(1 << 10).add(1).to(kind).unique()
    x = torch.cat([short * 2.0**e for e in (-3, -2, -1, 0, 1, 2)])
    grid = torch.arange(0, element.maximum + 1) if isinstance(element, df.Integer) else element.table(x.device).abs()
    grid = grid[torch.isfinite(grid)].unique().double()
    ties = (grid[1:] + grid[:-1]) / 2
    picked = torch.Generator().manual_seed(3)
    number = short[torch.randint(len(short), (400,), generator=picked)].double()
    ratio = (number / ties[torch.randint(len(ties), (400,), generator=picked)]).float()
    scale = torch.cat([ratio, torch.nextafter(ratio, ratio * 2), torch.nextafter(ratio, ratio / 2)]).reshape(-1, 1)
    tiles = x.expand(len(scale), -1)
    divisor = codes32.divisor_of(fmt, tl.TileScale(scale), kind, 1 << 20)
    assert divisor.check == (dtype == "float16" and element.bits == 8 and isinstance(element, df.Integer))
    codes = torch.empty(tiles.shape, dtype=element.storage_dtype)
    codes32.codes(tiles, fmt, divisor, codes32.Scratch(codes.numel()), codes)
    exact = element.encode(element.nearest(tiles.double() / scale.double()))
    assert df.same_bits(codes, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "fmt",
    [
        df.integer(4, df.per_group(128)),
        df.fp8(),
        df.mx("e2m1"),
        df.nvfp4(),
        df.integer(4, df.per_group(64), signed=False),
    ],
    ids=str,
)
def test_one_number_that_is_not_finite_is_found_in_a_large_tensor(fmt: Format, dtype: str) -> None:
    for bad in (torch.nan, -torch.nan, torch.inf, -torch.inf):
        x = random_tensor((64, 256), dtype).abs() + 0.5
        scales = df.encode(x, fmt).scales
        x[37, 201] = bad
        for given in (None, scales):
            for function in (df.encode, df.fake_quantize):
                with pytest.raises(DetentError, match="1 of 16384 values are NaN or infinite"):
                    function(x, fmt, given)


def test_packed_codes_need_no_micro_exponents() -> None:
    with pytest.raises(DetentError, match="proj: packed codes leave out the micro-exponents"):
        df.encode_packed(torch.ones(2, 16), df.micro_exponent(6), name="proj")


@pytest.mark.parametrize("shape", [(), (3,), (3, 37), (0, 8), (3, 0), (2, 3, 16), (16, 4)])
def test_packed_codes_of_any_shape(shape: tuple[int, ...]) -> None:
    x = random_tensor(shape, "float32")
    for granularity in (df.per_tensor(), *([df.per_group(16), df.per_block({0: 2})] if shape else [])):
        fmt = df.integer(4, granularity)
        want = pack(df.encode(x, fmt).codes.reshape(shape or (1,)), 4, word_bytes=4, flip=True)
        got, _ = df.encode_packed(x, fmt, word_bytes=4, flip=True)
        assert torch.equal(got, want), (shape, granularity)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@every_case
@pytest.mark.usefixtures("plain")
def test_gpu_bits_are_the_cpu_bits(case: Case, dtype: str) -> None:
    fmt, _ = case.native()
    for what, x in adversarial(case, dtype).items():
        assert_gpu_agrees(x, fmt, what)
    for other in granularities(case):
        assert_gpu_agrees(random_tensor((9, 70), dtype), other, str(other))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*COMPILED, "nvfp4_four_over_six", "mx6", "bfp16"])
def test_compiled_gpu_bits_are_the_cpu_bits(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled.compiler_found():
        pytest.skip("no Triton")
    fmt, _ = BY_NAME[name].native()
    for what, x in adversarial(BY_NAME[name], dtype).items():
        monkeypatch.setenv("DETENT_COMPILE", "0")
        want = bits(df.fake_quantize(x, fmt))
        monkeypatch.setenv("DETENT_COMPILE", "1")
        assert (bits(df.fake_quantize(x.cuda(), fmt)) == want).all(), what


def assert_gpu_agrees(x: Tensor, fmt: Format, what: Any) -> None:
    want, got = df.encode(x, fmt), df.encode(x.cuda(), fmt)
    assert got.codes.is_cuda
    assert_same_codes(got.to("cpu"), want, what)
    assert (bits(df.decode(got)) == bits(df.decode(want))).all(), what
    assert (bits(df.fake_quantize(x.cuda(), fmt)) == bits(df.fake_quantize(x, fmt))).all(), what
    assert (bits(df.fake_quantize(x.cuda(), fmt, got.scales)) == bits(df.fake_quantize(x, fmt))).all(), what
