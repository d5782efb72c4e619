"""The chain of repeated blocks: modules in a list, each called once, each reading what the one before it gave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Chains:
    """Watches a run of a model for chains; a context manager's method `watching` has to be active during it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        #: Lists of modules that may be chains, outer ones first, with the names of their members.
        self._candidates: dict[str, list[str]] = {}
        for name, module in model.named_modules():
            if isinstance(module, (nn.ModuleList, nn.Sequential)):
                members = [
                    f"{name}.{key}" if name else key for key, child in module.named_children() if _is_block(child)
                ]
                if members:
                    self._candidates[name] = members
        self._calls: dict[str, int] = {}
        self._order: list[str] = []
        self._inputs: dict[str, list[Tensor]] = {}
        self._output: dict[str, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles: list[Any] = []
        try:
            for name in dict.fromkeys(name for members in self._candidates.values() for name in members):
                module = self._model.get_submodule(name)
                handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
                handles.append(module.register_forward_hook(self._after(name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def found(self) -> list[list[str]]:
        """The chains, in the order in which they ran; none within a block of another."""
        chains: list[list[str]] = []
        for members in self._candidates.values():
            inside = any(member.startswith(f"{block}.") for chain in chains for block in chain for member in members)
            if not inside and self._is_chain(members):
                chains.append(members)
        return sorted(chains, key=lambda chain: self._order.index(chain[0]))

    def _is_chain(self, members: list[str]) -> bool:
        if any(self._calls.get(name) != 1 for name in members) or not _alike(self._model, members):
            return False
        return all(
            any(_equal(self._output.get(a), x) for x in self._inputs[b])
            for a, b in zip(members, members[1:], strict=False)
        )

    def _before(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._calls[name] = self._calls.get(name, 0) + 1
            self._order.append(name)
            self._inputs[name] = [x.detach().clone() for x in (*args, *kwargs.values()) if _is_activation(x)]

        return hook

    def _after(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            first = next((x for x in _flat(output) if _is_activation(x)), None)
            if first is not None:
                self._output[name] = first.detach().clone()

        return hook


def _is_block(module: nn.Module) -> bool:
    """Whether it holds modules with weight matrices of their own inside (one such module alone is a layer)."""
    return any(
        parameter.dim() >= 2 and "." in name for name, parameter in module.named_parameters() if "quantizer" not in name
    )


def _alike(model: nn.Module, members: list[str]) -> bool:
    """Whether members may be blocks: of a `ModuleList`, or a class among them repeats; a single one if it is large."""
    kinds = [type(model.get_submodule(name)) for name in members]
    if len(kinds) == 1:
        return len(list(model.get_submodule(members[0]).children())) > 1
    listed = isinstance(model.get_submodule(members[0].rpartition(".")[0]), nn.ModuleList)
    return listed or len(set(kinds)) < len(kinds)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _flat(item)
    else:
        yield value


def _is_activation(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2


def _equal(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.shape == b.shape and torch.equal(a, b)
