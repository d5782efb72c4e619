"""Granularity: which elements of a tensor share one scale.

A granularity gives every axis of a tensor a block length: 1, some number, or the whole axis. Blocks of all axes
together form *tiles*; `to_tiles` lays a tensor out as ``[tiles, elements per tile]`` and `from_tiles` undoes it
exactly. The last block of an axis may be short; it is padded inside `to_tiles` and the padding never leaves this
module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from detent.errors import DetentError


@dataclass(frozen=True)
class Granularity:
    """`blocks` are (axis, length) pairs, length None meaning the whole axis; `rest` is what all other axes get.

    Build one with :func:`per_tensor`, :func:`per_channel`, :func:`per_group`, :func:`per_block` or :func:`per_token`.
    """

    kind: str
    blocks: tuple[tuple[int, int | None], ...] = ()
    rest: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("per_tensor", "per_channel", "per_group", "per_block", "per_token"):
            raise DetentError(f"unknown granularity {self.kind!r}")
        if any(length is not None and length < 1 for length in (*(length for _, length in self.blocks), self.rest)):
            raise DetentError(f"block lengths must be positive, not {self.blocks} (other axes: {self.rest})")

    def lengths(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The block length along each axis of a tensor of this shape; never longer than the axis, never 0."""
        wanted: list[int | None] = [self.rest] * len(shape)
        for axis, length in self.blocks:
            if not -len(shape) <= axis < len(shape):
                raise DetentError(f"{self} needs axis {axis}, but the tensor has shape {tuple(shape)}")
            wanted[axis] = length
        pairs = zip(shape, wanted, strict=True)
        return tuple(max(1, size if want is None else min(want, size)) for size, want in pairs)

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a scale: the number of blocks along each axis, or () for one scale per tensor."""
        if self.kind == "per_tensor":
            return ()
        return tuple((size + length - 1) // length for size, length in zip(shape, self.lengths(shape), strict=True))

    @property
    def group_size(self) -> int | None:
        """Elements that share a scale along the last axis, for per-group granularity; else None."""
        return self.blocks[0][1] if self.kind == "per_group" else None

    def elements_per_scale(self, shape: tuple[int, ...] | None = None) -> float:
        """How many elements share a scale: exact for a shape, infinite for whole axes of unknown length."""
        if shape is not None:
            return math.prod(shape) / max(1, math.prod(self.grid(shape)))
        lengths = [length for _, length in self.blocks] + [self.rest]
        return math.inf if None in lengths else float(math.prod(length for length in lengths if length))

    def __str__(self) -> str:
        if self.kind == "per_group":
            return f"per_group({self.blocks[0][1]})"
        if self.kind == "per_channel":
            return f"per_channel({', '.join(str(axis) for axis, _ in self.blocks)})"
        if self.kind == "per_block":
            return "per_block(" + ", ".join(f"{axis}: {length}" for axis, length in self.blocks) + ")"
        return self.kind


def per_tensor() -> Granularity:
    """One scale for the tensor."""
    return Granularity("per_tensor")


def per_channel(*axes: int) -> Granularity:
    """One scale for each index along `axes` (default 0), over all other axes."""
    return Granularity("per_channel", tuple((axis, 1) for axis in axes or (0,)))


def per_group(size: int) -> Granularity:
    """One scale for each run of `size` elements along the last axis; the last run of a row may be shorter."""
    if size < 1:
        raise DetentError(f"a group has at least 1 element, not {size}")
    return Granularity("per_group", ((-1, size),), rest=1)


def per_block(blocks: dict[int, int | None]) -> Granularity:
    """One scale for each block: `blocks` maps an axis to its block length (None: the whole axis), other axes get 1."""
    if not blocks or any(length is not None and length < 1 for length in blocks.values()):
        raise DetentError(f"block sizes must be positive and at least one axis must be named, not {blocks}")
    if set(blocks) == {-1}:
        size = blocks[-1]
        return per_token() if size is None else per_group(size)
    return Granularity("per_block", tuple(sorted(blocks.items(), reverse=True)), rest=1)


def per_token() -> Granularity:
    """One scale for each vector along the last axis, whatever the rank: the usual one for activations."""
    return Granularity("per_token", ((-1, None),), rest=1)


def to_tiles(x: Tensor, granularity: Granularity, repeat_edge: bool = False) -> Tensor:
    """`x` as [tiles, elements per tile]; short blocks are padded with zeros, or with their edge value (`repeat_edge`).

    A view of `x` where its memory allows it, else a copy. Empty tensors give empty tiles.
    """
    if granularity.kind == "per_tensor":
        return x.reshape(1, -1)
    shape = tuple(x.shape)
    lengths = granularity.lengths(shape)
    grid = granularity.grid(shape)
    if x.numel() == 0:
        return x.new_empty(math.prod(grid), math.prod(lengths))
    for axis, (blocks, length) in enumerate(zip(grid, lengths, strict=True)):
        short = blocks * length - x.shape[axis]
        if short and repeat_edge:
            index = torch.arange(blocks * length, device=x.device).clamp_max(x.shape[axis] - 1)
            x = x.index_select(axis, index)
        elif short:
            x = torch.nn.functional.pad(x, [0, 0] * (x.dim() - 1 - axis) + [0, short])
    if _lie_in_rows(lengths, shape):
        return x.reshape(-1, math.prod(lengths))
    split = [n for pair in zip(grid, lengths, strict=True) for n in pair]
    order = list(range(0, 2 * len(shape), 2)) + list(range(1, 2 * len(shape), 2))
    return x.reshape(split).permute(order).reshape(math.prod(grid), math.prod(lengths))


def from_tiles(tiles: Tensor, granularity: Granularity, shape: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`to_tiles`, padding dropped."""
    if granularity.kind == "per_tensor" or 0 in shape:
        return tiles.reshape(shape)
    lengths, grid = granularity.lengths(shape), granularity.grid(shape)
    padded = [blocks * length for blocks, length in zip(grid, lengths, strict=True)]
    if _lie_in_rows(lengths, shape):
        x = tiles.reshape(padded)
    else:
        order = [n for axis in range(len(shape)) for n in (axis, len(shape) + axis)]
        x = tiles.reshape(*grid, *lengths).permute(order).reshape(padded)
    return x[tuple(slice(0, size) for size in shape)].contiguous()


def _lie_in_rows(lengths: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether tiles are consecutive in row-major memory: 1s, then one partial axis, then whole axes."""
    axis = 0
    while axis < len(shape) and lengths[axis] == 1:
        axis += 1
    return all(length == size for length, size in zip(lengths[axis + 1 :], shape[axis + 1 :], strict=True))


def rows_suffice(granularity: Granularity, shape: tuple[int, ...]) -> bool:
    """Whether the elements of a tensor that isn't empty keep their order in its tiles, without padding."""
    if granularity.kind == "per_tensor":
        return True
    lengths = granularity.lengths(shape)
    return _lie_in_rows(lengths, shape) and all(n % length == 0 for n, length in zip(shape, lengths, strict=True))
