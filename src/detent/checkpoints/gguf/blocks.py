"""The blocks of GGUF: each tensor type as a `Format`, and its codes and scales as bytes.

A row of a tensor is a sequence of blocks of equal size, and a block a sequence of fields: float16 numbers, and codes or
integer scales whose bits are split over bytes. Where the bits of a number are in two fields, each field has some of
them. Source of the layouts: ggml-common.h and the functions ``dequantize_row_*`` of llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from detent.errors import DetentError
from detent.formats import Format, Integer, QTensor, SearchedScale
from detent.formats.gguf import GGUF_FORMATS, as_gguf, same_grid
from detent.formats.stored import check_stored

__all__ = ["BLOCKS", "Block", "Field", "as_gguf"]

#: What a block consists of, by name, one row a block: ``codes`` and ``scales`` (with ``minimums`` after them) uint8,
#: counted from their least value; ``d`` and ``m`` float16 [blocks, 1].
Parts = dict[str, Tensor]


class Field(NamedTuple):
    """Some bytes of a block: how many, made from its parts, and the parts, or bits of them, that they give back."""

    size: int
    write: Callable[[Parts], Tensor]
    read: Callable[[Tensor], Parts]


@dataclass(frozen=True)
class Block:
    """A tensor type of GGUF.

    Attributes:
        name: as llama.cpp and the gguf package have it.
        ggml_type: its number in a file.
        format: what its codes mean; None for plain numbers.
        elements, bytes: of one block.
        fields: what it consists of, in order.
    """

    name: str
    ggml_type: int
    format: Format | None
    elements: int
    fields: tuple[Field, ...]
    dtype: torch.dtype | None = None

    @property
    def bytes(self) -> int:
        return sum(field.size for field in self.fields) if self.dtype is None else self.dtype.itemsize

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Why a tensor of this shape can't have the type; None if it can."""
        width = shape[-1] if shape else 1
        if width % self.elements:
            return f"{self.name} has blocks of {self.elements} along rows, and rows of {width} are no multiple of that"
        return None

    def pack(self, q: QTensor | Tensor) -> Tensor:
        """The bytes uint8 [rows, bytes of a row] of a QTensor in `format`, or of a float tensor for plain types.

        Raises:
            DetentError: the format is another one, or rows aren't multiples of the block.
        """
        shape = tuple(q.shape)
        rows = math.prod(shape[:-1])
        if reason := self.refusal(shape):
            raise DetentError(reason)
        if isinstance(q, Tensor):
            if self.dtype is None:
                raise DetentError(f"{self.name} is made of codes and scales, not of {q.dtype} numbers")
            return q.to(self.dtype).contiguous().view(torch.uint8).reshape(rows, -1)
        if self.format is None or not same_grid(q.format, self.format):
            raise DetentError(f"{self.name} holds {self.format or self.dtype}, not {q.format}")
        parts = _parts_of(q, self.elements)
        return torch.cat([field.write(parts) for field in self.fields], 1).reshape(rows, -1)

    def unpack(self, data: Tensor, shape: tuple[int, ...], name: str = "tensor") -> QTensor | Tensor:
        """The inverse of `pack`: uint8 bytes of any shape as a tensor of `shape`.

        Raises:
            DetentError: another number of bytes than the shape takes, or values that can't have been written.
        """
        if reason := self.refusal(shape):
            raise DetentError(f"{name}: {reason}")
        count = math.prod(shape) // self.elements
        if data.numel() != count * self.bytes:
            raise DetentError(
                f"{name}: {data.numel()} bytes, but {self.name} of shape {shape} takes {count * self.bytes}"
            )
        if self.format is None:
            assert self.dtype is not None
            return data.reshape(-1).clone().view(self.dtype).reshape(shape)
        blocks, parts, start = data.reshape(count, self.bytes), Parts(), 0
        for field in self.fields:
            for part, found in field.read(blocks[:, start : start + field.size]).items():
                parts[part] = parts[part] | found if part in parts else found
            start += field.size
        return check_stored(_tensor_of(self.format, parts, shape), name)


