"""Experts: members of a list of modules of which each batch of data reaches some alone.

What an expert without data needs, such as the range of its input, is taken from the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from detent.structure.chain import block_names
from detent.structure.site import Structure


def chain_of(model: nn.Module, structure: Structure | None) -> list[str]:
    """The blocks that are traversed one by one: of the lists in a structure, the one with most parameters."""
    if structure is None or not structure.blocks:
        return block_names(model)
    lists: dict[str, list[str]] = {}
    for name in structure.blocks:
        lists.setdefault(name.rpartition(".")[0], []).append(name)

    def size(names: Sequence[str]) -> int:
        return sum(p.numel() for name in names for p in model.get_submodule(name).parameters())

    return max(lists.values(), key=size)


class Experts:
    """The experts of a model.

    They are what the structure says; where none was found, any member of a list of modules that isn't the chain of
    blocks can be one.
    """

    def __init__(self, model: nn.Module, blocks: Iterable[str], structure: Structure | None = None) -> None:
        chain = set(blocks)
        if structure is not None and structure.experts:
            lists: dict[str, list[str]] = {}
            for name in structure.experts:
                lists.setdefault(name.rpartition(".")[0], []).append(name)
            self._lists = list(lists.values())
        else:
            self._lists = [
                members
                for name, module in model.named_modules()
                if isinstance(module, nn.ModuleList)
                and not chain & set(members := [f"{name}.{child}" for child, _ in module.named_children()])
            ]

    def twins(self, name: str) -> list[str]:
        """What is called like it in the other experts of its list: of a layer or quantizer called `name`."""
        for members in self._lists:
            own = next((member for member in members if name.startswith(f"{member}.")), None)
            if own is not None:
                return [member + name.removeprefix(own) for member in members if member != own]
        return []
