"""Which linear layers read the same tensor (query, key and value; gate and up), found by running the model once.

Engines fuse such layers into one matrix, so a scale that covers a whole matrix has to be the same in all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def linears_sharing_input(model: nn.Module, run: Callable[[nn.Module], Any]) -> list[list[str]]:
    """Names of `nn.Linear` modules, grouped where siblings are called with the very same tensor.

    Args:
        model: the model.
        run: calls it once on any small input.

    Returns:
        Groups of two or more names, in the order of their first call.
    """
    calls: dict[tuple[str, int], list[str]] = {}
    kept: list[Any] = []  # keeps tensors alive, so that an id is never used twice

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args:
                kept.append(args[0])
                members = calls.setdefault((name.rpartition(".")[0], id(args[0])), [])
                if name not in members:
                    members.append(name)

        return hook

    hooks = [m.register_forward_pre_hook(watch(n)) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    try:
        run(model)
    finally:
        for hook in hooks:
            hook.remove()
    return [names for names in calls.values() if len(names) > 1]
