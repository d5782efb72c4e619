"""Every codec against its definition, bit for bit: scales, codes, decoded values, simulation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from detent import formats as df
from formats.cases import (
    BY_NAME,
    CASES,
    DTYPES,
    GRANULARITIES,
    Case,
    adversarial,
    assert_equals_definition,
    bits,
    random_tensor,
)

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def _adversarial_pairs() -> list[Any]:
    """One family of each arithmetic in every dtype; the others in one dtype each, in turn."""
    full = [
        "int4",
        "uint4",
        "uint4_not_symmetric",
        "e4m3_float32",
        "nf4",
        "mx_e2m1_even",
        "mx_e4m3_even",
        "mx_int8_floor",
        "nvfp4",
        "bfp16",
        "mx6",
    ]
    pairs = [(case, d) for i, case in enumerate(CASES) for j, d in enumerate(DTYPES) if case.name in full or i % 3 == j]
    return [pytest.param(case, d, id=f"{case.name}-{d}") for case, d in pairs]


@pytest.mark.parametrize(("case", "dtype"), _adversarial_pairs())
def test_adversarial_values(case: Case, dtype: str) -> None:
    fmt, lengths = case.native()
    for what, x in adversarial(case, dtype).items():
        assert_equals_definition(x, fmt, case.spec, lengths(tuple(x.shape)), what)


@every_case
def test_granularities(case: Case) -> None:
    for number, (name, granularity, shape, lengths) in enumerate(GRANULARITIES):
        if case.spec.kind == "micro" and not name.startswith("group16"):
            continue
        x = random_tensor(shape, list(DTYPES)[number % 3], number)
        assert_equals_definition(x, case.make(granularity), case.spec, lengths, name)


@every_case
def test_empty_tensors(case: Case) -> None:
    for shape in [(0,), (0, 40), (3, 0), (2, 0, 40), (0, 0)]:
        x = torch.empty(shape, dtype=torch.bfloat16)
        for granularity in [df.per_group(16), df.per_tensor(), df.per_channel(0), df.per_token(), df.per_block({0: 2})]:
            if case.spec.kind == "micro" and granularity.kind != "per_group":
                continue
            fmt = case.make(granularity)
            q = df.encode(x, fmt)
            assert q.codes.shape == q.shape == shape
            decoded = df.decode(q, x.dtype)
            assert decoded.shape == shape
            assert decoded.dtype == x.dtype
            simulated = df.fake_quantize(x, fmt)
            assert simulated.shape == shape
            assert simulated.dtype == x.dtype
            assert df.encode(df.decode(q), fmt, q.scales).codes.shape == shape


@every_case
def test_strides_do_not_matter(case: Case) -> None:
    base = random_tensor((48, 70), "float32", 3)
    views = {
        "transposed": base.t(),
        "every other column": base[:, ::2],
        "window": base[3:20, 5:42],
        "flipped": base.flip(1)[::3],
        "expanded": base[:1].expand(7, 70),
        "broadcast column": base[:, :1].expand(48, 33),
        "unfolded": base[0].unfold(0, 20, 3),
        "channels last": base.reshape(4, 6, 7, 20).contiguous(memory_format=torch.channels_last),
    }
    fmt, _ = case.native()
    for what, x in views.items():
        plain = x.clone(memory_format=torch.contiguous_format)
        assert plain.is_contiguous()
        want, got = df.encode(plain, fmt), df.encode(x, fmt)
        for name, tensor in got.tensors().items():
            assert (bits(tensor) == bits(want.tensors()[name])).all(), (what, name)
            assert tensor.is_contiguous()
        assert (bits(df.fake_quantize(x, fmt)) == bits(df.decode(want))).all(), what
        assert x.data_ptr() != df.fake_quantize(x, fmt).data_ptr(), "the input is never written to"


@every_dtype
@pytest.mark.parametrize(
    "name", ["int4", "uint4_not_symmetric", "e4m3_float32", "mx_e2m1_even", "nvfp4", "mx6", "progressive4"]
)
def test_long_rows(name: str, dtype: str) -> None:
    """Rows longer than any internal tile or piece limit, per-token and per-tensor, static and dynamic."""
    case = BY_NAME[name]
    x = random_tensor((3, 4200), dtype, 5)
    if case.block is not None:
        fmt, lengths = case.native()
        assert_equals_definition(x, fmt, case.spec, lengths(tuple(x.shape)), "groups")
        return
    assert_equals_definition(x, case.make(df.per_token()), case.spec, (1, 4200), "per token")
    assert_equals_definition(x, case.make(df.per_tensor()).as_dynamic(), case.spec, (3, 4200), "per tensor")


def test_ranks_up_to_twelve() -> None:
    x = random_tensor((2,) * 11 + (3,), "float32")
    fmt = df.integer(4, df.per_block({3: 2, 7: None, -1: 2}))
    spec = BY_NAME["int4"].spec
    assert_equals_definition(x, fmt, spec, (1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1, 2), "rank 12")


def test_input_is_left_alone() -> None:
    for case in CASES:
        x = random_tensor((4, 40), "float32")
        before = x.clone()
        df.fake_quantize(x, case.native()[0])
        df.encode(x, case.native()[0])
        assert torch.equal(x, before), case.name
