"""Which module class becomes which quantized class."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import nn

from detent.distributed import ParallelState
from detent.errors import DetentError
from detent.nn.instance_forward import rebind_forward
from detent.nn.quant_module import QuantModule

Q = TypeVar("Q", bound=type[nn.Module])
T = TypeVar("T")


def once_a_class(function: Callable[[type[nn.Module]], T]) -> Callable[[type[nn.Module]], T]:
    """Remember what a function says of each class."""
    return functools.cache(function)  # type: ignore[return-value]


class _Registry:
    """Original class -> (name in configurations, quantized class).

    Example:
        >>> import torch, detent
        >>> torch.nn.Linear in detent.QuantModuleRegistry
        True
    """

    def __init__(self) -> None:
        self._entries: dict[type[nn.Module], tuple[str, type[nn.Module]]] = {}
        self._rules: list[tuple[Callable[[type[nn.Module]], bool], type[nn.Module]]] = []
        self._mixed: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}

    def register(self, names: dict[type[nn.Module], str]) -> Callable[[Q], Q]:
        """Decorator: the class below quantizes the given original classes, known under the given names."""

        def decorate(quantized: Q) -> Q:
            for original, name in names.items():
                self.add(original, quantized, name)
            return quantized

        return decorate

    def add(self, original: type[nn.Module], quantized: type[nn.Module], name: str | None = None) -> None:
        if not (isinstance(original, type) and isinstance(quantized, type)):
            raise DetentError("register takes two classes: the original and its quantized form")
        if not callable(getattr(quantized, "_setup", None)):
            raise DetentError(
                f"{quantized.__name__} has no _setup method; it must create the quantizers that forward calls"
            )
        if original in self._entries:
            raise DetentError(f"{original.__name__} is registered already, as {self._entries[original][1].__name__}")
        self._entries[original] = (name or original.__name__, quantized)

    def add_rule(self, applies: Callable[[type[nn.Module]], bool], quantized: type[nn.Module]) -> None:
        """The quantized class of all classes that a rule applies to and that aren't registered themselves."""
        self._rules.append((applies, quantized))

    def remove(self, original: type[nn.Module]) -> None:
        if original not in self._entries:
            raise DetentError(
                f"{getattr(original, '__name__', original)} is not registered, so it cannot be unregistered"
            )
        del self._entries[original]

    def __contains__(self, original: object) -> bool:
        return isinstance(original, type) and self.get(original) is not None

    def __iter__(self) -> Iterator[type[nn.Module]]:
        return iter(self._entries)

    def __getitem__(self, name: str) -> type[nn.Module]:
        """The quantized class of a configuration's class name (``"nn.Linear"``)."""
        for known, quantized in self._entries.values():
            if known == name:
                return quantized
        known_names = ", ".join(sorted(n for n, _ in self._entries.values()))
        raise DetentError(f"no quantized module is registered under the name {name!r}; known: {known_names}")

    def get(self, original: type[nn.Module]) -> type[nn.Module] | None:
        """The quantized class for instances of `original`, or None.

        A subclass of a registered class counts as that class as long as it leaves `forward` alone; one with its own
        forward may do anything with the weight, so it needs its own registration.
        """
        if issubclass(original, QuantModule):
            return None
        if original in self._entries:
            return self.combined(self._entries[original][1], original)
        base = next((base for base in original.__mro__[1:] if base in self._entries), None)
        if base is not None and original.forward is base.forward:
            return self.combined(self._entries[base][1], original)
        quantized = next((quantized for applies, quantized in self._rules if applies(original)), None)
        return None if quantized is None else self.combined(quantized, original)

    def overridden(self, kind: type[nn.Module]) -> type[nn.Module] | None:
        """The registered class that `kind` derives from with its own forward, so that it isn't converted."""
        if self.get(kind) is not None or issubclass(kind, QuantModule):
            return None
        found = (base for base in kind.__mro__[1:] if base in self._entries)
        base = next(found, None)
        return None if base is None or issubclass(kind, self._entries[base][1]) else base

    def names_of(self, module: nn.Module) -> set[str]:
        """The configuration names that a (quantized) module answers to as ``parent_class``."""
        return {name for original, (name, _) in self._entries.items() if isinstance(module, original)}

    def get_key(self, original: type[nn.Module]) -> str:
        for base in original.__mro__:
            if base in self._entries:
                return self._entries[base][0]
        raise DetentError(f"{original.__name__} is not registered")

    def convert(self, module: nn.Module) -> nn.Module:
        """Turn `module` into its quantized class, in place, with fresh quantizers.

        Raises:
            DetentError: its class is not registered.
        """
        quantized = self.get(type(module))
        if quantized is None:
            raise DetentError(f"{type(module).__name__} is not registered; see register()")
        children, forward = set(module._modules), type(module).forward
        module.__class__ = quantized
        rebind_forward(module, forward)
        if not hasattr(module, "parallel_state"):
            module.parallel_state = ParallelState()  # type: ignore[assignment]
        module._setup()  # type: ignore[operator]
        for name, child in module.named_children():
            if name not in children and child.training != module.training:
                child.train(module.training)
        return module

    def combined(self, quantized: type[nn.Module], original: type[nn.Module]) -> type[nn.Module]:
        """`quantized` if it derives from `original` already, else a class of both."""
        if issubclass(quantized, original):
            return quantized
        key = (quantized, original)
        if key not in self._mixed:
            self._mixed[key] = type(
                f"Quant{original.__name__}",
                (quantized, original),
                {"__module__": original.__module__, "__reduce_ex__": _reduce, "_made_of": key},
            )
        return self._mixed[key]

    def instance(self, quantized: type[nn.Module], original: type[nn.Module]) -> nn.Module:
        """An empty module of the class of both, whose state is to come."""
        kind = self.combined(quantized, original)
        return kind.__new__(kind)


