"""Threads by the size of the work.

PyTorch spreads an operation over all threads as soon as it has 2^15 elements, and all of them wait for the slowest.
Where another process holds a core, a region of microseconds then waits for the system to switch: milliseconds, spent
spinning. Work of which no operation is worth a second thread should have one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

#: Multiply-adds of one operation that are worth a thread: about 2 ms, many times what waking and waiting takes.
PER_THREAD = 1 << 26


def threads_for(work: int) -> int:
    """How many threads an operation of `work` multiply-adds is worth; at least 1, at most those that PyTorch has."""
    return max(1, min(torch.get_num_threads(), work // PER_THREAD))


@contextmanager
def threads_by_size(work: int) -> Iterator[None]:
    """Within, PyTorch uses at most `threads_for(work)` threads, `work` being that of the largest usual operation.

    For a linear layer that is tokens * inputs * outputs. The number is the process's: enter it in one thread, around a
    whole run or block, and not around each operation.

    Example:
        >>> import torch
        >>> from detent.threads import threads_by_size
        >>> x = torch.ones(8, 16)
        >>> with threads_by_size(x.numel() * 16):
        ...     (x @ x.T).shape
        torch.Size([8, 8])
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads_for(work))
    try:
        yield
    finally:
        torch.set_num_threads(before)
