"""Going through the modules of a model."""

from __future__ import annotations

from torch import nn


def walk(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of a model and all modules in it, each once, in the order of `named_modules`, which takes several
    times as long: it hands each name up through as many generators as the module lies deep.

    Example:
        >>> from torch import nn
        >>> [name for name, _ in walk(nn.Sequential(nn.Sequential(nn.ReLU()), nn.ReLU()))]
        ['', '0', '0.0', '1']
    """
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    left: list[tuple[str, nn.Module]] = [("", model)]
    while left:
        name, module = left.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append((name, module))
        start = f"{name}." if name else ""
        left.extend((start + key, child) for key, child in reversed(module._modules.items()) if child is not None)
    return found
