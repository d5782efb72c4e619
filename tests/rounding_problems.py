"""Small problems for algorithms that choose codes one by one, and the formats that they serve."""

from __future__ import annotations

import torch

from detent.formats import (
    Format,
    Scales,
    encode,
    fp8,
    integer,
    mx,
    nf4,
    nvfp4,
    per_channel,
    per_group,
    small_float,
)

FORMATS = [
    integer(2, per_group(8)),
    integer(3, per_channel(0), rule="qmax"),
    integer(4, per_group(8), symmetric=False, signed=False),
    integer(4, per_group(8), symmetric=False, signed=False, float_zero_point=True),
    integer(4, per_group(8), signed=False),
    integer(8, per_channel(0)),
    integer(4, per_group(8)).with_scale_dtype("bfloat16"),
    small_float("e2m1", per_group(8)),
    nf4(per_group(8)),
    fp8("e4m3", per_channel(0)),
    nvfp4(),
    mx("e2m1"),
]


def problem(rows: int = 6, width: int = 20, count: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and tokens of strongly correlated channels."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width // 2, width, generator=generator)
    noise = 0.1 * torch.randn(count, width, generator=generator)
    x = torch.randn(count, width // 2, generator=generator) @ mixing + noise
    return torch.randn(rows, width, generator=generator), x


def own_scales(weight: torch.Tensor, fmt: Format) -> Scales:
    """The scales that the weight itself asks for."""
    return encode(weight, fmt).scales
