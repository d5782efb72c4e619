"""Process groups and reductions. Everything here is the identity in a single process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def _active() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def all_reduce_max(x: Tensor, group: Any = None) -> Tensor:
    """The elementwise maximum of `x` over the ranks of `group` (None: all ranks; -1: a group that is not in use)."""
    if not _active() or group == -1:
        return x
    x = x.clone()
    torch.distributed.all_reduce(x, torch.distributed.ReduceOp.MAX, group=group)
    return x


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
