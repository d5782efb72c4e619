"""How a module holds the weights of its experts, read off one call of it with random numbers.

In the place of its weights the module is handed stand-ins that give random outputs and remember what they were
multiplied with. The last of them is the projection down. Which of the outputs before it meet in one of its inputs, and
which of them go through the activation (their derivative depends on themselves), tells gate from up.

Nothing of the size of a weight is made, so that it costs the same for any model, on the meta device too.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from detent.nn.experts import (
    ExpertsLayout,
    FusedBias,
    FusedWeight,
    Part,
    Projection,
    QuantExperts,
    take_apart,
    unrouted,
)

_TOKENS = 3


def fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module, ExpertsLayout]]:
    """(name, module, layout) of every module that holds the weights of several experts in one tensor."""
    known: dict[Any, tuple[str, ExpertsLayout] | None] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantExperts) or not _may_hold_experts(module):
            continue
        shapes = tuple((n, p.shape) for n, p in module.named_parameters())
        key = (type(module), shapes)
        if key not in known:
            known[key] = _layout_of(module)
        found = known[key]
        if found is not None:
            holder, layout = found
            yield f"{name}.{holder}".strip("."), module.get_submodule(holder), layout


def take_experts_apart(model: nn.Module) -> None:
    """Turn all experts that a model holds in tensors of several, and whose layout is understood, into linear layers."""
    for _, module, layout in list(fused_experts(model)):
        take_apart(module, layout)


def _may_hold_experts(module: nn.Module) -> bool:
    """Whether a module, or one child of it, has nothing but tensors of several matrices, and its name speaks of
    experts."""
    if "expert" not in type(module).__name__.lower() or isinstance(module, nn.ModuleList):
        return False
    matrices = [p for p in module.parameters() if p.dim() > 1]
    layers = any(isinstance(part, nn.Linear) for part in module.modules())
    return bool(matrices) and not layers


@dataclass(frozen=True)
class _Use:
    """One multiplication: by which parameter, of which expert, with what, as stored or not, and what came out."""

    parameter: str
    expert: int
    x: Tensor
    turned: bool
    y: Tensor


def _layout_of(module: nn.Module) -> tuple[str, ExpertsLayout] | None:
    """(the child that holds the weights, how), or None where the module isn't understood."""
    holder = next(
        (n for n, part in module.named_modules() if any(p.dim() > 1 for p in part.parameters(recurse=False))), ""
    )
    widths = {size for p in module.get_submodule(holder).parameters(recurse=False) for size in p.shape[1:]}
    for width in sorted(widths):
        try:
            with torch.inference_mode(False), torch.enable_grad():
                layout = _Watched(module, holder).layout(width)
        except (TypeError, AttributeError, ValueError, IndexError, RuntimeError):  # it does something else with them
            continue
        if layout is not None:
            return holder, layout
    return None


