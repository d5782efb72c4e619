"""Packed weights: the bits they take, and that they come back the same."""

from __future__ import annotations

import math

import pytest
import torch

from detent.config import parse_format
from detent.formats import encode
from detent.nn.packed_weight import pack_codes, packed_layout, unpack_codes


@pytest.mark.parametrize(
    "name",
    ["int2_per_group_sym", "int3_per_channel_sym", "uint4_per_group_asym", "int8_per_tensor_sym", "mx4", "mx6", "mx9"],
)
@pytest.mark.parametrize("shape", [(5, 33), (3, 2, 7), (1, 1), (9,)])
def test_round_trip(name: str, shape: tuple[int, ...]) -> None:
    q = encode(torch.randn(shape), parse_format(name))
    tensors = pack_codes(q)
    assert unpack_codes(tensors, q.format, q.shape) == q
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == packed_layout(q.format, q.shape)
    row = math.prod(shape[1:])
    assert tensors["codes"].nbytes == shape[0] * math.ceil(row * q.format.bits / 8)


def test_floats_of_four_and_six_bits() -> None:
    for name, bits in (("mxfp4", 4), ("mxfp6_e3m2", 6), ("nf4", 4)):
        q = encode(torch.randn(4, 64), parse_format(name))
        tensors = pack_codes(q)
        assert tensors["codes"].nbytes == 4 * 64 * bits // 8
        assert unpack_codes(tensors, q.format, q.shape) == q
