"""Experts of which each is a linear layer in Detent's models and a part of a larger tensor in transformers' models:
which tensor of a file holds which part.

transformers' own rules say, when they are run on tiny tensors of distinct numbers: where a number comes out tells where
it went in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from detent.nn.experts import ExpertsLayout, Part, QuantExperts
from detent.nn.experts_layout import fused_experts

#: The sizes of an expert's matrix [outputs of each projection, inputs] in the tiny tensors.
_ROWS, _COLUMNS = 2, 3


@dataclass(frozen=True)
class Piece:
    """A part of a tensor: `part.select(tensor, expert)`."""

    tensor: str
    part: Part
    expert: int

    def select(self, tensor: Tensor) -> Tensor:
        """The piece of the tensor: a view."""
        return self.part.select(tensor, self.expert)


def pieces_of_parameters(model: nn.Module) -> tuple[dict[str, Piece], dict[str, torch.Size]]:
    """Experts of a model that are taken apart, or can be.

    Returns:
        {parameter of an expert's linear layer: the piece that it is of a parameter of transformers' model}, and
        {parameter of transformers' model: its shape}.
    """
    shapes: dict[str, torch.Size] = {}
    layouts: list[tuple[str, ExpertsLayout]] = []
    for name, module, layout in fused_experts(model):
        layouts.append((name, layout))
        shapes |= {f"{name}.{key}": parameter.shape for key, parameter in module.named_parameters(recurse=False)}
    for name, module in model.named_modules():
        if isinstance(module, QuantExperts):
            layouts.append((name, module.layout))
            shapes |= {f"{name}.{key}": shape for key, shape in module.shapes.items()}
    found = {}
    for name, layout in layouts:
        for expert in range(layout.count):
            for projection in layout.projections:
                layer = f"{name}.{expert}.{projection.name}"
                found[f"{layer}.weight"] = Piece(f"{name}.{projection.parameter}", projection.part, expert)
                if projection.bias is not None:
                    found[f"{layer}.bias"] = Piece(f"{name}.{projection.bias}", projection.part.of_bias(), expert)
    return found, {name: shapes[name] for name in {piece.tensor for piece in found.values()}}


def pieces_in_file(
    wanted: Mapping[str, Piece], tensors: Mapping[str, Any], rule: Any, model: Any, *, alike: bool
) -> dict[str, Piece] | None:
    """Where in a file the pieces of one parameter are; None where they aren't pieces of its tensors.

    Args:
        wanted: the pieces that the parameter is made of.
        tensors: {tensor of the file that makes it: the pattern of the rule that takes it}.
        rule: transformers' rule; None where the one tensor is the parameter.
        model: of the class that reads the file.
        alike: whether the one tensor has the shape of the parameter, as far as that is known.
    """
    if rule is None:
        return {name: replace(piece, tensor=next(iter(tensors))) for name, piece in wanted.items()}
    parameter = next(iter(wanted.values())).tensor
    first = next(iter(wanted.values())).part
    names, tiny = list(tensors), _tiny_tensors(first, len(tensors), alike)
    made = _converted(rule, parameter, dict(zip(names, tiny, strict=True)), tensors, model, first) if tiny else None
    if made is None:
        return None
    places = {int(number): index for index, tensor in enumerate(tiny) for number in tensor.flatten()}
    found = {}
    for name, piece in wanted.items():
        value = piece.select(made)
        index = places[int(value.flatten()[0])]
        part = _part_of(tiny[index], value, piece)
        if part is None:
            return None
        found[name] = Piece(names[index], part, piece.expert)
    return found


def _tiny_tensors(part: Part, count: int, alike: bool) -> list[Tensor]:
    """Tensors of distinct numbers, in the shapes in which a file may hold the experts in `count` tensors."""
    rows = part.step * _ROWS
    if count == 1:
        shape = [part.of, _COLUMNS, rows] if part.turned == alike else [part.of, rows, _COLUMNS]
    elif part.of * part.step % count or count < part.of:
        return []
    else:
        shape = [rows * part.of // count, _COLUMNS]
    size = torch.Size(shape).numel()
    return list(torch.arange(float(count * size)).reshape(count, *shape))


def _converted(
    rule: Any, parameter: str, tensors: dict[str, Tensor], patterns: Mapping[str, Any], model: Any, part: Part
) -> Tensor | None:
    """What a rule of transformers makes of tiny tensors; None if it is no tiny parameter."""
    rows = part.step * _ROWS
    shape = torch.Size([part.of, _COLUMNS, rows] if part.turned else [part.of, rows, _COLUMNS])
    rule = deepcopy(rule)
    for name, tensor in tensors.items():
        rule.add_tensor(parameter, name, patterns[name], tensor)
    made = rule.convert(parameter, model=_OfTinySize(model, shape), config=getattr(model, "config", None))
    value = made.get(parameter)
    value = value[0] if isinstance(value, list) else value
    return value if value is not None and value.shape == shape else None


class _OfTinySize:
    """A model of which every parameter has one shape, for rules that look at it."""

    def __init__(self, model: Any, shape: torch.Size) -> None:
        self._model, self._shape = model, shape

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty(self._shape, device="meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _part_of(tensor: Tensor, value: Tensor, piece: Piece) -> Part | None:
    """The part of a tiny tensor that has the values of a piece of the parameter."""
    for part in _parts(piece.part, stacked=tensor.dim() == 3):
        selected = part.select(tensor, piece.expert)
        if selected.shape == value.shape and torch.equal(selected, value):
            return part
    return None


def _parts(like: Part, *, stacked: bool) -> Iterable[Part]:
    of = like.of if stacked else 0
    yield Part(of=of)
    yield Part(of=of, turned=True)
    for turned in (False, True):
        for interleaved in (False, True):
            yield replace(like, of=of, joined=False, turned=turned, interleaved=interleaved)
