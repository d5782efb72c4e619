"""The chains of repeated blocks, and a run of a model in which two blocks of each kind represent all of them.

A *chain* is a run of modules in a list, each called once, each reading what the one before it gave, all of one shape.
Blocks of one *kind* have the same classes, attributes and shapes of parameters (numbers that differ in every block,
such as its index, aside) and are called alike. Of each kind the first and the last are run; the others hand on what
they are given. Whether first and last really show the same is for the caller to compare (`detent.structure.transfer`).

Invariant: a module is left out only where what it was given is exactly what the member before it in the list returned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from detent.nn import TensorQuantizer
from detent.structure.operations import tensors_in
from detent.structure.weights import place_of

_MODULE = set(vars(nn.Module())) | {"forward", "config"}
_SIMPLE = (bool, int, float, str, type(None), torch.dtype)


class Skeleton:
    """Watches the runs of a model for chains and leaves out blocks of one kind; `watching` is active during them.

    Attributes:
        skipped: by block that was left out, the block that represents it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._lists = _lists_of_blocks(model)
        self._kinds: dict[str, Any] = {}
        self._whole: set[str] = set()
        self._watched: set[str] = set()
        tied = _tied(model)
        planned: list[str] = []
        for key, members in self._lists.items():
            if len(members) > 2 and not any(key.startswith(f"{name}.") for name in planned):
                self._kinds |= _kinds(model, key, members, tied)
                if any(self._stand_in(members, name) for name in members):
                    planned += members
        self._reset()

    def _reset(self) -> None:
        self.skipped: dict[str, str] = {}
        self._calls: Counter[str] = Counter()
        self._order: list[str] = []
        self._inputs: dict[str, list[Tensor]] = {}
        self._outputs: dict[str, Tensor] = {}
        self._shown: dict[Any, tuple[Any, Any]] = {}  # by kind, how its first block was called and what it returned

    def keep(self, blocks: Iterable[str] | None = None) -> None:
        """From now on run all members of the lists that hold `blocks` (of every list, for None)."""
        names = None if blocks is None else set(blocks)
        self._whole |= {key for key, members in self._lists.items() if names is None or not names.isdisjoint(members)}

    def pairs(self) -> set[tuple[str, str]]:
        """The first and the last block of each kind of which others were left out."""
        first = {self._kinds.get(n): n for n in reversed(self._order)}
        return {(first[self._kinds[last]], last) for last in self.skipped.values()}

    def chains(self) -> list[list[str]]:
        """The chains, in the order in which they ran; none within a block of another."""
        found: list[list[str]] = []
        for members in self._lists.values():
            inside = any(member.startswith(f"{block}.") for chain in found for block in chain for member in members)
            if not inside:
                found += [run for run in self._runs(members) if _alike(self._model, run, len(members))]
        return sorted(found, key=lambda chain: self._order.index(chain[0]))

    def confirmed(self) -> bool:
        """Whether a run showed all that it should: what was left out is in chains, and every list was watched.

        If not, the lists concerned are run whole from now on.
        """
        strangers = set(self.skipped) - {name for chain in self.chains() for name in chain}
        self.keep(strangers)
        return not strangers and self._watched == set(self._to_watch())

    def _to_watch(self) -> list[str]:
        """The lists that aren't inside blocks which may be left out."""
        found: list[str] = []
        covered: list[str] = []
        for key, members in self._lists.items():
            if not any(key.startswith(f"{name}.") for name in covered):
                found.append(key)
                if key not in self._whole and any(self._stand_in(members, name) for name in members):
                    covered += members
        return found

    def _runs(self, members: list[str]) -> list[list[str]]:
        """Members one after the other of which each reads what the one before gave and gives the shape that it read.

        A member that isn't called, such as cross-attention with an image that isn't there, doesn't interrupt a chain.
        """
        runs: list[list[str]] = [[]]
        for name in (member for member in members if self._calls[member]):
            output = self._outputs.get(name)
            if self._calls[name] != 1 or output is None or all(x.shape != output.shape for x in self._inputs[name]):
                runs.append([])
                continue
            if runs[-1] and not any(_equal(self._outputs[runs[-1][-1]], x) for x in self._inputs[name]):
                runs.append([])
            runs[-1].append(name)
        return [run for run in runs if run]

    # ---- while the model runs ---------------------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch a run, and leave blocks out of it."""
        self._reset()
        replaced: list[tuple[nn.Module, Any]] = []
        keys = self._to_watch()
        self._watched = set(keys)
        try:
            for key in keys:
                for name in self._lists[key]:
                    module = self._model.get_submodule(name)
                    replaced.append((module, module.__dict__.get("forward")))
                    module.forward = self._forward(key, name, module.forward)
            yield
        finally:
            for module, forward in replaced:
                if forward is None:
                    del module.__dict__["forward"]
                else:
                    module.forward = forward

    def _stand_in(self, members: list[str], name: str) -> str | None:
        """The last member of the same kind, if `name` is neither that nor the first."""
        kind = self._kinds.get(name)
        same = [m for m in members if self._kinds.get(m) == kind]
        return same[-1] if kind is not None and name not in (same[0], same[-1]) else None

    def _forward(self, key: str, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        kind, stand_in = self._kinds.get(name), self._stand_in(self._lists[key], name)
        earlier = self._lists[key][: self._lists[key].index(name)]

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._calls[name] += 1
            self._order.append(name)
            given = [x for x in tensors_in((args, kwargs)) if _is_activation(x)]
            how = _described((args, kwargs))
            before = next((member for member in reversed(earlier) if self._calls[member]), None)
            if before is not None and key not in self._whole:
                previous = self._outputs.get(before)
                passed_on = next((x for x in given if _equal(previous, x)), None)
                if passed_on is None:
                    self._whole.add(key)  # no chain, or one with gaps: not worth skipping in
                elif stand_in is not None and previous is not None and self._shown.get(kind, ("",))[0] == how:
                    self.skipped[name] = stand_in
                    self._inputs[name], self._outputs[name] = [previous], previous
                    return _with_first(self._shown[kind][1], passed_on)
            self._inputs[name] = [x.detach().clone() for x in given]
            output = original(*args, **kwargs)
            first = next((x for x in tensors_in((output,)) if _is_activation(x)), None)
            if first is not None:
                self._outputs[name] = first.detach().clone()
                self._shown.setdefault(kind, (how, output))
            return output

        return forward


def _lists_of_blocks(model: nn.Module) -> dict[str, list[str]]:
    """Lists of modules that may be blocks, outer ones first, with the names of their members."""
    lists = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            children = ((f"{name}.{key}" if name else key, child) for key, child in module.named_children())
            members = [full for full, child in children if is_block(child)]
            if members:
                lists[name] = members
    return lists


def is_block(module: nn.Module) -> bool:
    """Whether it holds modules with weight matrices of their own inside (one such module alone is a layer)."""
    return any(
        parameter.dim() >= 2 and "." in name for name, parameter in module.named_parameters() if "quantizer" not in name
    )


def _alike(model: nn.Module, run: list[str], members: int) -> bool:
    """Whether a run may be of blocks: in a `ModuleList`, or a class repeats; a single one if it is large."""
    kinds = [type(model.get_submodule(name)) for name in run]
    if len(kinds) == 1:
        return members == 1 and len(list(model.get_submodule(run[0]).children())) > 1
    listed = isinstance(model.get_submodule(run[0].rpartition(".")[0]), nn.ModuleList)
    return listed or len(set(kinds)) < len(kinds)


# ---- kinds ----------------------------------------------------------------------------------------------------------


def _kinds(model: nn.Module, key: str, members: list[str], tied: list[list[str]]) -> dict[str, Any]:
    """By member, something that is equal where two are of one kind."""
    configs = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "__dict__")}
    facts = {name: _facts(model.get_submodule(name)) for name in members}
    for index, name in enumerate(members):
        for number, config in enumerate(configs.values()):
            for field, value in vars(config).items():  # such as the kinds of layers, by their index
                if isinstance(value, (list, tuple)) and len(value) == len(members):
                    item = value[index]
                    facts[name]["config", number, field] = item if isinstance(item, _SIMPLE) else repr(item)
    for fact in dict.fromkeys(fact for table in facts.values() for fact in table):
        values = [table.get(fact) for table in facts.values()]
        if all(isinstance(v, (int, float)) for v in values) and len(set(values)) == len(values):
            for table in facts.values():  # a number of the block's own
                del table[fact]
    for names in tied:  # a block that shares a weight with something outside it is like no other
        for name in members:
            if 0 < sum(n.startswith(f"{name}.") for n in names) < len(names):
                facts[name]["tied"] = name
    numbers: dict[Any, int] = {}
    return {name: (key, numbers.setdefault(tuple(facts[name].items()), len(numbers))) for name in members}


