"""Units of choice: layers that engines run as one, and so have to become the same.

Invariant: each layer is in one unit, and a unit has at least one option.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from detent.structure import Structure


@dataclass(frozen=True)
class Unit:
    """Layers that share a choice.

    Attributes:
        modules: their names.
        options: names of what they may become.
    """

    modules: tuple[str, ...]
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        """What results call it: its first module."""
        return self.modules[0]


def grouped(
    layers: Sequence[str], structure: Structure | None, tied: Iterable[Sequence[str]] = ()
) -> list[tuple[str, ...]]:
    """Layers in groups that have to become the same: what engines fuse, the experts of a mixture, and tied weights.

    Args:
        layers: names of modules, in the order of the model.
        structure: of the model, where it is known.
        tied: names of modules that share a weight.
    """
    joined = [] if structure is None else [*structure.fused_groups, *(m.weights for m in structure.mixtures)]
    leader = {name: name for name in layers}

    def of(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    for group in [*joined, *tied]:
        members = [name for name in group if name in leader]
        for name in members[1:]:
            leader[of(name)] = of(members[0])
    groups: dict[str, list[str]] = {}
    for name in layers:
        groups.setdefault(of(name), []).append(name)
    return [tuple(members) for members in groups.values()]
