"""The one way to change a weight.

Invariants: a parameter that gets new values keeps its identity, dtype and device, and holds another tensor: the one
before is left alone, for code that goes back (`detent.model.rollback`) or shares it. Every module that holds the
parameter quantizes it again. A weight that isn't a parameter, packed or computed from others, is never changed.

A weight is named by its module (``model.layers.0.mlp.down_proj``: its parameter is ``weight``) or, where a module holds
weights of other names, such as fused experts, by the parameter (``model.layers.0.mlp.experts.down_proj``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from detent.errors import DetentError
from detent.nn import QuantWeightBase


def get(module: nn.Module, attribute: str = "weight", name: str = "") -> nn.Parameter:
    """The parameter of a module.

    Args:
        module: whose own it is.
        attribute: what the module calls it.
        name: what messages call it.

    Raises:
        DetentError: there is none of this name: packed, or computed from others (parametrizations, weight norm).
    """
    parameter = module._parameters.get(attribute)
    if parameter is None:
        raise DetentError(
            f"{name or type(module).__name__}: {attribute} is packed, or computed from other parameters, so it can't be"
            " changed"
        )
    return parameter


@torch.no_grad()
def put(module: nn.Module, attribute: str, value: Tensor, name: str = "", *, untie: bool = False) -> None:
    """Give a parameter new values.

    Args:
        module, attribute, name: see `get`.
        value: in the parameter's shape; it is cast to its dtype and moved to its device.
        untie: make it a parameter of this module only, so that others that share it stay as they are.

    Raises:
        DetentError: there is no such parameter, or its shape is another.

    Example:
        >>> import torch
        >>> from detent.model import edit
        >>> layer = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
        >>> edit.put(layer, "weight", torch.eye(2))
        >>> layer.weight.dtype, layer.weight.tolist()
        (torch.bfloat16, [[1.0, 0.0], [0.0, 1.0]])
    """
    parameter = get(module, attribute, name)
    if value.shape != parameter.shape:
        raise DetentError(
            f"{name or attribute}: a parameter of shape {tuple(parameter.shape)} can't take {tuple(value.shape)}"
        )
    if parameter.is_meta and not value.is_meta:
        raise DetentError(f"{name or attribute}: the weight isn't in memory (meta device), so it can't be changed")
    # Always a new tensor: `.to` returns the same one where nothing needs converting.
    new = value.detach().to(parameter.device, parameter.dtype).contiguous()
    if new.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr():
        new = new.clone()
    if untie:
        module._parameters[attribute] = nn.Parameter(new, requires_grad=parameter.requires_grad)
    else:
        parameter.data = new
    refresh(module)


def refresh(module: nn.Module) -> None:
    """Have a quantized module quantize its weight again."""
    if isinstance(module, QuantWeightBase):
        module.refresh_weight()


class WeightEdits:
    """The weights of one model by name, and which of them were changed.

    Attributes:
        changed: names of the parameters that have new values, all names of a tied one.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = dict(model.named_modules())
        self.changed: set[str] = set()
        self._names: dict[int, set[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(parameter), set()).add(name)

    def place(self, name: str) -> tuple[nn.Module, str]:
        """The module and the attribute of a weight.

        Raises:
            DetentError: the model has neither a module nor a parameter of this name.
        """
        return place(self._modules, name)

    def get(self, name: str) -> nn.Parameter:
        """The parameter. Raises DetentError where there is none (packed, computed from others)."""
        return get(*self.place(name), name)

    def bias_of(self, name: str) -> str | None:
        """The name of the bias next to a weight; None where there is none."""
        module, attribute = self.place(name)
        bias = "bias" if attribute == "weight" else f"{attribute}_bias"
        owner = name if name in self._modules else name.rpartition(".")[0]
        return None if module._parameters.get(bias) is None else f"{owner}.{bias}"

    def put(self, name: str, value: Tensor) -> None:
        """Give a weight new values. Where it is tied, all that share it have them."""
        module, attribute = self.place(name)
        put(module, attribute, value, name)
        names = self._names.get(id(module._parameters[attribute]), {name})
        self.changed |= names
        for other in names:
            refresh(self.place(other)[0])

    def untie(self, name: str) -> None:
        """Give a weight that is tied to another one its own memory, and record that in the configuration."""
        module, attribute = self.place(name)
        shared = get(module, attribute, name)
        put(module, attribute, shared, name, untie=True)
        full = f"{name}.{attribute}" if name in self._modules else name
        self._names[id(shared)].discard(full)
        self._names[id(module._parameters[attribute])] = {full}
        self.changed.add(full)
        for part in configs_of(self._model):
            if getattr(part, "tie_word_embeddings", False):
                part.tie_word_embeddings = False


def place(modules: dict[str, nn.Module], name: str) -> tuple[nn.Module, str]:
    """The module and the attribute that hold the weight called `name`, among the modules of a model.

    Raises:
        DetentError: there is no such module or parameter.
    """
    if name in modules:
        return modules[name], "weight"
    parent, _, attribute = name.rpartition(".")
    if parent in modules and hasattr(modules[parent], attribute):
        return modules[parent], attribute
    raise DetentError(f"{name}: the model has no module or parameter of this name")


def configs_of(model: nn.Module) -> list[Any]:
    """The configurations of a transformers model: its own, and that of its language model."""
    config: Any = getattr(model, "config", None)
    return [part for part in (config, getattr(config, "text_config", None)) if part is not None]
