"""Rotations: orthogonal matrices that spread outliers over channels, and how they go into weights (QuaRot, arXiv
2404.00456; the names R1 to R4 are those of SpinQuant, arXiv 2405.16406).

A row vector x becomes ``x R``. A weight [out, in] that reads x becomes ``W R``, one that writes it ``R^T W``, and a
norm that divides by the length of x commutes with R once its own weight g is inside the readers: ``W diag(g) R``.

LayerNorm also subtracts the mean, ``x - (x 1) 1^T / n``. That commutes with every R that keeps the vector of ones,
``R 1 = 1``, so no norm has to be replaced: `make_rotation(keeps_mean=True)` gives ``R = N D N^T``, N a Hadamard matrix
whose first column is constant and D random signs, the first being +1.

Everything is computed in float64; a result is rounded once, where it is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from detent.algorithms.registry import Handler, ModelWork, register
from detent.config.transforms import RotationConfig
from detent.errors import DetentError
from detent.nn.hadamard import hadamard_transform, random_signs, rotation_block
from detent.nn.hadamard_matrices import first_column

#: Draws of random signs, and the blocks for which more than one is made.
_DRAWS, _SMALL = 32, 128


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix R, block-diagonal with equal blocks, applied without being written out.

    Attributes:
        width: of R.
        block: size of its blocks; `width` where it mixes all channels.
        signs: float64 [width] of +1 and -1, or None: D before the Hadamard matrix, or between the two where the mean
            stays.
        keeps_mean: whether R keeps the vector of ones.
    """

    width: int
    block: int
    signs: Tensor | None
    keeps_mean: bool

    def turn(self, x: Tensor, axis: int = -1) -> Tensor:
        """``x R`` along `axis`, whose length is the width or, for a rotation of heads, a multiple of it; float64."""
        y = x.detach().to(torch.float64).transpose(axis, -1)
        if y.shape[-1] % self.width:
            raise DetentError(f"rotation: an axis of {y.shape[-1]} channels doesn't consist of runs of {self.width}")
        shape = y.shape
        y = y.reshape(*shape[:-1], -1, self.width)
        signs = None if self.signs is None else self.signs.to(y.device)
        if self.keeps_mean:
            first = first_column(self.block).to(y).repeat(self.width // self.block)
            y = hadamard_transform(y * first, self.block)
            y = hadamard_transform(y if signs is None else y * signs, self.block, inverse=True) * first
        else:
            y = hadamard_transform(y if signs is None else y * signs, self.block)
        return y.reshape(shape).transpose(axis, -1)

    def matrix(self) -> Tensor:
        """R, float64 [width, width]."""
        return self.turn(torch.eye(self.width, dtype=torch.float64))

    def __str__(self) -> str:
        whole = self.block == self.width
        return f"{self.width} channels" if whole else f"{self.width} channels in blocks of {self.block}"


def make_rotation(
    width: int, *, block_size: int | None = None, random: bool = False, seed: int = 0, keeps_mean: bool = False
) -> Rotation:
    """A rotation of `width` channels.

    Args:
        width: number of channels.
        block_size: see `rotation_block`; None: the whole width, or the largest blocks that have a Hadamard matrix.
        random: put random signs before the Hadamard matrix.
        seed: of the signs.
        keeps_mean: R 1 = 1; always has random signs, without which R would be the identity.

    Raises:
        DetentError: no Hadamard matrix for the width or the block; a mean is to be kept in blocks of 2, where only the
            identity and a swap do that.
    """
    block = rotation_block(width, block_size)
    if keeps_mean and block < 4:
        raise DetentError(
            f"a width of {width} can only be rotated in blocks of {block}, and there no rotation but a swap keeps the"
            " mean that LayerNorm subtracts; leave this rotation off"
        )
    if keeps_mean:
        return Rotation(width, block, _mixing_signs(block, seed).repeat(width // block), True)
    return Rotation(width, block, random_signs(width, seed).double() if random else None, False)


def _mixing_signs(block: int, seed: int) -> Tensor:
    """Signs D, the first +1, under which N D N^T has no large entry, float64 [block].

    Few signs can happen to give the identity or a permutation; of small blocks the best of many draws is taken.
    """
    best, least = torch.ones(block, dtype=torch.float64), 2.0
    for draw in range(_DRAWS if block <= _SMALL else 1):
        signs = random_signs(block, seed + draw).double()
        signs[0] = 1.0
        largest = float(Rotation(block, block, signs, True).matrix().abs().amax()) if block <= _SMALL else 1.0
        if largest < least:
            best, least = signs, largest
    return best


def turn_reader(weight: Tensor, rotation: Rotation, axis: int = 1, gain: Tensor | None = None) -> Tensor:
    """``W diag(gain) R`` of a weight that reads rotated channels along `axis`, float64."""
    wide = weight.detach().to(torch.float64)
    if gain is not None:
        wide = (wide.transpose(axis, -1) * gain.to(wide)).transpose(axis, -1)
    return rotation.turn(wide, axis)


def turn_writer(weight: Tensor, rotation: Rotation, axis: int = 0) -> Tensor:
    """``R^T W`` of a weight whose output channels are on `axis`; of a bias or embedding along axis -1."""
    return rotation.turn(weight, axis)  # (R^T W)_ij = sum_k W_kj R_ki


def offset_through(weight: Tensor, offset: Tensor, axis: int = 1) -> Tensor:
    """``W b``: what a constant b added to the input of a weight adds to its output, float64 [..., out]."""
    return (weight.detach().to(torch.float64).transpose(axis, -1) * offset.to(weight.device, torch.float64)).sum(-1)


def turn_rows(weight: Tensor, rotation: Rotation, rows: Tensor, axis: int = 0) -> Tensor:
    """``R^T`` on the rows `rows` of a weight, runs of the rotation's width; other rows stay. float64."""
    wide = weight.detach().to(torch.float64).clone()
    index = rows.to(wide.device)
    return wide.index_copy(axis, index, rotation.turn(wide.index_select(axis, index), axis))


@register(RotationConfig)
class RotationHandler(Handler[RotationConfig]):
    """Rotates the model, which is left without ranges."""

    scope = "model"
    finds_ranges = False

    def change(self, step: RotationConfig, work: ModelWork) -> None:
        work.rotate(step)
