"""Packing against Python's integers: one number per row, `bits` bits per code, least significant first."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detent import formats as df
from detent.formats.packing import pack, pack_int32, unpack, unpack_int32
from formats.cases import CASES, Case, assert_same_codes, bits, random_tensor

LENGTHS = [0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100]


def packed_by_hand(codes: list[int], width: int, word: int = 1) -> bytes:
    number = sum((code & (2**width - 1)) << (i * width) for i, code in enumerate(codes))
    length = -(-len(codes) * width // 8)
    return number.to_bytes(-(-length // word) * word, "little")


@pytest.mark.parametrize("width", range(1, 9))
def test_any_width_and_length(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    for n in LENGTHS:
        codes = torch.randint(0, 2**width, (3, n), generator=generator, dtype=torch.int64).to(torch.uint8)
        packed = pack(codes, width)
        assert packed.dtype == torch.uint8
        words = pack_int32(codes, width)
        assert words.dtype == torch.int32
        for row in range(3):
            assert bytes(packed[row].tolist()) == packed_by_hand(codes[row].tolist(), width)
            assert words[row].numpy().astype("<i4").tobytes() == packed_by_hand(codes[row].tolist(), width, 4)
        assert torch.equal(unpack(packed, width, n), codes)
        assert torch.equal(unpack_int32(words, width, n), codes)


@pytest.mark.parametrize("width", range(2, 9))
def test_negative_codes_are_twos_complement(width: int) -> None:
    codes = torch.arange(-(2 ** (width - 1)), 2 ** (width - 1)).to(torch.int8).roll(3)
    packed = pack(codes, width)
    assert bytes(packed.tolist()) == packed_by_hand(codes.tolist(), width)
    assert torch.equal(unpack(packed, width, len(codes), torch.int8), codes)
    assert torch.equal(unpack_int32(pack_int32(codes, width), width, len(codes), torch.int8), codes)


@pytest.mark.parametrize("width", range(2, 9))
def test_flipped_codes_are_offsets(width: int) -> None:
    half = 2 ** (width - 1)
    for n in LENGTHS:
        codes = torch.randint(-half, half, (2, n), dtype=torch.int64).to(torch.int8)
        for row, packed in zip(codes.tolist(), pack(codes, width, flip=True), strict=True):
            assert bytes(packed.tolist()) == packed_by_hand([code + half for code in row], width)


def test_any_rank_and_strides() -> None:
    codes = torch.randint(0, 8, (4, 5, 6), dtype=torch.uint8)
    for view in (codes, codes.transpose(0, 2), codes[..., ::2], codes[:1].expand(3, 5, 6), codes[0, 0]):
        assert torch.equal(unpack(pack(view, 3), 3, view.shape[-1]), view)
    assert torch.equal(unpack(pack(codes, 3)[..., :0], 3, 0), codes[..., :0])
    for shape in [(0, 5), (3, 0), (0,)]:
        empty = torch.empty(shape, dtype=torch.uint8)
        assert unpack(pack(empty, 5), 5, shape[-1]).shape == shape


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_codes_of_every_format(case: Case) -> None:
    fmt, _ = case.native()
    q = df.encode(random_tensor((3, 37), "float32"), fmt)
    packed = pack(q.codes, fmt.bits)
    assert packed.shape == (3, -(-37 * fmt.bits // 8))
    codes = unpack(packed, fmt.bits, 37, q.codes.dtype)
    assert codes.dtype == q.codes.dtype
    np.testing.assert_array_equal(bits(codes), bits(q.codes))
    again = df.QTensor(fmt, q.shape, **{**q.tensors(), "codes": codes})
    assert_same_codes(again, q, case.name)
    assert again == q
