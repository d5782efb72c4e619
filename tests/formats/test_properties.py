"""Properties over inputs that hypothesis invents, beside the definition itself."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from detent import formats as df
from detent.formats.packing import pack, unpack
from formats.cases import CASES, DTYPES, Case, assert_equals_definition, assert_same_codes, bits

#: Examples of a property by the profile (tests/conftest.py): few in `make quick`, many in `make fuzz`.
DOSE = settings.default.max_examples

#: Bit patterns of bfloat16: few enough that hypothesis finds equal magnitudes, ties, subnormals and both zeros.
_PATTERNS = st.one_of(
    st.integers(0, 2**16 - 1),
    st.sampled_from([0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x0080, 0x3F80, 0x3FC0, 0x3FE0, 0xBFF0, 0x7F7F, 0xFF7F]),
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Finite tensors [rows, columns] of any dtype; float32 values get low mantissa bits too."""
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    patterns = draw(st.lists(_PATTERNS, min_size=1, max_size=rows * columns))
    wide = np.resize(np.array(patterns, np.uint32) << 16, rows * columns)
    wide = wide + np.uint32(draw(st.sampled_from([0, 0, 1, 0xFFFF, 0x8000])))
    x = torch.from_numpy(wide.view(np.float32).reshape(rows, columns).copy())
    dtype = DTYPES[draw(st.sampled_from(list(DTYPES)))]
    x = x.to(dtype)
    return torch.where(torch.isfinite(x), x, torch.ones((), dtype=dtype))


@given(x=tensors(), case=st.sampled_from(CASES))
@settings(max_examples=4 * DOSE)
def test_every_codec_equals_its_definition(x: Tensor, case: Case) -> None:
    fmt, lengths = case.native()
    assert_equals_definition(x, fmt, case.spec, lengths(tuple(x.shape)), case.name)


@given(x=tensors(), size=st.integers(1, 45), case=st.sampled_from([c for c in CASES if c.spec.kind != "micro"]))
@settings(max_examples=2 * DOSE)
def test_any_group_size(x: Tensor, size: int, case: Case) -> None:
    assert_equals_definition(x, case.make(df.per_group(size)), case.spec, (1, size), case.name)


@given(x=tensors(), case=st.sampled_from(CASES))
@settings(max_examples=2 * DOSE)
def test_simulating_is_finite_bounded_and_keeps_signs(x: Tensor, case: Case) -> None:
    fmt, _ = case.native()
    y = df.fake_quantize(x, fmt)
    assert torch.isfinite(y).all()
    if fmt.symmetric and "nf4" not in case.name:
        assert (df.fake_quantize(-x, fmt).abs() >= 0).all()
        assert (y.double() * x.double() >= 0).all(), "no value changes sides"
    assert torch.equal(bits_of(df.decode(df.encode(x, fmt), x.dtype)), bits_of(y))


@given(x=tensors(), case=st.sampled_from([c for c in CASES if c.spec.base is None]))
@settings(max_examples=2 * DOSE)
def test_scales_from_the_tensors_own_range_are_the_dynamic_ones(x: Tensor, case: Case) -> None:
    fmt, lengths = case.native()
    rows, columns = x.shape
    block = lengths((rows, columns))[1]
    pieces = [x.float()[:, i : i + block] for i in range(0, columns, block)]
    low = torch.stack([p.amin(1) for p in pieces], 1)
    high = torch.stack([p.amax(1) for p in pieces], 1)
    if getattr(fmt.scale, "four_over_six", False):
        return
    q = df.encode(x, fmt)
    scales = df.scales_from_range(fmt, low, high)
    assert_same_codes(df.encode(x, fmt, scales), q, case.name)


@given(
    width=st.integers(1, 8),
    codes=st.lists(st.integers(0, 255), max_size=70),
)
def test_packing_gives_back_what_it_got(width: int, codes: list[int]) -> None:
    x = torch.tensor([c & (2**width - 1) for c in codes], dtype=torch.uint8)
    packed = pack(x, width)
    assert len(packed) == -(-len(codes) * width // 8)
    assert torch.equal(unpack(packed, width, len(codes)), x)


def bits_of(x: Tensor) -> Tensor:
    return torch.from_numpy(bits(x).astype(np.int64))
