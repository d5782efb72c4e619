"""Bits on disk: dense packing of small codes, least significant bit first.

``unpack(pack(codes, bits), bits, n, codes.dtype) == codes`` for any width from 1 to 8 and any length. Eight codes of b
bits fill exactly b bytes, so every width is the same few shifts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int, word_bytes: int = 1) -> Tensor:
    """Codes [..., n] of `bits` bits as bytes [..., ceil(n * bits / 8)], rounded up to whole words.

    Code i occupies bits [i * b, (i + 1) * b) of the little-endian bit string; a negative int8 code goes there in two's
    complement, a float8 code as its bit pattern. The unused end is zero.
    """
    if codes.is_floating_point():
        codes = codes.view(torch.uint8)
    n = codes.shape[-1]
    blocks = -(-n // 8)
    wide = torch.nn.functional.pad(codes.to(torch.int64) & (2**bits - 1), (0, blocks * 8 - n))
    wide = wide.reshape(*codes.shape[:-1], blocks, 8)
    block = (wide << (torch.arange(8, device=codes.device) * bits)).sum(-1)
    bytes_ = (block[..., None] >> (torch.arange(bits, device=codes.device) * 8)) & 0xFF
    flat = bytes_.to(torch.uint8).reshape(*codes.shape[:-1], blocks * bits)
    length = -(-n * bits // 8)
    length = -(-length // word_bytes) * word_bytes
    if length > flat.shape[-1]:
        return torch.nn.functional.pad(flat, (0, length - flat.shape[-1]))
    return _fresh(flat[..., :length])


def unpack(packed: Tensor, bits: int, n: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """The first `n` codes [..., n] of bytes that `pack` wrote, as the dtype that they had: uint8, int8 or a float8."""
    blocks = -(-n // 8)
    bytes_ = packed[..., : blocks * bits].to(torch.int64)
    bytes_ = torch.nn.functional.pad(bytes_, (0, blocks * bits - bytes_.shape[-1]))
    bytes_ = bytes_.reshape(*packed.shape[:-1], blocks, bits)
    block = (bytes_ << (torch.arange(bits, device=packed.device) * 8)).sum(-1)
    codes = (block[..., None] >> (torch.arange(8, device=packed.device) * bits)) & (2**bits - 1)
    if dtype == torch.int8:
        codes = codes - ((codes >> (bits - 1)) << bits)  # the top bit is the sign
    codes = codes.to(torch.int8 if dtype == torch.int8 else torch.uint8)
    return codes.reshape(*packed.shape[:-1], blocks * 8)[..., :n].contiguous().view(dtype)


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """The same bits as int32 words [..., ceil(n * bits / 32)] (little-endian)."""
    packed = pack(codes, bits, word_bytes=4)
    return packed.view(torch.int32) if packed.shape[-1] else packed.to(torch.int32)  # nothing to view: no last axis


def unpack_int32(packed: Tensor, bits: int, n: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """The inverse of `pack_int32`."""
    return unpack(_fresh(packed).view(torch.uint8), bits, n, dtype)


def _fresh(x: Tensor) -> Tensor:
    """A copy with the strides of a new tensor: `contiguous` leaves those of axes of length 1, and `view` minds them."""
    return x.clone(memory_format=torch.contiguous_format)
