"""Names and shapes in a checkpoint file, and those of the model class that reads it: from one to the other and back.

transformers renames, merges, splits and transposes tensors while it loads them, by rules of each model class.
`CheckpointNames` applies the same rules to the names of one checkpoint, and their reverse to changed values. What
it says holds for that checkpoint: each tensor belongs to exactly one group, each parameter to at most one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from detent.errors import DetentError

#: Added to a layer's name to learn how transformers renames what is stored with its weight.
_PROBE = "weight_scale"


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of a file and the parameters that are made of them.

    Attributes:
        tensors: names in the file. parameters: names in the model; () where the model has no place for the tensors.
        converter: transformers' rule that makes the parameters of the tensors; None where one tensor is one parameter.
    """

    tensors: tuple[str, ...]
    parameters: tuple[str, ...]
    converter: Any = None


class CheckpointNames:
    """How the tensors of a checkpoint and the parameters and buffers of its model belong together.

    Args:
        model: of the class that reads the checkpoint, on any device.
        tensors: the names in the file.

    Attributes:
        groups: every tensor is in exactly one of them.

    Raises:
        DetentError: two tensors claim the same parameter.
    """

    def __init__(self, model: nn.Module, tensors: Iterable[str]) -> None:
        self._renamings, self._converters = _rules(model)
        self._prefix: str = getattr(model, "base_model_prefix", "")
        self._known: frozenset[str] = frozenset(model.state_dict())
        self._by_pattern = {pattern: c for c in self._converters for pattern in c.source_patterns}
        self._model = model
        self.groups = self._group(sorted(tensors, key=_natural))
        self._by_parameter = {name: group for group in self.groups for name in group.parameters}
        self._by_tensor = {name: group for group in self.groups for name in group.tensors}

    def of_tensor(self, tensor: str) -> TensorGroup:
        """The group of a tensor of the file."""
        return self._by_tensor[tensor]

    def of_parameter(self, parameter: str) -> TensorGroup | None:
        """The group that a parameter is made from; None where the file has nothing for it."""
        return self._by_parameter.get(parameter)

    def parameter(self, tensor: str) -> str | None:
        """The parameter that is one tensor of the file and nothing else; None where there is none."""
        group = self._by_tensor.get(tensor)
        return group.parameters[0] if group is not None and group.converter is None and group.parameters else None

    def layer(self, module: str) -> str | None:
        """The name in the file of a module with a ``weight``, under which its codes and scales go too.

        Returns:
            None if the weight isn't a tensor of its own there, or what is stored with it would not be found again. The
            module's own name if the file has nothing for it (a tied output embedding).
        """
        group = self.of_parameter(f"{module}.weight")
        if group is None:
            return module
        if group.converter is not None or not group.tensors[0].endswith(".weight"):
            return None
        for name in (group.tensors[0].removesuffix(".weight"), module):
            if self._rename(f"{name}.{_PROBE}", f"{module}.{_PROBE}")[0] == f"{module}.{_PROBE}":
                return name
        return None

    def container(self, module: str) -> str:
        """The name in the file of a module that holds others, by what its members are called there."""
        for parameter, group in self._by_parameter.items():
            rest = parameter.removeprefix(f"{module}.")
            if rest != parameter and group.converter is None and group.tensors[0].endswith(f".{rest}"):
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
        for name, value in values.items():
            group = self.of_parameter(name)
            if group is None:
                made[name] = value
            elif group.converter is None:
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
        if group.converter is None:
            return {parameter: read(group.tensors[0])}
        converter = deepcopy(group.converter)
        for tensor in group.tensors:
            name, pattern = self._renamed(tensor)
            converter.add_tensor(name, tensor, pattern, read(tensor))
        made = converter.convert(group.parameters[0], model=self._model, config=getattr(self._model, "config", None))
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _group(self, tensors: list[str]) -> list[TensorGroup]:
        found: dict[str, tuple[list[str], Any]] = {}
        groups = []
        for tensor in tensors:
            parameter, converter = self._rename(tensor)
            if parameter not in self._known:
                groups.append(TensorGroup((tensor,), ()))
                continue
            members, rule = found.setdefault(parameter, ([], converter))
            if members and (converter is None or rule is not converter):
                raise DetentError(f"the checkpoint's tensors {members[0]} and {tensor} both map to {parameter}")
            members.append(tensor)
        for parameter, (members, rule) in found.items():
            names = (parameter,) if rule is None else tuple(_targets(parameter, rule))
            groups.append(TensorGroup(tuple(members), names, rule))
        return groups

    def _rename(self, tensor: str, more: str = "") -> tuple[str, Any]:
        """(name in the model, the rule that makes it) of a tensor, exactly as transformers' loader finds them."""
        name, pattern = self._renamed(tensor, more)
        return name, None if pattern is None else self._by_pattern[pattern]

    def _renamed(self, tensor: str, more: str = "") -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        known: Any = _Known(self._known, more)
        name, pattern = rename_source_key(tensor, self._renamings, self._converters, self._prefix, known)
        if name not in known and tensor in known:
            name, pattern = rename_source_key(tensor, [], [], self._prefix, known)
        return name, pattern

    def _unmake(self, group: TensorGroup, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import apply_renamings

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
            raise DetentError(
                f"{group.parameters[0]}: its changed values can't be written as {group.tensors[0]}, from which"
                " transformers makes it; leave out the algorithm that changes it"
            )
        return {wanted[name]: value[0] if isinstance(value, list) else value for name, value in made.items()}


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


def _targets(first: str, converter: Any) -> list[str]:
    patterns = converter.target_patterns
    return [first.replace(patterns[0], pattern) for pattern in patterns]


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Numbers by value: the order in which transformers merges experts."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
