"""Bits on disk: dense packing of small codes, least significant bit first.

``unpack(pack(codes, bits), bits, n, codes.dtype) == codes`` for any width from 1 to 8 and any length. Eight codes
are in a 64-bit word, one per byte. Moving the upper of each two down next to the lower, then of each two pairs, then
of the two fours, leaves b bytes at the low end: three steps for any width, fewer where they fill bytes before.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from detent.formats.memory import new_tensor

if sys.byteorder != "little":
    raise ImportError("Detent packs codes through little-endian words, and this machine is big-endian")

#: Codes packed at once: what is made on the way stays in the processor's cache. A multiple of 8.
_PIECE = 1 << 17
_WORDS = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


def pack(codes: Tensor, bits: int, word_bytes: int = 1, *, flip: bool = False) -> Tensor:
    """Codes [..., n] of `bits` bits as bytes [..., ceil(n * bits / 8)], rounded up to whole words.

    Code i occupies bits [i * b, (i + 1) * b) of the little-endian bit string; a negative int8 code goes there in two's
    complement, a float8 code as its bit pattern. The unused end is zero. `flip` inverts the top bit of each code, which
    turns two's complement into an offset: -2^(b-1) becomes 0.
    """
    n, lead = codes.shape[-1], codes.shape[:-1]
    codes = codes.view(torch.uint8)
    if codes.numel() > _PIECE and codes.is_contiguous() and n * bits % (8 * word_bytes) == 0 and n % 8 == 0:
        flat = codes.view(-1)
        packed = new_tensor((len(flat) * bits // 8,), torch.uint8, codes.device)
        for start in range(0, len(flat), _PIECE):
            part = pack(flat[start : start + _PIECE], bits, flip=flip)
            packed[start * bits // 8 : start * bits // 8 + len(part)] = part
        return packed.view(*lead, -1)
    if flip:
        codes = codes ^ (1 << (bits - 1))
    if n % 8:
        codes = torch.nn.functional.pad(codes, (0, -n % 8))
    words = _words(codes) & _spread(bits, 8)
    field, used = 8, bits  # each field has its codes in its lowest bits
    while used % 8:
        upper = words >> (field - used)
        field, used = 2 * field, 2 * used
        if 2 * used <= field:
            words.bitwise_or_(upper).bitwise_and_(_spread(used, field))
        else:  # the lower half overlaps where the upper one goes
            words.bitwise_and_(_spread(used // 2, field))
            words.bitwise_or_(upper.bitwise_and_(_spread(used // 2, field, used // 2)))
    flat = _low_bytes(words, field, used).view(*lead, -(-n // 8) * bits)
    length = -(-n * bits // 8)
    length = -(-length // word_bytes) * word_bytes
    if length > flat.shape[-1]:
        return torch.nn.functional.pad(flat, (0, length - flat.shape[-1]))
    return flat if length == flat.shape[-1] else _fresh(flat[..., :length])


def unpack(packed: Tensor, bits: int, n: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """The first `n` codes [..., n] of bytes that `pack` wrote, as the dtype that they had: uint8, int8 or a float8."""
    blocks = -(-n // 8)
    bytes_ = packed[..., : blocks * bits]
    if bytes_.shape[-1] < blocks * bits:
        bytes_ = torch.nn.functional.pad(bytes_, (0, blocks * bits - bytes_.shape[-1]))
    field, used = 8, bits
    while used % 8:
        field, used = 2 * field, 2 * used
    words = _from_low_bytes(bytes_, field, used)
    while field > 8:
        field, used = field // 2, used // 2
        upper = (words << (field - used)).bitwise_and_(_spread(used, 2 * field, field))
        words.bitwise_and_(_spread(used, 2 * field)).bitwise_or_(upper)
    codes = words.view(torch.uint8)
    if dtype == torch.int8 and bits < 8:
        codes.bitwise_xor_(1 << (bits - 1)).sub_(1 << (bits - 1))  # the top bit is the sign
    return _fresh(codes.view(*packed.shape[:-1], blocks * 8)[..., :n]).view(dtype)


def pack_int32(codes: Tensor, bits: int, *, flip: bool = False) -> Tensor:
    """The same bits as int32 words [..., ceil(n * bits / 32)] (little-endian)."""
    packed = pack(codes, bits, word_bytes=4, flip=flip)
    return packed.view(torch.int32) if packed.shape[-1] else packed.to(torch.int32)  # nothing to view: no last axis


def unpack_int32(packed: Tensor, bits: int, n: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """The inverse of `pack_int32`."""
    return unpack(_fresh(packed).view(torch.uint8), bits, n, dtype)


def _spread(ones: int, field: int, start: int = 0) -> int:
    """A 64-bit mask, as a signed number: in each field of `field` bits, `ones` ones from bit `start` on."""
    mask = sum(((1 << ones) - 1) << (at + start) for at in range(0, 64, field))
    return mask - (1 << 64) if mask >> 63 else mask


def _words(codes: Tensor) -> Tensor:
    """uint8 codes, a multiple of 8 to a row, as int64 words in one row; a view where memory allows it."""
    flat = codes.reshape(-1)
    return (flat.clone() if flat.storage_offset() % 8 else flat).view(torch.int64)


def _low_bytes(words: Tensor, field: int, used: int) -> Tensor:
    """The lowest used / 8 bytes of each field, one after the other."""
    if used == 8:
        return words.view(_WORDS[field]).to(torch.uint8)
    return words.view(torch.uint8).view(-1, field // 8)[:, : used // 8].reshape(-1)


def _from_low_bytes(bytes_: Tensor, field: int, used: int) -> Tensor:
    """The inverse of `_low_bytes`; always fresh memory."""
    if used == 8:
        narrow = bytes_.reshape(-1)
        return (narrow.clone() if field == 8 else narrow.to(_WORDS[field])).view(torch.int64)
    words = torch.zeros(bytes_.numel() * field // used // 8, dtype=torch.int64, device=bytes_.device)
    words.view(torch.uint8).view(-1, field // 8)[:, : used // 8] = bytes_.reshape(-1, used // 8)
    return words


def _fresh(x: Tensor) -> Tensor:
    """A copy with the strides of a new tensor: `contiguous` leaves those of axes of length 1, and `view` minds them."""
    return x.clone(memory_format=torch.contiguous_format)
