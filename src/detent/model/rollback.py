"""Leaving a model as it was when something fails half way.

What is remembered: the class of every module, its attributes, which parameters, buffers and submodules it has, and the
tensor that each parameter holds. Not the values inside those tensors: whoever changes a weight gives its parameter
another tensor (``parameter.data = ...``), or does it last, after everything that can fail.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from detent.nn.attention import route_attention

_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class ModuleMemory:
    """One module as it is now."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._kind = module, type(module)
        self._attributes = dict(module.__dict__)
        self._tables: list[tuple[Any, Any]] = [
            (t, t.copy()) for name in _TABLES if (t := module.__dict__.get(name)) is not None
        ]
        self._data = [(p, p.data) for p in module._parameters.values() if p is not None]

    def restore(self) -> None:
        self._module.__class__ = self._kind
        self._module.__dict__.clear()
        self._module.__dict__.update(self._attributes)
        for table, before in self._tables:
            table.clear()
            table.update(before)
        for parameter, data in self._data:
            if parameter.data is not data:
                parameter.data = data


def remember(modules: Iterable[nn.Module]) -> list[ModuleMemory]:
    """All of `modules` as they are now."""
    return [ModuleMemory(module) for module in modules]


@contextmanager
def unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """If the block raises, `model` is afterwards as it was before the block."""
    before = remember(model.modules())
    try:
        yield
    except BaseException:
        for memory in before:
            memory.restore()
        route_attention(model)
        raise
