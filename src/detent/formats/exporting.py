"""While a graph of the model is made, for `torch.export` or ONNX, tensors have no values that Python could look at, and
the graph has no operation on bit patterns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: PyTorch 2.6 tells exporting from compiling in neither way.
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def exporting() -> bool:
    """Whether a graph is being made."""
    return _is_exporting() or (tracing() and torch.onnx.is_in_onnx_export())


def tracing() -> bool:
    """Whether PyTorch's older tracer runs, with tensors that have values."""
    jit: Any = torch.jit
    return bool(jit.is_tracing())


def floor_log2_by_arithmetic(v: Tensor) -> Tensor:
    """`elements.floor_log2` as float64: a logarithm, which may be off near powers of two, put right by comparing."""
    magnitude = torch.where(v == 0, 1.0, v.abs())
    e = torch.floor(torch.log2(magnitude))
    e = torch.where(2.0**e > magnitude, e - 1, e)
    e = torch.where(2.0 ** (e + 1) <= magnitude, e + 1, e)
    return torch.where(v == 0, -1023.0, e)