def _reduce(module: Any, protocol: int) -> tuple[Any, ...]:
    """How a module of a class that was made on the spot is copied or stored: by the two classes it was made of."""
    state = module.__getstate__() if hasattr(module, "__getstate__") else module.__dict__
    return _instance, module._made_of, state


def _instance(quantized: type[nn.Module], original: type[nn.Module]) -> nn.Module:
    return QuantModuleRegistry.instance(quantized, original)


QuantModuleRegistry = _Registry()


def register(original_cls: type[nn.Module], quantized_cls: type[nn.Module]) -> None:
    """Replace modules of class `original_cls` by `quantized_cls` when a model is quantized.

    Args:
        original_cls: the class as it is found in models.
        quantized_cls: usually a subclass of it, with a `_setup` method that creates the quantizers and a `forward` that
            calls them. Instances are converted in place: `__init__` is not run again, `_setup` is.

    Raises:
        DetentError: `quantized_cls` has no `_setup`; `original_cls` is registered already.


    Example:
        >>> import torch, detent
        >>> class Scaled(torch.nn.Module):
        ...     def forward(self, x):
        ...         return 2 * x
        >>> class QuantScaled(detent.QuantModule, Scaled):
        ...     def _setup(self):
        ...         self.input_quantizer = detent.TensorQuantizer()
        ...     def forward(self, x):
        ...         return super().forward(self.input_quantizer(x))
        >>> detent.register(Scaled, QuantScaled)
        >>> model = torch.nn.Sequential(Scaled())
        >>> detent.replace_quant_module(model)
        >>> model[0].input_quantizer
        TensorQuantizer(disabled)
        >>> detent.unregister(Scaled)
    """
    QuantModuleRegistry.add(original_cls, quantized_cls)


def unregister(original_cls: type[nn.Module]) -> None:
    """Undo `register`. Raises DetentError if the class isn't registered.

    Example:
        >>> import torch, detent
        >>> class Scaled(torch.nn.Module): ...
        >>> class QuantScaled(detent.QuantModule, Scaled):
        ...     def _setup(self):
        ...         self.input_quantizer = detent.TensorQuantizer()
        >>> detent.register(Scaled, QuantScaled)
        >>> detent.unregister(Scaled)
        >>> Scaled in detent.QuantModuleRegistry
        False
    """
    QuantModuleRegistry.remove(original_cls)