class _Watched:
    """A double of a module, whose weights are stand-ins."""

    def __init__(self, module: nn.Module, holder: str) -> None:
        self._uses: list[_Use] = []
        self._double = _double(module)
        self._holder = self._double.get_submodule(holder)
        self._parameters = dict(module.get_submodule(holder).named_parameters(recurse=False))
        self._count = next((p.shape[0] for p in self._parameters.values() if p.dim() > 2), 0)
        self._biases = {n: b for n in self._parameters if (b := f"{n}_bias") in self._parameters}
        for name, parameter in self._parameters.items():
            if name in self._biases.values():
                self._holder.__dict__[name] = FusedBias(parameter.shape, torch.float32, torch.device("cpu"))
            elif parameter.dim() > 1:
                self._holder.__dict__[name] = self._stand_in(name, parameter)

    def _stand_in(self, name: str, parameter: Tensor) -> FusedWeight:
        def use(expert: int, x: Tensor, turned: bool) -> Tensor:
            count = self._count or self._number_of_experts()
            shape = parameter.shape[1:] if parameter.dim() > 2 else (parameter.shape[0] // count, parameter.shape[1])
            inputs, outputs = shape if turned else reversed(shape)
            if x.shape[-1] != inputs:
                raise ValueError(f"an input of {x.shape[-1]} for {inputs}")
            y = (torch.rand(*x.shape[:-1], outputs) + 0.5).requires_grad_()  # positive: no ReLU hides it
            self._uses.append(_Use(name, expert, x, turned, y))
            return y

        return FusedWeight(parameter.shape, torch.float32, torch.device("cpu"), use)

    def _number_of_experts(self) -> int:
        numbers = [v for k, v in vars(self._double).items() if isinstance(v, int) and "num_experts" in k]
        return numbers[0] if numbers else 1

    def layout(self, width: int) -> ExpertsLayout | None:
        self._count = self._count or self._number_of_experts()
        if self._count < 2:
            return None
        forward = unrouted(type(self._double).forward, self._double)
        arguments = self._arguments(forward, width)
        forward(self._double, *arguments)
        mine = [use for use in self._uses if use.expert == 0]
        if len(mine) < 2 or len({use.parameter for use in mine}) != len(mine):
            return None
        *first, last = mine
        if any(use.x.requires_grad for use in first) or not last.x.requires_grad:
            return None
        found = [self._projection(use, role, part) for use, role, part in _roles(first, last)]
        if sorted(p.name for p in found) not in (["down_proj", "gate_proj", "up_proj"], ["down_proj", "up_proj"]):
            return None
        return ExpertsLayout(self._count, tuple(found), len(arguments) == 3 and self._holder is self._double)

    def _arguments(self, forward: Any, width: int) -> tuple[Any, ...]:
        names = [p for p in inspect.signature(forward).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
        if len(names) == 2:  # the module and tokens sorted by expert
            return (torch.randn(self._count * _TOKENS, width),)
        chosen = torch.tensor([0, self._count - 1]).expand(_TOKENS, 2)
        return torch.randn(_TOKENS, width), chosen, torch.rand(_TOKENS, 2)

    def _projection(self, use: _Use, role: str, part: Part) -> Projection:
        parameter = self._parameters[use.parameter]
        part = replace(part, of=self._count, joined=parameter.dim() == 2, turned=use.turned)
        return Projection(role, use.parameter, part, self._biases.get(use.parameter))


def _roles(first: list[_Use], last: _Use) -> Iterator[tuple[_Use, str, Part]]:
    """(the multiplication, the name of the projection, its part among the outputs)."""
    met = [_outputs_that_meet(last.x, use.y) for use in first]
    if any(patterns is None for patterns in met):
        return
    parts = [(use, part) for use, patterns in zip(first, met, strict=True) for part in patterns or ()]
    bent = [_is_bent(last.x, use.y, part) for use, part in parts]
    for index, (use, part) in enumerate(parts):
        gate = len(parts) == 2 and (bent[index] if bent[0] != bent[1] else index == 0)
        yield use, "gate_proj" if gate else "up_proj", part
    yield last, "down_proj", Part()


def _outputs_that_meet(inputs: Tensor, outputs: Tensor) -> list[Part] | None:
    """The parts of `outputs` of which one each is in every element of `inputs`: one part, or two of equal size."""
    size, width = outputs.shape[-1], inputs.shape[-1]
    step = size // width
    if step * width != size or step not in (1, 2):
        return None
    found = [_positions(inputs, outputs, element) for element in (0, 1, width - 1)]
    for interleaved in (False, True):
        parts = [Part(start=start, step=step, interleaved=interleaved) for start in range(step)]
        places = [part.rows_of(torch.arange(size)) for part in parts]
        if all(found[i] == {int(p[e]) for p in places} for i, e in enumerate((0, 1, width - 1))):
            return parts
    return None


def _positions(inputs: Tensor, outputs: Tensor, element: int) -> set[int]:
    (slope,) = torch.autograd.grad(inputs.reshape(-1, inputs.shape[-1])[0, element], outputs, retain_graph=True)
    return set(slope.reshape(-1, outputs.shape[-1])[0].nonzero().flatten().tolist())


def _is_bent(inputs: Tensor, outputs: Tensor, part: Part) -> bool:
    """Whether an element of `inputs` depends on its element of `outputs` otherwise than in a straight line."""
    place = int(part.rows_of(torch.arange(outputs.shape[-1]))[0])
    element = inputs.reshape(-1, inputs.shape[-1])[0, 0]
    (slope,) = torch.autograd.grad(element, outputs, create_graph=True)
    own = slope.reshape(-1, outputs.shape[-1])[0, place]
    if not own.requires_grad:
        return False
    (bend,) = torch.autograd.grad(own, outputs, retain_graph=True, allow_unused=True)
    return bend is not None and bool(bend.reshape(-1, outputs.shape[-1])[0, place] != 0)


def _double(module: nn.Module) -> nn.Module:
    """A copy whose parameters are of ones and on the CPU; matrices are left out."""
    double = copy.copy(module)
    double.__dict__ = {key: value.copy() if isinstance(value, dict) else value for key, value in vars(module).items()}
    for table in (double._parameters, double._buffers):
        for name, tensor in list(table.items()):
            if tensor is not None:
                table[name] = None if tensor.dim() > 1 else torch.ones(tensor.shape)  # type: ignore[assignment]
    for name, child in module.named_children():
        double._modules[name] = _double(child)
    return double
