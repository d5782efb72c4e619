"""Names and shapes in a checkpoint file, and those of the model class that reads it: from one to the other and back.

transformers renames, merges, splits and transposes tensors while it loads them, by rules of each model class.
`CheckpointNames` applies the same rules to the names of one checkpoint, and their reverse to changed values. What
it says holds for that checkpoint: each tensor belongs to exactly one group, each parameter to at most one.

Experts that transformers' model holds in one parameter are linear layers of their own here, in what is said of the
parameters: see `detent.nn.experts`. In a file they may be tensors of their own, or pieces of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from detent.errors import DetentError
from detent.nn.experts import Part
from detent.pretrained.pieces import Piece, pieces_in_file, pieces_of_parameters

#: Added to a layer's name to learn how transformers renames what is stored with its weight.
_PROBE = "weight_scale"


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of a file and the parameters that are made of them.

    Attributes:
        tensors: names in the file. parameters: names in the model; () where the model has no place for the tensors.
        converter: transformers' rule that makes the parameters of the tensors; None where one tensor is one parameter,
            or holds several as pieces.
        pieces: {parameter: the piece of the tensor that it is}; empty where the tensor isn't made of pieces.
        merged: whether transformers merges the tensors with others, where they are parameters of their own here.
    """

    tensors: tuple[str, ...]
    parameters: tuple[str, ...]
    converter: Any = None
    pieces: Mapping[str, Piece] = field(default_factory=dict)
    merged: bool = False

    @property
    def is_one(self) -> bool:
        """Whether one tensor is one parameter and nothing else."""
        return self.converter is None and len(self.parameters) == 1 and not self.pieces


