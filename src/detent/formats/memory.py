"""Memory for large results."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

_PAGE = 1 << 21


def new_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty tensor, in pages of 2 MiB where Linux grants them.

    The first write to a page makes the system clear and map it: with pages of 4 KiB that takes three times as long as
    copying the tensor. The advice (madvise, MADV_HUGEPAGE) changes neither contents nor lifetime, and may be ignored.
    """
    out = torch.empty(shape, dtype=dtype, device=device)
    advise = _madvise()
    if advise is not None and out.device.type == "cpu" and out.nbytes >= 4 * _PAGE:
        start = -(-out.data_ptr() // _PAGE) * _PAGE
        advise(ctypes.c_void_p(start), ctypes.c_size_t((out.data_ptr() + out.nbytes - start) // _PAGE * _PAGE), 14)
    return out


@cache
def _madvise() -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