def _parts_of(q: QTensor, elements: int) -> Parts:
    fmt, rule = q.format, q.format.scale
    count = math.prod(q.shape) // elements
    codes = q.codes.reshape(count, elements).view(torch.uint8)
    if isinstance(fmt.element, Integer) and fmt.element.signed and fmt.element.bits < 8:
        codes = codes + _offset(fmt.element)  # int8 and its offset wrap around to what is meant
    parts = {"codes": codes}
    if not isinstance(rule, SearchedScale):
        return parts | {"scales": q.scale.reshape(count, -1).view(torch.uint8)}
    if not rule.tiles:
        minimum = {} if q.zero_point is None else {"m": q.zero_point.reshape(count, 1)}
        return parts | {"d": q.scale.reshape(count, 1)} | minimum
    assert q.outer_scale is not None
    scales, shared = q.scale.reshape(count, -1).view(torch.uint8), q.outer_scale.reshape(count, -1)
    if rule.signed and rule.bits < 8:
        scales = scales - rule.limits[0]
    if q.zero_point is not None:
        scales = torch.cat([scales, q.zero_point.reshape(count, -1)], 1)
    return parts | {"scales": scales, "d": shared[:, :1], "m": shared[:, 1:]}


def _tensor_of(fmt: Format, parts: Parts, shape: tuple[int, ...]) -> QTensor:
    rule, grid = fmt.scale, fmt.granularity.grid(shape)
    codes = parts["codes"]
    if isinstance(fmt.element, Integer) and fmt.element.signed and fmt.element.bits < 8:
        codes = codes - _offset(fmt.element)
    codes = codes.contiguous().view(fmt.element.storage_dtype).reshape(shape)
    if not isinstance(rule, SearchedScale):
        scales = parts["scales"].contiguous()
        if rule.outer:  # llama.cpp has scales of 0 where all is 0; any other says the same of codes of 0
            codes = codes.reshape(len(scales), scales.shape[1], -1).masked_fill((scales == 0).unsqueeze(2), 0)
            codes, scales = codes.reshape(shape), scales.masked_fill(scales == 0, 1)
        scale = scales.view(rule.stored_dtype).reshape(grid)
        return QTensor(fmt, shape, codes, scale, outer_scale=torch.ones(()) if rule.outer else None)
    if not rule.tiles:
        minimum = parts["m"].reshape(grid) if "m" in parts else None
        return QTensor(fmt, shape, codes, parts["d"].reshape(grid), minimum)
    scales, minimum, shared = parts["scales"], None, parts["d"]
    if fmt.zero_point == "minimum":
        scales, minimum = (half.reshape(grid) for half in scales.contiguous().chunk(2, 1))
        shared = torch.cat([shared, parts["m"]], 1).unsqueeze(1)
    if rule.signed and rule.bits < 8:
        scales = scales + rule.limits[0]
    stored = scales.contiguous().view(rule.stored_dtype).reshape(grid)
    return QTensor(fmt, shape, codes, stored, minimum, shared.reshape(*rule.blocks(grid), *shared.shape[2:]))


def _offset(element: Integer) -> int:
    return -int(element.minimum)


# ---- fields ----------------------------------------------------------------------------------------------------------


def _half(part: str) -> Field:
    """A float16."""
    return Field(
        2,
        lambda parts: parts[part].contiguous().view(torch.uint8),
        lambda data: {part: data.contiguous().view(torch.float16)},
    )


def _whole(part: str, size: int) -> Field:
    """A byte each."""
    return Field(size, lambda parts: parts[part], lambda data: {part: data})


