"""What weights are for: routers, experts and shared experts, gates, and the weights that engines join into one matrix.

Read off one trace. A *consumer* of a weight is a weight of the same block whose input its output is part of, norms
between them (of queries, keys, latents) looked through; what has an embedding for a part is the residual stream and
doesn't count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from detent.nn.experts import QuantExperts
from detent.structure.site import Mixture, Site
from detent.structure.trace import Reading, Trace

#: A norm over more outputs than this is one of the residual stream.
_MOST_SOURCES = 2


class Roles:
    """The roles of a model's weights.

    Args:
        model: the model.
        trace: of a run of it.
        blocks: its blocks.
    """

    def __init__(self, model: nn.Module, trace: Trace, blocks: Sequence[str]) -> None:
        self._model, self._trace, self._blocks = model, trace, blocks
        self._seen = {r.name for r in trace.readings if r.kind == "weight" and r.rows}
        self.mixtures = self._find_mixtures()
        self.routers = tuple(n for n in trace.choosers if any(n == mixture.router for mixture in self.mixtures))
        # One row: its output multiplies all channels of another's. It chooses nothing.
        rows = {leaf.producer: leaf.size for r in trace.readings for leaf in r.leaves if leaf.kind == "rows"}
        self.gates = tuple(n for n, size in rows.items() if size == 1 and self.block_of(n) and n not in trace.choosers)

    def block_of(self, name: str) -> str | None:
        """The block that a name belongs to."""
        return next((block for block in self._blocks if name.startswith(f"{block}.")), None)

    # ---- routers and experts ----------------------------------------------------------------------------------------

    def _find_mixtures(self) -> list[Mixture]:
        """Tensors that hold all experts, and lists of modules, near a weight whose output chooses."""
        found: dict[str, Mixture] = {}
        for name, (count, joined) in self._trace.fused.items():
            router = self._chooser(name, count, exactly=joined)
            if joined and router is None:  # a matrix read in parts, such as attention's query, key and value
                continue
            module = name.rpartition(".")[0]
            before = found.setdefault(module, Mixture(module, router, count, "joined" if joined else "stacked"))
            found[module] = replace(before, weights=(*before.weights, name))
        for name, module in self._model.named_modules():
            children = alike_children(module)
            if children:
                members = tuple(f"{name}.{key}".lstrip(".") for key in children)
                router = self._chooser(name, len(members)) if len(members) > 1 else None
                inside = tuple(f"{member}." for member in members)
                if router and not set(members) & set(self._blocks) and any(n.startswith(inside) for n in self._seen):
                    matrices = (n for m in members for n in _matrices(self._model.get_submodule(m), m))
                    found[name] = Mixture(name, router, len(members), "list", tuple(matrices), members)
        return list(found.values())

    def _chooser(self, name: str, count: int, *, exactly: bool = False) -> str | None:
        """The weight that chooses among the `count` experts in `name`: of the same block, closest by name."""
        block = self.block_of(name)
        best: tuple[int, str | None] = (-1, None)
        for chooser, size in self._trace.choosers.items():
            pairs = list(zip(name.split("."), chooser.split("."), strict=False))
            common = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
            near = common > (block or "").count(".") + 1 and not exactly
            if self.block_of(chooser) == block and (size == count or (size > count and near)) and common > best[0]:
                best = (common, chooser)
        return best[1]

    def complete(self, sites: list[Site]) -> list[Site]:
        """The sites with those of list experts to which the probe's few tokens were never sent: like their siblings."""
        for mixture in self.mixtures:
            seen = {m for m in mixture.members if any(n.startswith(f"{m}.") for n in self._seen)}
            missing = [m for m in mixture.members if m not in seen]
            if not missing or not seen:
                continue
            donor = next(m for m in mixture.members if m in seen)
            sites = [s for s in sites if not s.name.startswith(tuple(f"{m}." for m in missing))]
            for index, site in reversed(list(enumerate(sites))):
                if any(w.startswith(f"{donor}.") for w in site.weights):
                    sites[index : index + 1] = self._with_experts(site, donor, missing)
        return sites

    def _with_experts(self, site: Site, donor: str, missing: list[str]) -> list[Site]:
        """A site that a seen expert reads, with what unseen ones read: the same activation, or each its own."""
        own = [(w, axis) for w, axis in zip(site.weights, site.column_axes, strict=True) if w.startswith(f"{donor}.")]
        makers = {leaf.producer for r in self._trace.readings if r.name == own[0][0] for leaf in r.leaves}
        if makers and all(maker.startswith(f"{donor}.") for maker in makers):
            return [site, *(_renamed(site, donor, m) for m in missing)]
        more = [(m + w.removeprefix(donor), axis) for m in missing for w, axis in own]
        names, axes = tuple(w for w, _ in more), tuple(axis for _, axis in more)
        return [
            replace(site, weights=site.weights + names, column_axes=site.column_axes + axes, routed=site.routed + names)
        ]

    # ---- who uses a weight's output ---------------------------------------------------------------------------------

    def used(self, sites: Sequence[Site]) -> tuple[tuple[tuple[str, ...], ...], tuple[Mixture, ...]]:
        """The groups of weights that engines join, and the mixtures with their shared experts."""
        consumers = self._consumers()
        for mixture in self.mixtures:  # experts without tokens are like one that had some
            seen = [m for m in mixture.members if any(n.startswith(f"{m}.") for n in self._seen)]
            for member in set(mixture.members).difference(seen) if seen else ():
                like = {n: c for n, c in consumers.items() if n.startswith(f"{seen[0]}.")}
                consumers |= {
                    member + n.removeprefix(seen[0]): {member + c.removeprefix(seen[0]) for c in of}
                    for n, of in like.items()
                }
        reached = {name: _closure(name, consumers) for name in consumers}
        groups: list[tuple[str, ...]] = []
        for site in sites:
            parents: dict[str, list[str]] = {}
            for name in site.weights:
                if name not in self.routers and name not in self.gates:
                    parents.setdefault(name.rpartition(".")[0], []).append(name)
            for names in parents.values():
                joined = [
                    n for n in names if any(reached.get(n, set()) & reached.get(m, set()) for m in names if m != n)
                ]
                if len(joined) > 1:
                    groups.append(tuple(joined))
        attention = {*self._trace.keys, *self._trace.values}
        attention |= {name for group in groups for name in group if attention & set(group)}
        mixtures = []
        for mixture in self.mixtures:
            neighbours = [
                name
                for site in sites
                if mixture.router in site.weights or set(mixture.weights) & set(site.weights)
                for name in site.weights
                if name not in site.routed and name not in (*self.routers, *self.gates, *attention)
            ]
            shared = dict.fromkeys(n for name in neighbours for n in (name, *sorted(reached.get(name, ()))))
            mixtures.append(replace(mixture, shared=tuple(n for n in shared if n not in mixture.weights)))
        return tuple(groups), tuple(mixtures)

    def _consumers(self) -> dict[str, set[str]]:
        through: dict[str, set[str]] = {}  # by norm, the outputs that it is of
        found: dict[str, set[str]] = {}
        for reading in self._trace.readings:
            makers = self._makers(reading, through)
            if reading.kind == "norm":
                through.setdefault(reading.name, set()).update(makers if len(makers) <= _MOST_SOURCES else ())
            elif reading.kind == "weight":
                block = self.block_of(reading.name)
                for maker in makers:
                    if self.block_of(maker) == block:
                        found.setdefault(maker, set()).add(reading.name)
        return found

    def _makers(self, reading: Reading, through: dict[str, set[str]]) -> set[str]:
        if any(leaf.kind == "embedding" for leaf in reading.leaves):
            return set()
        makers = {leaf.producer for leaf in reading.leaves if leaf.kind == "rows"}
        return makers.union(*(through.get(leaf.producer, set()) for leaf in reading.leaves if leaf.kind == "norm"))


