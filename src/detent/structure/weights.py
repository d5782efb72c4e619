"""Which weight an operation uses, under whatever view of its memory, and how a model is made ready for a probe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from detent.nn import QuantWeightBase, TensorQuantizer
from detent.nn.experts import QuantExperts
from detent.nn.walk import walk


def memory(tensor: Tensor) -> int:
    """What all views of one piece of memory have in common, also on the meta device."""
    address: int = tensor.untyped_storage()._cdata
    return address


def place_of(parameter: Tensor) -> tuple[int, int]:
    """What tied parameters have in common, and those next to each other in one piece of memory have not: where each
    begins."""
    return memory(parameter), int(parameter.storage_offset())


class DrawnWeights:
    """A model's parameters by the memory they share, and its weight matrices by name.

    Attributes:
        parameters: the matrices by name (a module's, or a parameter's: see `detent.structure.site`).
        owners, attributes: the module and the attribute that hold each.
        computing: names of modules whose weight may be recomputed for every call (quantized, packed, parametrized).
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters: dict[str, Tensor] = {}
        self.owners: dict[str, nn.Module] = {}
        self.attributes: dict[str, str] = {}
        self.computing: set[str] = set()
        self._names: dict[int, list[str]] = {}
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        self._casts: Any = WeakTensorKeyDictionary()
        for module_name, module in walk(model):
            if isinstance(module, QuantWeightBase) or hasattr(module, "parametrizations"):
                self.computing.add(module_name)
            for attribute, parameter in module._parameters.items():
                if parameter is None:
                    continue
                self._places.setdefault(memory(parameter), []).append((module, attribute))
                if parameter.dim() >= 2:
                    full = f"{module_name}.{attribute}" if module_name else attribute
                    name = (module_name or attribute) if attribute == "weight" else full
                    self._names.setdefault(memory(parameter), []).append(name)
                    self.parameters[name], self.owners[name], self.attributes[name] = parameter, module, attribute

    def find(self, tensor: Any, running: str) -> str | None:
        """The name of the matrix that `tensor` is a view of. A tied one goes by the name of the running module."""
        if not isinstance(tensor, Tensor):
            return None
        cast: str | None = self._casts.get(tensor)
        if cast is not None:
            return cast
        names = self._names.get(memory(tensor))
        if names is None:
            return None
        return next((n for n in names if n == running or n.rpartition(".")[0] == running), names[0])

    def cast(self, tensor: Tensor, name: str) -> None:
        """Note that a tensor has a weight's values in another dtype."""
        self._casts[tensor] = name

    def attribute_of(self, name: str, tensor: Tensor) -> str | None:
        """The attribute under which the module that holds the weight `name` has `tensor` as a parameter."""
        owner = self.owners.get(name)
        return next((attribute for module, attribute in self._places.get(memory(tensor), []) if module is owner), None)

    def tied(self, name: str) -> Any:
        """What the names of one tied weight have in common."""
        parameter = self.parameters.get(name)
        return name if parameter is None else place_of(parameter)

    def parts(self, name: str, view: Tensor) -> int:
        """Of how many equal parts of a matrix, cut along axis 0, `view` is one; 0 if it isn't such a part."""
        parameter = self.parameters[name]
        if parameter.dim() != 2 or view.dim() != 2 or not 0 < view.numel() < parameter.numel():
            return 0
        rows, rest = divmod(view.numel(), parameter.shape[1])
        place = (view.storage_offset() - parameter.storage_offset()) % view.numel()
        return 0 if rest or place or parameter.shape[0] % rows else parameter.shape[0] // rows

    def axes(self, name: str, view: Tensor, columns: int, rows: int) -> tuple[tuple[int, int], bool, bool]:
        """The axes of the parameter that are `columns` and `rows` of `view`, and whether it covers all of each."""
        parameter = self.parameters[name]
        if view.dim() > parameter.dim():  # a matrix cut into groups
            return (1, 0), False, False
        first = max(0, parameter.dim() - view.dim())  # an expert's slice of [experts, ., .]
        axes = [columns % view.dim() + first, rows % view.dim() + first]
        order, turned = parameter.stride()[first:], view.transpose(columns, rows)
        if turned.stride() == order and (view.stride() != order or view.shape != parameter.shape[first:]):
            axes.reverse()
        whole = [view.shape[of] == parameter.shape[axis] for of, axis in zip((columns, rows), axes, strict=True)]
        return (axes[0], axes[1]), whole[0], whole[1]


@contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode, its quantizers off, in PyTorch's own operations; afterwards as it was."""
    modules = [module for _, module in walk(model)]
    training = [module for module in modules if module.training]
    quantizers = [m for m in modules if isinstance(m, TensorQuantizer) and m.is_enabled]
    changed: list[tuple[Any, str, Any]] = []
    experts = [m for m in modules if isinstance(m, QuantExperts)]
    try:
        for module in training:
            module.training = False
        for mixture in experts:
            mixture.few = True
        for quantizer in quantizers:
            quantizer.disable()
        for config, attribute, plain in _implementations(model):
            changed.append((config, attribute, getattr(config, attribute)))
            setattr(config, attribute, plain)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for config, attribute, value in changed:
            setattr(config, attribute, value)
        for mixture in experts:
            mixture.few = False
        for quantizer in quantizers:
            quantizer.enable()
        for module in training:
            module.training = True


def _implementations(model: nn.Module) -> Iterator[tuple[Any, str, str]]:
    """Where transformers' configurations choose attention or experts that hide what they do, and what to choose."""
    configs: dict[int, Any] = {}
    for _, module in walk(model):
        config = getattr(module, "config", None)
        for part in () if config is None else (config, *getattr(config, "__dict__", {}).values()):
            configs.setdefault(id(part), part)
    plain = {"_attn_implementation_internal": ("eager", "sdpa"), "_experts_implementation_internal": ("eager",)}
    for config in configs.values():
        for attribute, allowed in plain.items():
            value = getattr(config, attribute, None)
            if isinstance(value, str) and value not in allowed:
                yield config, attribute, "sdpa" if value.endswith("sdpa") else "eager"
