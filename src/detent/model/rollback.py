"""Leaving a model as it was when something fails half way.

What is remembered: the class of every module, its attributes, which parameters, buffers and submodules it has, the
tensor that each parameter holds, and whether the configuration ties embeddings. Not the values inside those tensors:
`detent.model.edit` gives a parameter another tensor, and nothing else changes one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from detent.model.edit import configs_of
from detent.nn.attention import route_attention
from detent.nn.quant_module import check_module
from detent.nn.walk import walk

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


class ModelMemory:
    """A model as it is now; what is remembered stays in memory."""

    def __init__(self, model: nn.Module) -> None:
        self._model = check_module(model)
        self._modules = remember(module for _, module in walk(model))
        self._ties = [(c, c.tie_word_embeddings) for c in configs_of(model) if hasattr(c, "tie_word_embeddings")]

    def restore(self) -> None:
        for module in self._modules:
            module.restore()
        for config, tied in self._ties:
            config.tie_word_embeddings = tied
        route_attention(self._model)


#: Ids of the modules that an enclosing block remembers already, or that will not be rolled back.
_covered: ContextVar[frozenset[int]] = ContextVar("detent_rollback_covered", default=frozenset())


@contextmanager
def unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """If the block raises, `model` is afterwards as it was before the outermost block of this kind.

    Raises:
        DetentError: `model` isn't a module.
    """
    if id(check_module(model)) in _covered.get():
        yield
        return
    before = ModelMemory(model)
    try:
        with without_rollback(model):
            yield
    except BaseException:
        before.restore()
        raise


@contextmanager
def without_rollback(model: nn.Module) -> Iterator[None]:
    """Nothing is remembered inside the block: for runs that throw a model away when they fail, so that float weights
    are freed as soon as they are replaced."""
    token = _covered.set(_covered.get() | {id(module) for _, module in walk(model)})
    try:
        yield
    finally:
        _covered.reset(token)