def alike_children(module: nn.Module) -> list[str]:
    """The names of the children of a list of modules of one class, or of a module's experts; else none."""
    if isinstance(module, QuantExperts):
        return module.experts()
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len({type(m) for m in module.children()}) == 1:
        return list(module._modules)
    return []


def _closure(name: str, consumers: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    pending = [name]
    while pending:
        for consumer in consumers.get(pending.pop(), set()) - found:
            found.add(consumer)
            pending.append(consumer)
    return found


def _matrices(module: nn.Module, prefix: str) -> list[str]:
    """Names of the weights in a module, as sites call them."""
    names = [f"{prefix}.{name}" for name, p in module.named_parameters() if p.dim() >= 2 and "quantizer" not in name]
    return [name.removesuffix(".weight") for name in names]


def _renamed(site: Site, old: str, new: str) -> Site:
    def change(name: str) -> str:
        return new + name.removeprefix(old) if name.startswith(f"{old}.") else name

    fold = None if site.fold is None else replace(site.fold, module=change(site.fold.module))
    weights, routed = tuple(map(change, site.weights)), tuple(map(change, site.routed))
    return replace(
        site,
        name=weights[0],
        weights=weights,
        routed=routed,
        fold=fold,
        reason=site.reason.replace(f"{old}.", f"{new}."),
    )
