"""Experts whose weights a module holds in one tensor, taken apart: a linear layer for each expert and projection.

A module that holds `gate_up_proj` [experts, 2 * width, hidden] gets children ``0.gate_proj``, ``0.up_proj``, ... in its
place. Its own forward still runs, activation and routing included: where it asks for the tensor it is handed a
`FusedWeight`, and multiplying by one expert's part of that calls the layers of this expert. So nothing is listed per
model. How a module lays its experts out is read off one call with random numbers (`detent.nn.experts_layout`).

Invariant: until a layer's weight is changed it is a view of the tensor that the module held; with every quantizer off
the module computes what it did.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from detent.errors import DetentError
from detent.nn.instance_forward import rebind_forward
from detent.nn.quant_module import QuantModule
from detent.nn.registry import QuantModuleRegistry

_every_token: ContextVar[bool] = ContextVar("detent_every_token", default=False)


@contextmanager
def every_token_to_every_expert(on: bool = True) -> Iterator[None]:
    """Inside the block experts are shown every token, for statistics; what goes on is what their router chose.

    Args:
        on: whether to do anything.
    """
    token = _every_token.set(on)
    try:
        yield
    finally:
        _every_token.reset(token)


@dataclass(frozen=True)
class Part:
    """Which part of a tensor is one expert's matrix [outputs, inputs].

    Attributes:
        of: the number of experts along axis 0; 0 where the tensor is of one expert alone.
        joined: whether the experts lie one after the other along axis 0 of a matrix, not along one of their own.
        turned: whether their matrices are stored as [inputs, outputs].
        start: which of the projections that share a matrix: 0, 1. step: how many do.
        interleaved: whether their rows take turns, rather than one projection lying after the other.
    """

    of: int = 0
    joined: bool = False
    turned: bool = False
    start: int = 0
    step: int = 1
    interleaved: bool = False

    def select(self, tensor: Tensor, expert: int) -> Tensor:
        """The matrix (or bias) of one expert: a view."""
        if self.joined:
            rows = tensor.shape[0] // self.of
            matrix = tensor[expert * rows : (expert + 1) * rows]
        else:
            matrix = tensor[expert] if self.of else tensor[...]
        return self.rows_of(matrix.mT if self.turned else matrix)

    def of_bias(self) -> Part:
        """The part of biases [experts, outputs] that belongs to this part of the weights."""
        return replace(self, joined=False, turned=False)

    def rows_of(self, outputs: Tensor) -> Tensor:
        """The rows of this projection among those of all that share a matrix."""
        size = outputs.shape[0] // self.step
        return outputs[self.start :: self.step] if self.interleaved else outputs[self.start * size :][:size]


@dataclass(frozen=True)
class Projection:
    """A projection of every expert.

    Attributes:
        name: gate_proj, up_proj or down_proj, by what it does.
        parameter: what holds it. part: where in there it is.
        bias: the parameter of its biases; None where it has none.
    """

    name: str
    parameter: str
    part: Part
    bias: str | None = None


@dataclass(frozen=True)
class ExpertsLayout:
    """How a module holds its experts.

    Attributes:
        count: their number.
        projections: in the order of their outputs.
        routed: whether the module is told which experts each token goes to.
    """

    count: int
    projections: tuple[Projection, ...]
    routed: bool

    def of(self, parameter: str) -> list[Projection]:
        """The projections in one parameter."""
        return [projection for projection in self.projections if projection.parameter == parameter]


class StandIn:
    """What takes part in operations in the place of a tensor of weights that isn't there."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func.__name__} of the weights of experts")


