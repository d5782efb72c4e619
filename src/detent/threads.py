"""Threads by the size of the work.

PyTorch spreads an operation over all threads as soon as it has 2^15 elements, and all of them wait for the slowest.
Where another process holds a core, a region of microseconds then waits for the system to switch: milliseconds, spent
spinning. If no operation is worth a second thread, one thread is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

#: Multiply-adds of one operation that are worth a thread: about 4 ms, many times what waking and waiting takes.
PER_THREAD = 1 << 27


@contextmanager
def threads_by_size(work: int) -> Iterator[Callable[[int], None]]:
    """Within, PyTorch uses no more threads than `work` is worth, the multiply-adds of the largest usual operation.

    For a linear layer that is tokens * inputs * outputs. The number is the process's: enter it in one thread, around a
    whole run or block, and not around each operation.

    Yields:
        A function to call with the size of an operation to come: a larger one gets more threads, up to those that there
        were before.

    Example:
        >>> import torch
        >>> from detent.threads import threads_by_size
        >>> x = torch.ones(8, 16)
        >>> with threads_by_size(x.numel() * 16):
        ...     (x @ x.T).shape
        torch.Size([8, 8])
    """
    most, largest = torch.get_num_threads(), 0

    def meet(work: int) -> None:
        nonlocal largest
        largest = max(largest, work)
        torch.set_num_threads(max(1, min(most, largest // PER_THREAD)))

    meet(work)
    try:
        yield meet
    finally:
        torch.set_num_threads(most)
