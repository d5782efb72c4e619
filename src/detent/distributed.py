"""Process groups, what processes tell each other, and reductions. All of it is the identity in a single process.

Processes that share one run are joined by `join`. Whatever they tell each other begins with a header from each of them,
which says whether it has failed: a process that fails tells the others with its next message, and none of them waits
for it in vain.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

#: The others wait while the first process evaluates and writes; a launcher ends those whose companion has died.
_PATIENCE = timedelta(days=7)


class ProcessFailed(Exception):
    """Another process of the run has failed, and says how."""


def _active() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def all_reduce_max(x: Tensor, group: Any = None) -> Tensor:
    """The elementwise maximum of `x` over the ranks of `group` (None: all ranks; -1: a group that is not in use)."""
    if not _active() or group == -1:
        return x
    x = x.clone()
    torch.distributed.all_reduce(x, torch.distributed.ReduceOp.MAX, group=group)
    return x


# ---- the processes of one run ---------------------------------------------------------------------------------------

#: This process's number, and how many share the run.
_joined = (0, 1)


def rank() -> int:
    """This process's number among those that share the run."""
    return _joined[0]


def size() -> int:
    """How many processes share the run."""
    return _joined[1]


def launched() -> tuple[int, int]:
    """This process's number and how many there are, as a launcher such as torchrun says."""
    try:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        return 0, 1


def join() -> bool:
    """Share a run with the other processes that a launcher has started; whether the group had to be made.

    Raises:
        RuntimeError, ValueError: the launcher's environment is incomplete, or the others can't be reached.
    """
    global _joined
    fresh = not _active()
    if fresh:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=_PATIENCE)
    _joined = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return fresh


def leave(*, end: bool) -> None:
    """Share no run any more; with `end`, the group is given up."""
    global _joined
    _joined = (0, 1)
    if end:
        torch.distributed.destroy_process_group()


def gathered(notes: Any = None, tensors: Mapping[str, Tensor] | None = None) -> list[tuple[Any, dict[str, Tensor]]]:
    """What each process passes in, by rank: JSON values, and tensors, which arrive on the CPU.

    Raises:
        ProcessFailed: one has failed.
    """
    if size() == 1:
        return [(notes, dict(tensors or {}))]
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in (tensors or {}).items()}
    return [
        (json.loads(first), load(second)) for first, second in _exchanged(False, json.dumps(notes).encode(), save(own))
    ]


def tell_failure(message: str) -> None:
    """Have the others fail where they wait for this process."""
    _exchanged(True, message.encode(), b"")


def _exchanged(failed: bool, first: bytes, second: bytes) -> list[tuple[bytes, bytes]]:
    header = torch.tensor([failed, len(first), len(second)])
    headers = [torch.empty_like(header) for _ in range(size())]
    parts = []
    try:
        torch.distributed.all_gather(headers, header)
        for source, (_, length, more) in enumerate(row.tolist() for row in headers):
            buffer = torch.empty(length + more, dtype=torch.uint8)
            if source == rank():
                buffer = torch.frombuffer(bytearray(first + second), dtype=torch.uint8)
            torch.distributed.broadcast(buffer, source)
            parts.append((buffer[:length].numpy().tobytes(), buffer[length:].numpy().tobytes()))
    except RuntimeError:  # the connection is gone
        raise ProcessFailed("another process of this run has ended; what it said before is the reason") from None
    lost = [number for number, row in enumerate(headers) if row[0]]
    if lost and not failed:
        raise ProcessFailed(f"process {lost[0]} of {size()}: {parts[lost[0]][0].decode()}")
    return parts


def summed(x: Tensor) -> Tensor:
    """The sum of `x` over the processes, in its place. They have met with `gathered` just before."""
    if size() > 1:
        torch.distributed.all_reduce(x)
    return x


def dealt(costs: Sequence[float]) -> list[int]:
    """For each piece of work the process that does it: the most costly first, each to the one with the least so far."""
    load_of, owners = [0.0] * size(), [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
        owners[piece] = min(range(size()), key=load_of.__getitem__)
        load_of[owners[piece]] += costs[piece]
    return owners


@dataclass
class ParallelState:
    """The process groups that a module's parameters are spread over; -1 for a group that is not in use.

    Attributes:
        data_parallel_group: ranks that hold the same weights and see different data (None: all ranks).
        tensor_parallel_group: ranks that hold slices of the same weight.
        expert_model_parallel_group: ranks that hold different experts.

    Example:
        >>> import detent
        >>> detent.ParallelState(data_parallel_group=-1).tensor_parallel_group
        -1
    """

    data_parallel_group: Any = None
    tensor_parallel_group: Any = -1
    expert_model_parallel_group: Any = -1
