"""The chain of repeated blocks: the list of alike modules that holds most of a model's parameters.

Whether they really run one after the other, each on what the one before gives, is seen when they run.
"""

from __future__ import annotations

from torch import nn


def block_names(model: nn.Module) -> list[str]:
    """Names of the blocks, in the order of their list; empty where no list has two members of one kind."""
    best: tuple[int, list[str]] = (0, [])
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < 2:
            continue
        members = dict(module.named_children())
        kinds = {type(member) for member in members.values()}
        if len(kinds) > max(1, len(members) // 2):  # layers of different kinds, such as a small network's
            continue
        if not all(_has_matrix(member) and any(True for _ in member.children()) for member in members.values()):
            continue
        size = sum(parameter.numel() for parameter in module.parameters())
        if size > best[0]:
            best = (size, [f"{name}.{child}".removeprefix(".") for child in members])
    return best[1]


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())
