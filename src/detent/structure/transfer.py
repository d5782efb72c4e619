"""What was found in the blocks that were run, for the blocks of their kinds that were left out: by names alone.

Invariant: where no block was left out, nothing changes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from detent.structure.site import Site, Structure

T = TypeVar("T")


class Transfer:
    """Makes the structure of a whole model from that of its skeleton.

    Args:
        chains: all blocks, chain by chain in the order in which they run.
        skipped: by block that was left out, the block that represents it.
    """

    def __init__(self, chains: Sequence[Sequence[str]], skipped: dict[str, str]) -> None:
        self._skipped = skipped
        self._order = [name for chain in chains for name in chain]
        self._place = {name: index for index, name in enumerate(self._order)}
        self._blocks = re.compile(
            r"(?<![\w.])(?:" + "|".join(map(re.escape, sorted(self._order, key=len)[::-1])) + r")(?![\w])"
        )
        run = [name for name in self._order if name not in skipped]
        #: By block that was run, those before and after it in the skeleton.
        self._around = {b: (a, c) for a, b, c in zip(["", *run], run, [*run[1:], ""], strict=False)}

    def alike(self, structure: Structure, first: str, last: str) -> bool:
        """Whether two blocks were found to have the same sites, folds and roles, their names aside."""

        def renamed(block: str) -> Any:
            names = {block: "{block}", **dict(zip(self._around[block], ("{before}", "{after}"), strict=True))}
            sites = [replace(s, reason="") for s in structure.sites if s.block == block and not self._spans(s)]
            across = [w for s in structure.sites if self._spans(s) for w in s.weights if self.block(w) == block]
            roles = [[x for x in getattr(structure, role) if self.block(x) == block] for role in _ROLES]
            return self._renamed([sites, across, roles], names)

        return bool(renamed(first) == renamed(last))

    def completed(self, structure: Structure) -> Structure:
        """The structure of all blocks."""
        if not self._skipped:
            return structure
        stream = structure.stream
        if stream is not None:
            stream = replace(stream, readers=self._spread(stream.readers), writers=self._spread(stream.writers))
        lists = {name: self._spread(getattr(structure, name)) for name in _ROLES}
        lists["sites"] = tuple(map(self._widened, self._spread(structure.sites)))
        return replace(structure, stream=stream, **lists)

    def block(self, value: Any) -> str | None:
        """The block that a name, or what has names, belongs to."""
        while not isinstance(value, str):
            value = value[0] if isinstance(value, tuple) else getattr(value, fields(value)[0].name)
        match = self._blocks.match(value)
        return match.group() if match else None

    def _spans(self, value: Any) -> bool:
        """Whether a site's weights are in several blocks, such as all that read an encoder's output."""
        return isinstance(value, Site) and len({self.block(name) for name in value.weights}) > 1

    def _widened(self, site: Site) -> Site:
        """A site across blocks, with the weights of those that were left out."""
        if not self._spans(site):
            return site
        pairs = self._spread(list(zip(site.weights, site.column_axes, strict=True)))
        weights, axes = zip(*pairs, strict=True)
        return replace(site, weights=weights, column_axes=axes, routed=self._spread(site.routed))

    def _spread(self, entries: Iterable[T]) -> tuple[T, ...]:
        """Entries of the run blocks, and those of the blocks that were left out before the next that was run."""
        own: dict[str, list[T]] = {}
        entries = list(entries)
        for entry in entries:
            if (block := self.block(entry)) is not None and not self._spans(entry):
                own.setdefault(block, []).append(entry)
        missing = [name for name in self._order if name in self._skipped]
        result: list[T] = []

        def add(until: int) -> None:
            while missing and self._place[missing[0]] < until:
                name = missing.pop(0)
                result.extend(
                    self._moved(entry, self._skipped[name], name) for entry in own.get(self._skipped[name], [])
                )

        for entry in entries:
            block = self.block(entry)
            if block is None or self._spans(entry):
                result.append(entry)
            else:
                add(self._place[block])
                result.append(self._moved(entry, block, block))
        add(len(self._order))
        return tuple(result)

    def _moved(self, value: T, block: str, to: str) -> T:
        """What is known of one block under another's names, whose neighbours are those in the whole model."""
        place = self._place[to]
        around = self._order[place - 1] if place else "", self._order[place + 1] if place + 1 < len(self._order) else ""
        result: T = self._renamed(value, {**dict(zip(self._around[block], around, strict=True)), block: to})
        return result

    def _renamed(self, value: Any, names: dict[str, str]) -> Any:
        change: Callable[[Any], Any] = lambda v: self._renamed(v, names)  # noqa: E731
        if isinstance(value, str):
            return self._blocks.sub(lambda m: names.get(m.group()) or m.group(), value)
        if isinstance(value, (tuple, list)):
            return value if value and isinstance(value[0], int) else type(value)(map(change, value))
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{f.name: change(getattr(value, f.name)) for f in fields(value)})
        return value


_ROLES = ("routers", "gates", "experts", "keys", "values", "unread", "taken", "mixtures", "fused_groups")