class FusedWeight(StandIn):
    """What a module is handed in the place of the parameter that held the weights of all experts.

    Args:
        shape, dtype, device: of that parameter.
        use: gives an expert's output, from its number, its input [..., inputs], and whether that was multiplied by the
            matrix as it is stored, which then is [inputs, outputs].
    """

    def __init__(
        self, shape: Any, dtype: torch.dtype, device: torch.device, use: Callable[[int, Tensor, bool], Tensor]
    ) -> None:
        self.shape, self.dtype, self.device, self._use = torch.Size(shape), dtype, device, use

    def __getitem__(self, expert: Any) -> _OneExpert:
        return _OneExpert(self._use, int(expert), self.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def view(self, *shape: Any) -> FusedWeight:
        """With the experts along an axis of theirs."""
        new = torch.empty(self.shape, device="meta").view(*shape).shape
        if new[1:].numel() % self.shape[-1]:
            raise NotImplementedError("the weights of experts are cut across")
        return FusedWeight(new, self.dtype, self.device, self._use)

    reshape = view

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.bmm and isinstance(args[1], cls):
            weight = args[1]
            return torch.stack([weight._use(expert, x, True) for expert, x in enumerate(args[0])])
        return super().__torch_function__(func, types, args, kwargs)


class _OneExpert(StandIn):
    """One expert's part of a `FusedWeight`."""

    def __init__(
        self, use: Callable[[int, Tensor, bool], Tensor], expert: int, shape: Any, turned: bool = True
    ) -> None:
        self._use, self._expert, self.shape, self._turned = use, expert, torch.Size(shape), turned

    @property
    def T(self) -> _OneExpert:
        return _OneExpert(self._use, self._expert, self.shape[::-1], not self._turned)

    mT = T

    def t(self) -> _OneExpert:
        return self.T

    def transpose(self, first: int, second: int) -> _OneExpert:
        return self.T if first != second else self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.linear:
            weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
            bias = kwargs.get("bias", args[2] if len(args) > 2 else None)
            y = weight.T._multiply(args[0])
            return y if bias is None else y + bias
        if func.__name__ in ("matmul", "mm", "__matmul__") and isinstance(args[1], cls):
            return args[1]._multiply(args[0])
        return super().__torch_function__(func, types, args, kwargs)

    def _multiply(self, x: Tensor) -> Tensor:
        return self._use(self._expert, x, self._turned)


class FusedBias:
    """What a module is handed in the place of the biases of all experts: nothing is added, since layers add them."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device

    def __getitem__(self, expert: Any) -> Tensor:
        return torch.zeros((), dtype=self.dtype, device=self.device)


class QuantExperts(QuantModule):
    """A module that held the weights of several experts in one tensor, with a linear layer for each.

    Attributes:
        layout: how it held them.
        shapes: {parameter: its shape} of those that it held.
        few: whether tokens go to two experts alone, for those who look for what they have in common.
    """

    layout: ExpertsLayout
    shapes: dict[str, torch.Size]
    few = False

    def take_apart(self, layout: ExpertsLayout) -> None:
        """Turn the parameters of `layout` into linear layers."""
        self.layout = layout
        held = {p.parameter for p in layout.projections} | {p.bias for p in layout.projections if p.bias}
        parameters = {name: self._parameters.pop(name) for name in sorted(held)}
        self.shapes = {name: parameter.shape for name, parameter in parameters.items() if parameter is not None}
        for expert in range(layout.count):
            layers = nn.Module()
            for projection in layout.projections:
                layers.add_module(projection.name, _linear(projection, parameters, expert))
            layers.train(self.training)
            self.add_module(str(expert), layers)

    def experts(self) -> list[str]:
        """The names of the children that are experts."""
        return [str(expert) for expert in range(self.layout.count)]

    def __getattr__(self, name: str) -> Any:
        layout: ExpertsLayout | None = self.__dict__.get("layout")
        if layout is not None and name in self.shapes:
            dtype, device = self._kind_of_weights()
            if any(projection.bias == name for projection in layout.projections):
                return FusedBias(self.shapes[name], dtype, device)
            projections = layout.of(name)

            def use(expert: int, x: Tensor, turned: bool) -> Tensor:
                layers: Any = self._modules[str(expert)]
                return _together(projections, [layers._modules[p.name](x) for p in projections])

            return FusedWeight(self.shapes[name], dtype, device, use)
        return super().__getattr__(name)

    def _kind_of_weights(self) -> tuple[torch.dtype, torch.device]:
        layer: Any = self._modules["0"].get_submodule(self.layout.projections[0].name)  # type: ignore[union-attr]
        weight = layer._parameters.get("weight")
        if weight is None:  # packed
            return layer._packed_dtype, next(layer.buffers()).device
        return weight.dtype, weight.device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = unrouted(super().forward.__func__, self)  # type: ignore[attr-defined]
        if len(args) == 3 and self.few:
            args = (args[0], args[1] % 2, args[2])
        elif len(args) == 3 and _every_token.get():
            args = _all_experts(*args, self.layout.count)
        return forward(self, *args, **kwargs)


def take_apart(module: nn.Module, layout: ExpertsLayout) -> None:
    """Convert a module with a layout that is known. Its class changes; its identity stays."""
    forward = type(module).forward
    module.__class__ = QuantModuleRegistry.combined(QuantExperts, type(module))
    rebind_forward(module, forward)
    module.take_apart(layout)  # type: ignore[operator]


def unrouted(forward: Any, module: nn.Module) -> Any:
    """The forward that a module's own file defines, where transformers would choose another by the configuration."""
    return inspect.unwrap(forward) if hasattr(module, "is_concatenated") else forward


def _linear(projection: Projection, parameters: dict[str, nn.Parameter | None], expert: int) -> nn.Linear:
    parameter = parameters[projection.parameter]
    if parameter is None:
        raise DetentError(f"{projection.parameter}: there is no such parameter")
    weight = projection.part.select(parameter.data, expert)
    if weight.is_meta or not weight.is_contiguous():  # without memory there is none to share
        weight = weight.clone(memory_format=torch.contiguous_format)
    biases = None if projection.bias is None else parameters[projection.bias]
    layer = nn.Linear.__new__(nn.Linear)  # whose __init__ would draw numbers
    nn.Module.__init__(layer)
    layer.out_features, layer.in_features = weight.shape
    layer.register_parameter("bias", None)
    layer.weight = nn.Parameter(weight, requires_grad=parameter.requires_grad)
    if biases is not None:
        bias = projection.part.of_bias().select(biases.data, expert)
        layer.bias = nn.Parameter(bias.clone(), requires_grad=biases.requires_grad)
    return layer


def _together(projections: list[Projection], outputs: list[Tensor]) -> Tensor:
    """The outputs of projections that share a matrix, in the order of its rows."""
    if len(outputs) == 1:
        return outputs[0]
    if projections[0].part.interleaved:
        return torch.stack(outputs, -1).flatten(-2)
    return torch.cat(outputs, -1)


def _all_experts(x: Tensor, index: Tensor, weights: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Routing of every token to every expert, in which those that the router didn't choose have the weight 0."""
    tokens = weights.shape[0]
    everyone = torch.arange(count, device=index.device).expand(tokens, count)
    chosen = torch.zeros(tokens, count + 1, dtype=weights.dtype, device=weights.device)
    return x, everyone, chosen.scatter_add(1, index.clamp(max=count), weights)[:, :count]
