"""Fake quantization written out by hand in float64 NumPy, for tests to compare with. Nothing of Detent is used."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch


def as_array(x: torch.Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy().astype(np.float64)


def as_range(amax: object) -> np.ndarray:
    return np.asarray(amax.detach().float().cpu() if isinstance(amax, torch.Tensor) else amax, np.float32)


def integers(x: torch.Tensor, amax: object, bits: int = 8) -> torch.Tensor:
    """Symmetric integers under the scale amax / (2^(b-1) - 1); `amax` broadcasts against x."""
    top = 2 ** (bits - 1) - 1
    scale = (as_range(amax) / np.float32(top)).astype(np.float32)
    scale = np.where(scale == 0, np.float32(1), scale)
    codes = np.clip(np.rint(as_array(x) / scale.astype(np.float64)), -top - 1, top)
    return torch.from_numpy((codes.astype(np.float32) * scale).astype(np.float32)).to(x.dtype)


def small_floats(x: torch.Tensor, amax: object, dtype: type = ml_dtypes.float8_e4m3fn) -> torch.Tensor:
    """The nearest number of a small float type under the scale amax / largest, ties to the even code."""
    codes = np.arange(256 if dtype is not ml_dtypes.float4_e2m1fn else 16, dtype=np.uint8)
    values = codes.view(dtype).astype(np.float64)
    keep = np.isfinite(values) & ~np.signbit(values)
    grid, even = values[keep], codes[keep] % 2 == 0
    scale = (as_range(amax) / np.float32(grid.max())).astype(np.float32)
    scale = np.where(scale == 0, np.float32(1), scale)
    ratio = as_array(x) / scale.astype(np.float64)
    distance = np.abs(np.abs(ratio)[..., None] - grid)
    tie = distance == distance.min(-1, keepdims=True)
    index = np.argmax(tie * (1 + even), -1)  # of two that are equally near, the even one
    values = np.sign(ratio) * grid[index]
    return torch.from_numpy((values.astype(np.float32) * scale).astype(np.float32)).to(x.dtype)
