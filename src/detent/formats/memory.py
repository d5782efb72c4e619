"""Memory for large results, and doing without it."""

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


def in_parts(function: Callable[..., tuple[Tensor, ...]], *rows: Tensor, size: int = 1 << 14) -> tuple[Tensor, ...]:
    """`function` of tensors with equally many rows, a few rows at a time: what it makes on the way stays in the cache,
    where fresh memory would cost more than the arithmetic.

    Example:
        >>> import torch
        >>> in_parts(lambda x: ((x * 2).sum(1), x.amax(1)), torch.ones(3, 2), size=2)
        (tensor([4., 4., 4.]), tensor([1., 1., 1.]))
    """
    count = len(rows[0]) if rows[0].dim() else 1
    if count <= size:
        return function(*rows)
    out: tuple[Tensor, ...] = ()
    for start in range(0, count, size):
        found = function(*(x[start : start + size] for x in rows))
        out = out or tuple(new_tensor((count, *t.shape[1:]), t.dtype, t.device) for t in found)
        for whole, part in zip(out, found, strict=True):
            whole[start : start + size] = part
    return out


@cache
def _madvise() -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
