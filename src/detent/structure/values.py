"""The random numbers of a probe: always the same, whatever was drawn before."""

from __future__ import annotations

import torch
from torch import Tensor

#: Number of random weightings of an activation's rows under which it is remembered.
COMBINATIONS = 4


def positive(shape: torch.Size, seed: int) -> Tensor:
    """Numbers from [0.5, 1.5], under which no rectifier is off and nothing cancels; float64."""
    return torch.rand(shape, generator=_generator(seed), dtype=torch.float64) + 0.5


def spread(shape: torch.Size, seed: int) -> Tensor:
    """Numbers of both signs from a hundredth to almost a hundred, so that clamps and saturation show; float64."""
    signed = torch.rand(shape, generator=_generator(seed), dtype=torch.float64).mul_(2).sub_(1)
    return signed.abs().sub_(0.5).mul_(9).exp_().mul_(signed.sign_())


def factors(n: int, seed: int) -> Tensor:
    """n distinct factors from [0.5, 2]; float64."""
    return torch.exp2(torch.rand(n, generator=_generator(seed), dtype=torch.float64) * 2 - 1)


def combinations(rows: int) -> Tensor:
    """The weights of rows, [COMBINATIONS, rows], float64: the same for each tensor with that many rows."""
    return torch.rand(COMBINATIONS, rows, generator=_generator(rows), dtype=torch.float64) + 0.5


def householder(width: int) -> Tensor:
    """The unit vector v of the reflection I - 2 v v^T, an orthogonal matrix that mixes all channels."""
    v = torch.randn(width, generator=_generator(width), dtype=torch.float64)
    unit: Tensor = v / v.norm()
    return unit


def reflect(x: Tensor, v: Tensor) -> Tensor:
    """x [..., width] times the reflection I - 2 v v^T."""
    v = v.to(x)
    return x - 2 * (x @ v).unsqueeze(-1) * v


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
