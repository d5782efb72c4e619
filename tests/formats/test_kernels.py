"""The fast ways give the bits of the plain one: in pieces, compiled, and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from detent import formats as df
from detent.formats import Format, kernels
from formats.cases import BY_NAME, CASES, DTYPES, Case, adversarial, assert_same_codes, bits, random_tensor

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
#: One of each arithmetic: the few that are worth the seconds of a compiler.
COMPILED = ["uint4_not_symmetric", "e4m3_float32", "mx_e2m1_even", "nvfp4"]


def granularities(case: Case) -> list[Format]:
    fmt, _ = case.native()
    if case.block is not None or case.name == "nf4":
        return [fmt]
    return [fmt, case.make(df.per_tensor()), case.make(df.per_channel(1)), case.make(df.per_group(16))]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETENT_COMPILE", "0")


@every_case
@pytest.mark.usefixtures("plain")
def test_pieces_are_seamless(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    x = random_tensor((37, 70), "bfloat16", 2)
    x[5, 3] = 40.0
    for fmt in granularities(case):
        scales = df.encode(x, fmt).scales
        whole = bits(df.fake_quantize(x, fmt))
        for piece in (96, 500):
            monkeypatch.setattr(kernels, "_PIECE", piece)
            assert (bits(df.fake_quantize(x, fmt)) == whole).all(), (str(fmt), piece)
            assert (bits(df.fake_quantize(x, fmt, scales)) == whole).all(), (str(fmt), piece, "static")
        monkeypatch.undo()
        monkeypatch.setenv("DETENT_COMPILE", "0")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_bits_are_the_plain_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels._compiler_found("cpu"):
        pytest.skip("no C++ compiler")
    case = BY_NAME[name]
    fmt, _ = case.native()
    for dtype in ("float32",) if name == "nvfp4" else ("bfloat16",):
        inputs = {**adversarial(case, dtype), "random": random_tensor((65, 1030), dtype, 4)}
        del inputs["one element"]  # a size of 1 compiles anew
        monkeypatch.setenv("DETENT_COMPILE", "0")
        want = {what: bits(df.fake_quantize(x, fmt)) for what, x in inputs.items()}
        monkeypatch.setenv("DETENT_COMPILE", "1")
        for what, x in inputs.items():
            assert (bits(df.fake_quantize(x, fmt)) == want[what]).all(), (what, dtype)


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
    if not kernels._compiler_found("cuda"):
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
