"""`find_structure`: run a model a few times under the probe and read off what its structure is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detent.errors import DetentError
from detent.external.mistakes import MISTAKES
from detent.structure.folds import (
    Group,
    Matcher,
    Rows,
    dependents,
    failures,
    match_factors,
    multiply,
    scale_change,
    sizes,
)
from detent.structure.inputs import Run, runs
from detent.structure.overrides import FoldEntry, Overrides
from detent.structure.probe import Probe
from detent.structure.roles import Roles
from detent.structure.site import Fold, Site, Structure
from detent.structure.skeleton import Skeleton
from detent.structure.stream import find_stream, written_by_all
from detent.structure.trace import Trace
from detent.structure.transfer import Transfer
from detent.structure.values import factors, positive, spread
from detent.structure.weights import DrawnWeights

#: What running a model on inputs that it isn't made for may raise.
#: Runs spent at most on telling apart the producers of one activation.
_MOST_WAVES = 5


def find_structure(
    model: nn.Module, run_or_inputs: Any = None, *, overrides: Mapping[str, Any] | str | Path | None = None
) -> Structure:
    """Blocks, sites, proved folds, experts, key and value projections and the residual stream of a model.

    The model runs a few times on a few tokens, without its weights being used: it may be on any device, the meta
    device included, in any dtype, and may be quantized already. It is left as it was.

    Args:
        model: any module.
        run_or_inputs: example inputs (a tensor, a tuple of arguments, a dictionary of keyword arguments) or a function
            that calls the model it is given. None: made from a transformers model's configuration.
        overrides: a table, or the path of a JSON file, of what to use instead of what is found: see
            `detent.structure.overrides`.

    Returns:
        What was found. `Structure.notes` says what wasn't.

    Raises:
        DetentError: no inputs were given and none can be made; an override names what isn't there, or a fold that
            changes the model's function.

    Example:
        >>> import torch, detent
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 8))
        >>> structure = detent.find_structure(model, torch.ones(2, 8))
        >>> [(site.weights, site.fold.module) for site in structure.sites]
        [(('1',), '0')]
    """
    short, long = runs(model, run_or_inputs)
    table = Overrides.read(overrides)
    skeleton = Skeleton(model)
    if not table.empty:  # what a table says may be about any one block
        skeleton.keep()
    names = {*(n for n, _ in model.named_modules()), *(n for n, _ in model.named_parameters(remove_duplicate=False))}
    while True:
        found = _Discovery(model, short, long, table, skeleton).structure()
        transfer = Transfer(found.chains, skeleton.skipped)
        # Only the first and last block of each kind were run. Where these two turn out different, or a block that was
        # left out has no weight of a name that the transfer gives it, every block of that kind is run after all.
        unlike = {n for pair in skeleton.pairs() if not transfer.alike(found, *pair) for n in pair}
        complete = transfer.completed(found)
        unlike |= {s.block or "" for s in complete.sites if not _exists(s, names)} - {""}
        if not unlike or not skeleton.skipped:
            return complete
        skeleton.keep(unlike)


def _exists(site: Site, names: set[str]) -> bool:
    return names.issuperset(site.weights) and (site.fold is None or site.fold.module in names)


class _Discovery:
    """One discovery: the runs it makes and what they showed."""

    def __init__(self, model: nn.Module, short: Run, long: Run, overrides: Overrides, skeleton: Skeleton) -> None:
        self.model, self._short, self._long, self._overrides = model, short, long, overrides
        self._skeleton = skeleton
        self.weights = DrawnWeights(model)
        self._discover()

    def probe(self, change: dict[str, Callable[[Tensor, int], Tensor]] | None = None, *, long: bool = True) -> Trace:
        """A run: with one token and positive numbers, or with several and numbers of all sizes."""
        with self._skeleton.watching():
            return Probe(self.model, spread if long else positive, change=change).run(
                self._long if long else self._short
            )

    def _first_run(self) -> tuple[Trace, list[Rows]]:
        """The run that shows the chains of blocks, and in which rows are matched.

        It is repeated until the skeleton is confirmed: which blocks are repeated is guessed from the modules, and seen
        in the run itself. A model that fails with blocks left out is run with all of them.
        """
        while True:
            matcher = Matcher()
            try:
                with self._skeleton.watching():
                    trace = Probe(self.model, positive, look=matcher.look).run(self._short)
            except MISTAKES as error:
                if isinstance(error, (DetentError, torch.OutOfMemoryError)):
                    raise
                if self._skeleton.skipped:  # leaving blocks out may be what it fails on
                    self._skeleton.keep()
                    continue
                text = str(error).strip().partition("\n")[0] or "no message"
                raise DetentError(
                    f"{type(self.model).__name__} can't be run to find its structure ({type(error).__name__}: {text});"
                    " pass example inputs that it takes, or a function that calls it"
                ) from error
            if self._skeleton.confirmed():
                return trace, matcher.rows

    def _discover(self) -> None:
        self.trace, matched = self._first_run()
        self.chains = self._skeleton.chains()
        self.producers, self._sizes = self.trace.producers, sizes(self.trace)
        self.rows = self._completed(matched)
        self.reference = self.probe()
        self._reached = dependents(self.reference)
        self.groups = self._grouped()
        self._refuse()
        overridden = self._override()
        self._prove()
        for pattern, group in overridden:
            if group.reason:
                raise DetentError(
                    f"overrides: {pattern!r}: the fold for {self._name(group)} is refused: {group.reason}"
                )

    # ---- rows -------------------------------------------------------------------------------------------------------

    def _completed(self, matched: list[Rows]) -> dict[int, tuple[str, Tensor]]:
        """By number of a reading, the producer and the rows of all its channels; with further runs if necessary.

        Matching, by gradients in the first run, finds channels that are a row times something. For readings that it
        leaves open, a producer's rows are multiplied by distinct factors, and the ratio of what is read with and
        without these tells each channel's row. A wave is one run, in which each open reading tries its next producer.
        """
        found: dict[int, tuple[str, Tensor]] = {}
        open_: dict[int, list[str]] = {}
        for index, (reading, matches) in enumerate(zip(self.trace.readings, matched, strict=True)):
            complete = [(name, r) for name, r in matches.items() if bool((r >= 0).all())]
            if complete:
                found[index] = complete[0]
            elif reading.kind == "weight" and reading.rows:
                makers = dict.fromkeys(leaf.producer for leaf in reading.leaves if leaf.kind != "embedding")
                if len(makers) <= _MOST_WAVES:
                    open_[index] = list(makers)
        for wave in range(_MOST_WAVES):
            wanted = {i: names[wave] for i, names in open_.items() if wave < len(names) and i not in found}
            if not wanted:
                break
            scaled = {
                name: factors(self._sizes[name], seed) for seed, name in enumerate(dict.fromkeys(wanted.values()))
            }
            after = self.probe({name: multiply(f) for name, f in scaled.items()}, long=False)
            for index, rows in match_factors(self.trace, after, scaled, wanted).items():
                found[index] = (wanted[index], rows)
        return found

    # ---- sites ------------------------------------------------------------------------------------------------------

    def _grouped(self) -> list[Group]:
        """Readings that form a site: of one weight, of equal activations, or of the same norm's output.

        Readings that share any of these keys are joined, and so are those they share others with (union-find).
        """
        readings = self.trace.readings
        parent = list(range(len(readings)))

        def root(i: int) -> int:
            while parent[i] != i:
                parent[i] = i = parent[parent[i]]
            return i

        keys: dict[Any, int] = {}
        for index, reading in enumerate(readings):
            if reading.kind != "weight":
                continue
            storage = self.weights.tied(reading.name)
            leaves = frozenset(leaf.producer for leaf in reading.leaves)
            same = (leaves, reading.rows, tuple(reading.sums[0, :64].mul(1e6).round().tolist()))
            keys_of = [("weight", storage), ("activation", same)] if reading.rows else [("weight", storage)]
            if index in self.rows and self.producers[self.rows[index][0]].kind == "norm":
                producer, rows = self.rows[index]
                keys_of.append(("norm", (producer, rows.numpy().tobytes())))
            for key in keys_of:
                parent[root(index)] = root(keys.setdefault(key, index))
        members: dict[int, list[int]] = {}
        for index, reading in enumerate(readings):
            if reading.kind == "weight":
                members.setdefault(root(index), []).append(index)
        return [Group(indices) for indices in sorted(members.values())]

    # ---- folds ------------------------------------------------------------------------------------------------------

    def _refuse(self) -> None:
        """Give each group its producer and rows, or the reason why it has none."""
        reached = dependents(self.trace)
        embeddings = {self.weights.tied(name): name for name in self.trace.embeddings}
        for group in self.groups:
            group.reason = self._bound(group, embeddings)
            group.bound = bool(group.reason)
            group.reason = group.reason or self._unmatched(group)
            if group.reason:
                continue
            group.producer, group.rows = next(self.rows[i] for i in group.readings if i in self.rows)
            producer = self.producers[group.producer]
            others = [self.trace.readings[i] for i in reached[group.producer] if i not in group.readings]
            # Where the site reads every row, any other reading would be scaled too: refused. Where it reads some
            # of them (the values of a fused qkv), the other readings may read other rows: the proof will tell.
            covered = len(group.rows.unique()) == self._sizes[group.producer]
            if not producer.parameters:
                group.reason = f"{group.producer} has no parameters that a scale can be folded into"
            elif others and covered:
                names = list(dict.fromkeys(_described(r.kind, r.name) for r in others))
                more = {1: "", 2: f" and {names[-1]}"}.get(len(names), " and others")
                group.reason = f"{group.producer} also feeds {names[0]}{more}"

    def _bound(self, group: Group, embeddings: dict[Any, str]) -> str:
        """Why the columns of a site's weights can't be scaled, whatever they read; "" if they can."""
        for reading in (self.trace.readings[i] for i in group.readings):
            storage = self.weights.tied(reading.name)
            if storage in embeddings:
                return f"its weight is also the embedding table {embeddings[storage]} (tied)"
            if reading.name in self.trace.used:
                return f"{reading.name} is also used for something other than a product"
            if not reading.whole:
                return "a weight reads it with only some of its columns"
        return ""

    def _unmatched(self, group: Group) -> str:
        """Why the readings of a site aren't all made of the same rows of one producer; "" if it is."""
        seen = [i for i in group.readings if self.trace.readings[i].rows]  # experts without tokens say nothing
        found = [self.rows[i] for i in seen if i in self.rows]
        if not seen or len(found) < len(seen):
            return self._why_unmatched(seen or group.readings)
        makers = list(dict.fromkeys(name for name, _ in found))
        if len(makers) > 1:
            return f"different calls read the outputs of different modules: {', '.join(makers)}"
        if any(not torch.equal(rows, found[0][1]) for _, rows in found):
            return "different calls read different channels"
        return ""

    def _why_unmatched(self, indices: list[int]) -> str:
        makers = list(dict.fromkeys(leaf.producer for i in indices for leaf in self.trace.readings[i].leaves))
        if not makers:
            return "it comes from the model's inputs, not from a weight or a norm"
        if all(self.producers[m].kind == "embedding" for m in makers):
            return f"it is looked up in {', '.join(makers)}"
        if len(makers) > 2:
            return "it combines the outputs of several weights and norms"
        return f"no rows of {', '.join(makers)} multiply its channels (not linear in them)"

    def _override(self) -> list[tuple[str, Group]]:
        """Take folds from the table of overrides; returns those that have to be proved, with their patterns."""
        self._overrides.check_used([self._name(group) for group in self.groups])
        overridden = []
        for group in self.groups:
            match = self._overrides.match(self._name(group))
            if match is None:
                continue
            pattern, entry = match
            if entry is None:
                group.reason = f"switched off by the override {pattern!r}"
            elif group.bound:
                raise DetentError(f"overrides: {pattern!r}: {self._name(group)} can't have a fold: {group.reason}")
            else:
                group.producer, group.rows = self._entered(pattern, entry, self._name(group))
                group.reason = ""
                overridden.append((pattern, group))
        return overridden

    def _entered(self, pattern: str, entry: FoldEntry, site: str) -> tuple[str, Tensor]:
        """The producer and rows of an entry, checked against what the probe saw."""
        block = next((c for chain in self.chains for c in chain if site.startswith(f"{c}.")), "")
        module = entry.module.replace("{block}", block)
        known = {n: p for n, p in self.producers.items() if p.module == module and p.parameters}
        if entry.parameters is not None:
            known = {n: p for n, p in known.items() if p.parameters == entry.parameters}
        if not known:
            raise DetentError(f"overrides: {pattern!r}: no module {module!r} with parameters to scale ran in the probe")
        name, producer = next(iter(known.items()))
        kind = producer.scaling.fold if producer.scaling is not None else "rows"
        if kind != entry.kind:
            raise DetentError(f"overrides: {pattern!r}: {module} is of kind {kind!r}, not {entry.kind!r}")
        width = next(r.sums.shape[1] for r in self.trace.readings if r.kind == "weight" and r.name == site)
        rows = torch.arange(width) if entry.channels is None else torch.tensor(entry.channels)
        if len(rows) != width or int(rows.max()) >= self._sizes.get(name, 0):
            raise DetentError(
                f"overrides: {pattern!r}: {len(rows)} channels up to row {int(rows.max())}, but the site has {width}"
                f" channels and {module} has {self._sizes.get(name, 0)} rows"
            )
        return name, rows

    def _name(self, group: Group) -> str:
        return self.trace.readings[group.readings[0]].name

    def _prove(self) -> None:
        """Scale all candidates at once; look into those that share a reading with a failure one at a time.

        If nothing fails, all are proved by one run. Otherwise those that touch no failed reading are proved, and of
        the rest as many as touch no common reading are tried in one run: a failure there has one culprit, which is
        refused. What is left goes round again.
        """
        candidates = [(seed, group) for seed, group in enumerate(self.groups) if group.producer and not group.reason]
        while candidates:
            failed = self._failed(candidates)
            if not failed:
                return
            suspects = [c for c in candidates if self._touches(c[1], failed)]
            independent: list[tuple[int, Group]] = []
            taken: set[int] = set()
            for candidate in suspects:
                touched = set(self._touched(candidate[1]))
                if not touched & taken:
                    independent.append(candidate)
                    taken |= touched
            failed = self._failed(independent) if independent else []
            for _, group in independent:
                broken = [i for i in failed if i in self._touched(group)]
                if broken:
                    reading = self.reference.readings[broken[0]]
                    group.reason = f"scaling rows of {group.producer} changes {_described(reading.kind, reading.name)}"
            # What was proved here isn't tried again: a round without a refusal would repeat itself forever.
            proved = {id(group) for _, group in independent if not group.reason}
            candidates = [c for c in suspects if not c[1].reason and id(c[1]) not in proved]

    def _failed(self, candidates: list[tuple[int, Group]]) -> list[int]:
        after = self.probe(scale_change(candidates, self._sizes))
        scales = {index: group.scale(seed) for seed, group in candidates for index in group.readings}
        return failures(self.reference, after, self._renumbered(scales))

    def _renumbered(self, scales: dict[int, Tensor]) -> dict[int, Tensor]:
        """Scales by number of a reading in `reference`, where routing may give experts other tokens than in `trace`."""
        by_name = {self.trace.readings[index].name: scale for index, scale in scales.items()}
        return {
            index: by_name[reading.name]
            for index, reading in enumerate(self.reference.readings)
            if reading.kind == "weight" and reading.name in by_name
        }

    def _touched(self, group: Group) -> list[int]:
        assert group.producer is not None
        names = {self.trace.readings[i].name for i in group.readings}
        own = [i for i, r in enumerate(self.reference.readings) if r.kind == "weight" and r.name in names]
        return [*own, *self._reached.get(group.producer, [])]

    def _touches(self, group: Group, indices: list[int]) -> bool:
        return not set(self._touched(group)).isdisjoint(indices)

    # ---- result -----------------------------------------------------------------------------------------------------

    def structure(self) -> Structure:
        """What was found."""
        blocks = self._overrides.chosen_blocks(self.model)
        chains = tuple(map(tuple, self.chains)) if blocks is None else (blocks,)
        blocks = tuple(name for chain in chains for name in chain)
        roles = Roles(self.model, self.trace, blocks)
        sites = roles.complete([self._site(group, roles) for group in self.groups])
        fused_groups, mixtures = roles.used(sites)
        notes = [] if blocks else ["no chain of repeated blocks was found: the model is processed as a whole"]
        found = find_stream(self.model, self.reference, self.probe, sites, blocks)
        if found.note:
            notes.append(found.note)
        return Structure(
            blocks,
            tuple(sites),
            roles.routers,
            tuple(name for mixture in mixtures for name in mixture.members or (mixture.module,)),
            tuple(self.trace.keys),
            tuple(self.trace.values),
            None if found.stream is None else written_by_all(found.stream, mixtures),
            self._unread(sites),
            tuple(notes),
            chains,
            roles.gates,
            mixtures,
            fused_groups,
            tuple(self.trace.taken),
        )

    def _unread(self, sites: list[Site]) -> tuple[str, ...]:
        """Matrices that no run reached, but for those in blocks that were left out."""
        names = {name for site in sites for name in site.weights}
        read = {self.weights.tied(name) for name in (*names, *self.trace.embeddings, *self.trace.used)}
        attributes, skipped = self.weights.attributes, tuple(f"{name}." for name in self._skeleton.skipped)
        matrices = [n for n, p in self.weights.parameters.items() if "weight" in attributes[n] or p.dim() == 3]
        return tuple(n for n in matrices if self.weights.tied(n) not in read and not n.startswith(skipped))

    def _site(self, group: Group, roles: Roles) -> Site:
        readings = [self.trace.readings[i] for i in group.readings]
        weights = {r.name: r.axis for r in readings}
        name = next(iter(weights))
        fold = None
        if group.producer is not None and group.rows is not None and not group.reason:
            producer = self.producers[group.producer]
            rows = tuple(group.rows.tolist())
            identity = rows == tuple(range(self._sizes[group.producer]))
            kind = producer.scaling.fold if producer.scaling is not None else "rows"
            channels = None if identity else rows
            fold = Fold(kind, producer.module, producer.parameters, channels, True, producer.axis)
        of = {weight: mixture for mixture in roles.mixtures for weight in mixture.weights}
        fused = [of[w] for w in weights if w in of and of[w].kind == "stacked"]
        own_rows = fused and fold is not None and group.producer in of
        return Site(
            name=name,
            weights=tuple(weights),
            block=roles.block_of(name),
            width=readings[0].sums.shape[1],
            fold=fold,
            reason=group.reason,
            column_axes=tuple(weights.values()),
            routed=tuple(w for w in weights if w in of),
            router=any(w in roles.routers for w in weights),
            experts=fused[0].count if own_rows else 0,
        )


def _described(kind: str, name: str) -> str:
    return {"weight": name, "norm": f"{name} with no weight in between", "output": f"the model's {name}"}[kind]
