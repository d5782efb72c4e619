"""A guess at the blocks of a model that there are no inputs for: the list that holds most of its parameters.

Use `Structure.chains` wherever a structure was found: that has seen the blocks run.
"""

from __future__ import annotations

from torch import nn

from detent.structure.skeleton import is_block


def block_names(model: nn.Module) -> list[str]:
    """Names of the blocks, in the order of their list; empty where no list has two members of one kind."""
    best: tuple[int, list[str]] = (0, [])
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < 2:
            continue
        kinds = {type(member) for member in module}
        # Layers of different kinds, such as a small network's, and plain layers are no blocks.
        if len(kinds) > max(1, len(module) // 2) or not all(map(is_block, module)):
            continue
        size = sum(parameter.numel() for parameter in module.parameters())
        if size > best[0]:
            best = (size, [f"{name}.{child}".removeprefix(".") for child, _ in module.named_children()])
    return best[1]
