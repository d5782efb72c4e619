"""The chain of blocks and the experts of a model: from its structure, or guessed where that isn't known.

Whether blocks really run one after the other, each on the output of the one before, is checked when they run. Experts
are members of a list of modules, and each batch of data reaches only some of them; what an expert without data needs,
such as the range of its input, is taken from the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from detent.nn import SequentialQuantizer, TensorQuantizer
from detent.structure.site import Structure


def chain_of(model: nn.Module, structure: Structure | None) -> list[str]:
    """Names of the blocks that are traversed one by one, in their order: of the lists in a structure, or else of all
    lists whose members are of few kinds, the one with most parameters."""
    lists = _alike_lists(model) if structure is None or not structure.blocks else _by_list(structure.blocks)

    def size(names: Sequence[str]) -> int:
        return sum(p.numel() for name in names for p in model.get_submodule(name).parameters())

    return list(max(lists, key=size, default=()))


def _by_list(names: Iterable[str]) -> list[list[str]]:
    lists: dict[str, list[str]] = {}
    for name in names:
        lists.setdefault(name.rpartition(".")[0], []).append(name)
    return list(lists.values())


def _alike_lists(model: nn.Module) -> list[list[str]]:
    """Lists of two modules or more, of few kinds, each of which holds a matrix in a submodule."""
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < 2:
            continue
        members = dict(module.named_children())
        kinds = {type(member) for member in members.values()}
        if len(kinds) > max(1, len(members) // 2):  # layers of different kinds, such as a small network's
            continue
        if all(_holds_a_layer(member) for member in members.values()):
            found.append([f"{name}.{child}".removeprefix(".") for child in members])
    return found


def _holds_a_layer(module: nn.Module) -> bool:
    parts = [child for child in module.children() if not isinstance(child, (TensorQuantizer, SequentialQuantizer))]
    return bool(parts) and any(parameter.dim() > 1 for parameter in module.parameters())


class Experts:
    """The experts of a model.

    They are those of the structure; where that has none, any member of a list of modules that isn't the chain of
    blocks can be one.
    """

    def __init__(self, model: nn.Module, chain: Iterable[str], structure: Structure | None = None) -> None:
        if structure is not None and structure.mixtures:
            self._lists: list[Sequence[str]] = [mixture.members for mixture in structure.mixtures]
            return
        blocks = set(chain)
        lists = [
            [f"{name}.{child}" for child, _ in module.named_children()]
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList)
        ]
        self._lists = [members for members in lists if not blocks & set(members)]

    def twins(self, name: str) -> list[str]:
        """What is called like it in the other experts of its list: of a layer or quantizer called `name`."""
        for members in self._lists:
            own = next((member for member in members if name.startswith(f"{member}.")), None)
            if own is not None:
                return [member + name.removeprefix(own) for member in members if member != own]
        return []
