"""The structure of a checkpoint's model, from its configuration alone, and as text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from detent.structure import Fold, Site, Structure


@dataclass
class Branch:
    """A line of a tree and what hangs from it."""

    text: str
    branches: list[Branch] = field(default_factory=list)


def structure_json(name: str, structure: Structure) -> dict[str, Any]:
    """JSON-able. A fold's channels are given as ranges [first, last] of rows, in the order of the site's channels."""
    found = structure.to_dict()
    for site in found["sites"]:
        if site["fold"] is not None and site["fold"]["channels"] is not None:
            site["fold"]["channels"] = _ranges(site["fold"]["channels"])
    return {"model": name, **found}


def _ranges(rows: tuple[int, ...]) -> list[list[int]]:
    ranges: list[list[int]] = []
    for row in rows:
        if ranges and row == ranges[-1][1] + 1:
            ranges[-1][1] = row
        else:
            ranges.append([row, row])
    return ranges


def structure_tree(name: str, structure: Structure) -> Branch:
    """What was found, consecutive equal blocks listed once."""
    root = Branch(name)
    root.branches += [Branch(f"note: {note}") for note in structure.notes]
    root.branches += _stream(structure)
    before = [s for s in structure.sites if s.block is None]
    for names in _runs_of_equal(structure):
        first, last = names[0], names[-1]
        text = f"{first}: 1 block" if first == last else f"{first} ... {last}: {len(names)} blocks, all alike"
        inside = [_site(site, first, structure) for site in structure.sites if site.block == first]
        root.branches.append(Branch(text, inside))
    if before:
        title = "outside the blocks" if structure.blocks else "the whole model"
        root.branches.append(Branch(title, [_site(site, "", structure) for site in before]))
    if structure.unread:
        root.branches.append(Branch("not reached by the probe", [Branch(name) for name in structure.unread]))
    return root


def _stream(structure: Structure) -> list[Branch]:
    stream = structure.stream
    if stream is None:
        return []
    kinds = sorted({f"{norm.kind} norms" for norm in stream.norms})
    parts = [
        f"embeddings {', '.join(stream.embeddings)}" if stream.embeddings else "no embedding table",
        f"{len(stream.readers)} readers ({', '.join(kinds) or 'no norms'})",
        f"{len(stream.writers)} writers",
    ]
    if stream.head is not None:
        parts.append(f"head {stream.head}" + (" (tied)" if stream.tied else ""))
    turns = "can be rotated" if stream.rotatable else f"can't be rotated: {stream.reason}"
    return [Branch(f"residual stream of {stream.width} channels: {', '.join(parts)}; {turns}")]


def _runs_of_equal(structure: Structure) -> list[list[str]]:
    """Blocks in a row whose sites are alike but for the block's name."""
    runs: list[list[str]] = []
    previous: Any = None
    for block in structure.blocks:
        listed = [(b.text, [c.text for c in b.branches]) for b in _sites_of(block, structure)]
        same_list = bool(runs) and runs[-1][-1].rpartition(".")[0] == block.rpartition(".")[0]
        if same_list and listed == previous:
            runs[-1].append(block)
        else:
            runs.append([block])
        previous = listed
    return runs


def _sites_of(block: str, structure: Structure) -> list[Branch]:
    return [_site(site, block, structure) for site in structure.sites if site.block == block]


def _site(site: Site, block: str, structure: Structure) -> Branch:
    def short(name: str) -> str:
        return name.removeprefix(f"{block}.") if block else name

    weights = ", ".join(short(name) + _roles(name, structure) for name in site.weights)
    reason = site.reason.replace(f"{block}.", "") if block else site.reason
    fold = f"no fold: {reason}" if site.fold is None else f"scale folds into {_fold(site.fold, short)}"
    shared = f" (each of {site.experts} experts its own)" if site.experts else ""
    return Branch(weights, [Branch(f"reads {site.width} channels{shared}; {fold}")])


def _roles(name: str, structure: Structure) -> str:
    owner = name.rpartition(".")[0]
    roles = [
        word
        for word, names in (("keys", structure.keys), ("values", structure.values), ("router", structure.routers))
        if name in names
    ]
    if owner in structure.experts or name in structure.experts:
        roles.append("experts")
    return f" [{', '.join(roles)}]" if roles else ""


def _fold(fold: Fold, short: Any) -> str:
    what = {"norm": "the weight", "offset_norm": "1 + weight", "rows": "rows"}[fold.kind]
    text = f"{what} of {short(fold.module)}"
    if fold.parameters[0] != "weight":
        text += f".{fold.parameters[0]}"
    if fold.channels is not None:
        ranges = _ranges(fold.channels)
        shown = ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in ranges[:3])
        text += f" (rows {shown}{', ...' if len(ranges) > 3 else ''}"
        repeats = len(fold.channels) // len(set(fold.channels))
        text += f"; {repeats} channels share a row)" if repeats > 1 else ")"
    return text