def _bits(part: str, count: int, bits: int, apart: int, shift: int = 0) -> Field:
    """`bits` bits, from bit `shift` on, of each of `count` numbers: a byte has those of numbers that are `apart`."""
    planes, mask = 8 // bits, (1 << bits) - 1
    at = [bits * i for i in range(planes)]

    def write(parts: Parts) -> Tensor:
        values = ((parts[part] >> shift) & mask).reshape(len(parts[part]), -1, planes, apart)
        out = values[:, :, 0]
        for i in range(1, planes):
            out = out | (values[:, :, i] << at[i])
        return out.reshape(len(out), -1)

    def read(data: Tensor) -> Parts:
        groups = data.reshape(len(data), -1, 1, apart)
        values = torch.cat([(groups >> i) & mask for i in at], 2)
        return {part: values.reshape(len(data), -1) << shift}

    return Field(count // planes, write, read)


def _write_six(parts: Parts) -> Tensor:
    scales, minimums = parts["scales"].chunk(2, 1)
    first, last = (torch.cat([scales[:, half], minimums[:, half]], 1) for half in (slice(0, 4), slice(4, 8)))
    low = last & 15
    return torch.cat([first | (last >> 4 << 6), low[:, :4] | (low[:, 4:] << 4)], 1)


def _read_six(data: Tensor) -> Parts:
    upper, low = data[:, :8], torch.cat([data[:, 8:] & 15, data[:, 8:] >> 4], 1)
    first, last = upper & 63, low | (upper >> 6 << 4)
    return {"scales": torch.cat([first[:, :4], last[:, :4], first[:, 4:], last[:, 4:]], 1)}


#: Eight scales and eight minimums of six bits: the last four of each are split.
_SIX = Field(12, _write_six, _read_six)


def _trits(start: int, digits: int, apart: int) -> Field:
    """`digits` numbers of 0 to 2, `apart` from each other, as a fraction in base 3 of 1, times 256."""

    def write(parts: Parts) -> Tensor:
        values = parts["codes"][:, start : start + digits * apart].to(torch.int32).reshape(-1, digits, apart)
        powers = torch.tensor([3 ** (4 - i) for i in range(digits)], dtype=torch.int32, device=values.device)
        whole = (values * powers[:, None]).sum(1)
        return ((whole * 256 + 242) // 243).to(torch.uint8)

    def read(data: Tensor) -> Parts:
        found = [((data * 3**i).to(torch.int16) * 3 >> 8).to(torch.uint8) for i in range(digits)]
        whole = torch.zeros(len(data), 256, dtype=torch.uint8, device=data.device)
        whole[:, start : start + digits * apart] = torch.cat(found, 1)
        return {"codes": whole}

    return Field(apart, write, read)


_D, _M = _half("d"), _half("m")
_NIBBLES = _bits("codes", 32, 4, 16)
_SUPER_NIBBLES = _bits("codes", 256, 4, 32)
_PAIRS = _bits("codes", 256, 2, 32)
_FIFTH = _bits("codes", 32, 1, 1, shift=4)


#: Every tensor type: its number, how many elements a block has, and the fields of a block.
_LAYOUTS: dict[str, tuple[int, int, tuple[Field, ...]]] = {
    "Q4_0": (2, 32, (_D, _NIBBLES)),
    "Q4_1": (3, 32, (_D, _M, _NIBBLES)),
    "Q5_0": (6, 32, (_D, _FIFTH, _NIBBLES)),
    "Q5_1": (7, 32, (_D, _M, _FIFTH, _NIBBLES)),
    "Q8_0": (8, 32, (_D, _whole("codes", 32))),
    "Q2_K": (10, 256, (_bits("scales", 32, 4, 16), _PAIRS, _D, _M)),
    "Q3_K": (
        11,
        256,
        (
            _bits("codes", 256, 1, 32, shift=2),
            _PAIRS,
            _bits("scales", 16, 4, 8),
            _bits("scales", 16, 2, 4, shift=4),
            _D,
        ),
    ),
    "Q4_K": (12, 256, (_D, _M, _SIX, _SUPER_NIBBLES)),
    "Q5_K": (13, 256, (_D, _M, _SIX, _bits("codes", 256, 1, 32, shift=4), _SUPER_NIBBLES)),
    "Q6_K": (14, 256, (_bits("codes", 256, 4, 64), _bits("codes", 256, 2, 32, shift=4), _whole("scales", 16), _D)),
    "IQ4_NL": (20, 32, (_D, _NIBBLES)),
    "IQ4_XS": (
        23,
        256,
        (_D, _bits("scales", 8, 2, 1, shift=4), _bits("scales", 8, 4, 1), _bits("codes", 256, 4, 16)),
    ),
    "TQ1_0": (34, 256, (_trits(0, 5, 32), _trits(160, 5, 16), _trits(240, 4, 4), _D)),
    "TQ2_0": (35, 256, (_PAIRS, _D)),
    "MXFP4": (39, 32, (_whole("scales", 1), _NIBBLES)),
    "NVFP4": (40, 64, (_whole("scales", 4), _bits("codes", 64, 4, 8))),
    "Q1_0": (41, 128, (_D, _bits("codes", 128, 1, 1))),
}
#: Every tensor type, by name.
BLOCKS: dict[str, Block] = {
    "F32": Block("F32", 0, None, 1, (), torch.float32),
    "F16": Block("F16", 1, None, 1, (), torch.float16),
    "BF16": Block("BF16", 30, None, 1, (), torch.bfloat16),
    **{
        name: Block(name, number, GGUF_FORMATS[name], elements, fields)
        for name, (number, elements, fields) in _LAYOUTS.items()
    },
}
