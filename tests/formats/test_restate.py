"""Codes and scales in another format: the same values exactly, or nothing."""

from __future__ import annotations

import pytest
import torch

from detent import formats as f
from detent.formats import Format, QTensor, decode, encode, restate

G32 = f.per_group(32)


def weight(fmt: Format, seed: int = 0) -> QTensor:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
    return encode(x + 0.3, fmt)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (f.integer(4, G32), f.integer(4, G32, signed=False)),
        (f.integer(4, G32, signed=False), f.integer(4, G32)),
        (f.integer(4, G32), f.integer(4, G32, signed=False, symmetric=False)),
        (f.integer(4, G32, symmetric=False), f.integer(4, G32, signed=False, symmetric=False)),
        (f.integer(4, G32), f.integer(4, G32, rule="qmax")),
        (f.integer(3, G32, symmetric=False), f.integer(4, G32, signed=False, symmetric=False)),
        (f.integer(4, G32).with_scale_dtype("bfloat16"), f.integer(4, G32)),
        (f.integer(8), f.integer(8, f.per_channel(0))),
        (f.fp8(), f.fp8(granularity=f.per_channel(0))),
        (f.nvfp4(four_over_six=True), f.nvfp4()),
        (f.mx("e2m1", rounding="ceil"), f.mx("e2m1")),
        (f.integer(4, G32, symmetric=False).with_scale_dtype("bfloat16"),
         f.integer(4, G32, signed=False, symmetric=False, float_zero_point=True)),
    ],
    ids=str,
)  # fmt: skip
def test_same_values(old: Format, new: Format) -> None:
    q = weight(old)
    found = restate(q, new)
    assert found is not None
    assert found.format == new
    assert torch.equal(decode(found), decode(q))


def test_zero_moves_with_the_codes_by_hand() -> None:
    q = QTensor(f.integer(4, f.per_group(4)), (1, 4), torch.tensor([[-8, 0, 7, 1]], dtype=torch.int8), torch.ones(1, 1))
    found = restate(q, f.integer(4, f.per_group(4), signed=False, symmetric=False))
    assert found is not None
    assert found.codes.tolist() == [[0, 8, 15, 9]]
    assert found.zero_point is not None
    assert found.zero_point.tolist() == [[8]]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (f.integer(4, G32), f.integer(3, G32)),
        (f.integer(4, G32), f.integer(4, f.per_group(16))),
        (f.integer(4, G32), f.integer(4, G32).with_scale_dtype("bfloat16")),
        (f.integer(4, G32, symmetric=False), f.integer(4, G32)),
        (f.integer(4, G32), f.mx("e2m1")),
        (f.nvfp4(), f.mx("e2m1")),
        (f.fp8(), f.fp8("e5m2")),
        (f.micro_exponent(6), f.micro_exponent(9)),
        (f.progressive(), f.integer(4, f.per_channel(0))),
    ],
    ids=str,
)
def test_other_grids(old: Format, new: Format) -> None:
    assert restate(weight(old), new) is None