class CheckpointNames:
    """How the tensors of a checkpoint and the parameters and buffers of its model belong together.

    Args:
        model: of the class that reads the checkpoint, on any device, its experts taken apart or not.
        tensors: the names in the file; a mapping may give their shapes.

    Attributes:
        groups: every tensor is in exactly one of them.
        experts: names of the linear layers that transformers' model holds several of in one parameter.

    Raises:
        DetentError: two tensors claim the same parameter.
    """

    def __init__(self, model: nn.Module, tensors: Iterable[str] | Mapping[str, Any]) -> None:
        self._renamings, self._converters = _rules(model)
        self._prefix: str = getattr(model, "base_model_prefix", "")
        self._pieces, self._fused = pieces_of_parameters(model)
        self.experts = frozenset(n.removesuffix(".weight") for n in self._pieces if n.endswith(".weight"))
        self._shapes: Mapping[str, Any] = tensors if isinstance(tensors, Mapping) else {}
        self._known: frozenset[str] = frozenset(model.state_dict()) | self._pieces.keys() | self._fused.keys()
        self._by_pattern = {pattern: c for c in self._converters for pattern in c.source_patterns}
        self._model = model
        self.groups = self._group(sorted(tensors, key=_natural))
        self._by_parameter = {name: group for group in self.groups for name in group.parameters}
        self._by_tensor = {name: group for group in self.groups for name in group.tensors}

    def of_tensor(self, tensor: str) -> TensorGroup:
        """The group of a tensor of the file."""
        return self._by_tensor[tensor]

    def of_parameter(self, parameter: str) -> TensorGroup | None:
        """The group that a parameter is made from; None where the file has nothing for it. For one that holds several
        experts, the group of the first."""
        if parameter in self._fused:
            parameter = next(name for name, piece in self._pieces.items() if piece.tensor == parameter)
        return self._by_parameter.get(parameter)

    def parameter(self, tensor: str) -> str | None:
        """The parameter that is one tensor of the file and nothing else; None where there is none."""
        group = self._by_tensor.get(tensor)
        return group.parameters[0] if group is not None and group.is_one else None

    def piece(self, parameter: str) -> Piece | None:
        """The piece of a tensor that a parameter is; None where it is no part of a larger one."""
        group = self._by_parameter.get(parameter)
        return None if group is None else group.pieces.get(parameter)

    def layer(self, module: str) -> str | None:
        """The name in the file of a module with a ``weight``, under which its codes and scales go too.

        Returns:
            None if the weight isn't a tensor of its own there, or what is stored with it would not be found again. The
            module's own name if the file has nothing for it (a tied output embedding).
        """
        group = self.of_parameter(f"{module}.weight")
        if group is None:
            return module
        if group.pieces:
            return self._layer_of_piece(module, group)
        if not group.is_one or not group.tensors[0].endswith(".weight"):
            return None
        if f"{module}.weight" in self._pieces:
            return group.tensors[0].removesuffix(".weight")
        for name in (group.tensors[0].removesuffix(".weight"), module):
            if self._rename(f"{name}.{_PROBE}", f"{module}.{_PROBE}")[0] == f"{module}.{_PROBE}":
                return name
        return None

    def _layer_of_piece(self, module: str, group: TensorGroup) -> str | None:
        """A name of its own for an expert that is a piece of a tensor in the file: next to that, as in the model."""
        held, tensor = self._pieces[f"{module}.weight"].tensor, group.tensors[0]
        parent, _, last = held.rpartition(".")
        around = tensor.removesuffix(f".{last}") if tensor.endswith(f".{last}") else parent
        for name in (around + module.removeprefix(parent), module):
            if self._rename(f"{name}.weight")[0] == f"{module}.weight":
                return name
        return None

    def container(self, module: str) -> str:
        """The name in the file of a module that holds others, by what its members are called there."""
        for parameter, group in self._by_parameter.items():
            rest = parameter.removeprefix(f"{module}.")
            if rest != parameter and group.is_one and group.tensors[0].endswith(f".{rest}"):
                return group.tensors[0].removesuffix(f".{rest}")
        return module

    def to_file(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters with new values as tensors of the file. Those that the file has nothing for keep their names.

        Args:
            values: by parameter; where several are made from the same tensors, the others are taken from the model.

        Raises:
            DetentError: a rule of transformers can't be reversed.
        """
        made: dict[str, Tensor] = {}
        values = self._taken_apart(values)
        for name, value in values.items():
            group = self.of_parameter(name)
            if group is None:
                made[name] = value
            elif group.is_one:
                made[group.tensors[0]] = value
            elif group.tensors[0] not in made:
                made |= self._unmake(group, values)
        return made

    def to_model(self, parameter: str, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The values of a parameter, and of those that are made of the same tensors of the file.

        Args:
            parameter: one that the file has something for.
            read: gives a tensor of the file.

        Returns:
            By parameter, in the dtypes of the file.
        """
        group = self._by_parameter[parameter]
        if group.pieces:
            whole = read(group.tensors[0])
            return {name: piece.select(whole) for name, piece in group.pieces.items()}
        if group.is_one:
            return {parameter: read(group.tensors[0])}
        converter = deepcopy(group.converter)
        first = ""
        for tensor in group.tensors:
            first, _, pattern = self._rename(tensor)
            converter.add_tensor(first, tensor, pattern, read(tensor))
        made = converter.convert(first, model=self._model, config=getattr(self._model, "config", None))
        return self._taken_apart({name: v[0] if isinstance(v, list) else v for name, v in made.items()})

    def _taken_apart(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values by parameter, with those that hold several experts as one for each."""
        made = {name: value for name, value in values.items() if name not in self._fused}
        whole = values.keys() & self._fused.keys()
        if whole:
            made |= {
                n: piece.select(values[piece.tensor]) for n, piece in self._pieces.items() if piece.tensor in whole
            }
        return made

    def _group(self, tensors: list[str]) -> list[TensorGroup]:
        found: dict[str, tuple[dict[str, Any], Any]] = {}
        groups = []
        for tensor in tensors:
            parameter, converter, pattern = self._rename(tensor)
            if parameter not in self._known:
                groups.append(TensorGroup((tensor,), ()))
                continue
            members, rule = found.setdefault(parameter, ({}, converter))
            if members and (converter is None or rule is not converter):
                raise DetentError(
                    f"the checkpoint's tensors {next(iter(members))} and {tensor} both map to {parameter}"
                )
            members[tensor] = pattern
        pieces: dict[str, dict[str, Piece]] = {}
        for name, piece in self._pieces.items():
            pieces.setdefault(piece.tensor, {})[name] = piece
        for parameter, (members, rule) in found.items():
            if parameter in pieces:
                groups += self._group_of_experts(pieces[parameter], members, rule)
                continue
            names = (parameter,) if rule is None else tuple(_targets(parameter, rule))
            groups.append(TensorGroup(tuple(members), names, rule))
        return groups

    def _group_of_experts(
        self, wanted: Mapping[str, Piece], members: Mapping[str, Any], rule: Any
    ) -> Iterator[TensorGroup]:
        """The groups of the tensors that make one parameter in which transformers' model holds several experts."""
        shape = self._shapes.get(next(iter(members)))
        own = self._fused[next(iter(wanted.values())).tensor]
        alike = shape is None or tuple(getattr(shape, "shape", shape)) == tuple(own)
        found = pieces_in_file(wanted, members, rule, self._model, alike=alike)
        if found is None:
            yield TensorGroup(tuple(members), tuple(wanted), rule)
            return
        by_tensor: dict[str, dict[str, Piece]] = {tensor: {} for tensor in members}
        for name, piece in found.items():
            by_tensor.setdefault(piece.tensor, {})[name] = piece
        for tensor in members:
            inside = by_tensor[tensor]
            whole = len(inside) == 1 and all(piece.part == Part() for piece in inside.values())
            yield TensorGroup((tensor,), tuple(inside), None, {} if whole else inside, rule is not None)

    def _rename(self, tensor: str, more: str = "") -> tuple[str, Any, Any]:
        """(name in the model, the rule that makes it, which of its patterns takes it) of a tensor, exactly as
        transformers' loader finds them."""
        from transformers.core_model_loading import rename_source_key

        known: Any = _Known(self._known, more)
        name, pattern = rename_source_key(tensor, self._renamings, self._converters, self._prefix, known)
        if name not in known and tensor in known:
            name, pattern = rename_source_key(tensor, [], [], self._prefix, known)
        return name, None if pattern is None else self._by_pattern[pattern], pattern

    def _unmake(self, group: TensorGroup, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import apply_renamings

        if group.parameters[0] in self._pieces:
            return self._assemble(group, values)
        reverse = deepcopy(group.converter.reverse_transform())
        first = ""
        for parameter in group.parameters:
            renamed, pattern = reverse.rename_source_key(parameter)
            first = first or renamed
            value = values[parameter] if parameter in values else self._model.state_dict()[parameter]
            reverse.add_tensor(renamed, parameter, pattern, value)
        made = reverse.convert(first, model=self._model, config=getattr(self._model, "config", None))
        wanted = {apply_renamings(tensor, self._renamings): tensor for tensor in group.tensors}
        if made.keys() != wanted.keys():
            raise _not_written(group)
        return {wanted[name]: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _assemble(self, group: TensorGroup, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A tensor of the file of which all pieces have new values."""
        if not group.pieces or not group.pieces.keys() <= values.keys():
            raise _not_written(group)
        first = group.parameters[0]
        shape = list(self._fused[self._pieces[first].tensor])
        if group.pieces[first].part.turned != self._pieces[first].part.turned:
            shape[-2:] = reversed(shape[-2:])
        whole = values[first].new_empty(shape)
        for name, piece in group.pieces.items():
            piece.select(whole).copy_(values[name])
        return {group.tensors[0]: whole}


def _not_written(group: TensorGroup) -> DetentError:
    return DetentError(
        f"{group.parameters[0]}: its changed values can't be written as {group.tensors[0]}, from which"
        " transformers makes it; leave out the algorithm that changes it"
    )


@dataclass(frozen=True)
class _Known:
    """The parameters that a model has, and one more, as transformers asks for them."""

    names: frozenset[str]
    more: str

    def __contains__(self, name: str) -> bool:
        return name in self.names or name == self.more

    def get(self, name: str) -> bool | None:
        return True if name in self else None


def _rules(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """transformers' renamings and converters for a model, fresh: some of them keep what they have seen."""
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # pragma: no cover - transformers without conversions
        return [], []
    if not isinstance(model, PreTrainedModel):
        return [], []
    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    return [rule for rule in rules if not isinstance(rule, WeightConverter)], converters


def as_written(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors as transformers would write them: under the names that a file has, on any device."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # pragma: no cover - transformers without conversions
        return dict(state)
    written: dict[str, Tensor] = revert_weight_conversion(model, dict(state))
    return written


def _targets(first: str, converter: Any) -> list[str]:
    patterns = converter.target_patterns
    return [first.replace(patterns[0], pattern) for pattern in patterns]


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Numbers by value: the order in which transformers merges experts."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