def _tied(model: nn.Module) -> list[list[str]]:
    """Names of parameters that share memory."""
    places: dict[tuple[int, int], list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(place_of(parameter), []).append(name)
    return [names for names in places.values() if len(names) > 1]


def _facts(block: nn.Module) -> dict[Any, Any]:
    facts: dict[Any, Any] = {}
    for inner, module in block.named_modules():
        if isinstance(module, TensorQuantizer):
            continue
        facts[inner, "class"] = (type(module).__qualname__, type(module).__module__)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            facts[inner, "tensor", name] = None if tensor is None else (tuple(tensor.shape), str(tensor.dtype))
        for name, value in vars(module).items():
            if name not in _MODULE and isinstance(value, _SIMPLE):
                facts[inner, name] = value
            elif name not in _MODULE and isinstance(value, (list, tuple)):
                facts[inner, name] = repr(value) if all(isinstance(v, _SIMPLE) for v in value) else len(value)
    return facts


# ---- calls ----------------------------------------------------------------------------------------------------------


def _described(value: Any) -> Any:
    """How a block is called: names, shapes and switches, but not numbers, which may be its index."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    if isinstance(value, dict):
        return tuple((k, _described(v)) for k, v in value.items())
    return value if isinstance(value, (bool, str, type(None))) else type(value)


def _with_first(output: Any, x: Tensor) -> Any:
    """A block's output with `x` for its first activation."""
    if _is_activation(output):
        return x
    if isinstance(output, (list, tuple)):
        items = list(output)
        place = next(i for i, v in enumerate(items) if any(_is_activation(t) for t in tensors_in((v,))))
        items[place] = _with_first(items[place], x)
        return type(output)(items) if type(output) in (list, tuple) else type(output)(*items)
    copied = dict(output)
    place = next(k for k, v in copied.items() if any(_is_activation(t) for t in tensors_in((v,))))
    copied[place] = _with_first(copied[place], x)
    return type(output)(copied)


def _is_activation(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2


def _equal(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.shape == b.shape and torch.equal(a, b)
