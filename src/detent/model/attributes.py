"""Switching quantizers on and off, and changing what they are set to, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from detent.config import QuantizerAttributeConfig
from detent.config.attributes import Attributes, SequentialConfig, merged, parse_attributes
from detent.config.base import shown
from detent.config.quant_cfg import class_name
from detent.errors import DetentError
from detent.model.conversion import attributes_of, named_quantizers, parent_classes, set_attributes, settle
from detent.model.rollback import unchanged_on_failure
from detent.nn.walk import walk


def _matching(
    model: nn.Module,
    wildcard_or_filter: str | Callable[[str], bool],
    parent_class: str | type[nn.Module] | None = None,
) -> list[str]:
    """Names of the quantizers that a wildcard or function chooses. Raises DetentError for none."""
    if callable(wildcard_or_filter):
        chosen = [name for name, _ in named_quantizers(model) if wildcard_or_filter(name)]
    elif isinstance(wildcard_or_filter, str):
        chosen = [name for name, _ in named_quantizers(model) if fnmatchcase(name, wildcard_or_filter)]
    else:
        raise DetentError(
            f"quantizers are chosen by a wildcard on their names or a function of it, not {shown(wildcard_or_filter)}"
        )
    if parent_class is not None:
        kind = class_name(parent_class) if isinstance(parent_class, type) else parent_class
        modules = dict(walk(model))
        chosen = [name for name in chosen if kind in parent_classes(modules, name)]
    if not chosen:
        some = ", ".join(name for name, _ in list(named_quantizers(model))[:3])
        known = f"quantizers have names such as {some}" if some else "the model has none: call quantize() first"
        raise DetentError(f"no quantizer matches {shown(wildcard_or_filter)}; {known}")
    return chosen


def _switch(model: nn.Module, wildcard_or_filter: str | Callable[[str], bool], on: bool) -> None:
    with unchanged_on_failure(model):
        for name in _matching(model, wildcard_or_filter):
            quantizer: Any = model.get_submodule(name)
            if on:
                quantizer.enable()
            else:
                quantizer.disable()
        settle(model)


def enable_quantizer(model: nn.Module, wildcard_or_filter_func: str | Callable[[str], bool]) -> None:
    """Switch on the quantizers whose full name matches a wildcard or satisfies a function.

    Raises:
        DetentError: no quantizer matches.


    Example:
        >>> import torch, detent
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = detent.quantize(model, detent.INT8_WEIGHT_ONLY_CFG)
        >>> detent.enable_quantizer(model, "*output_quantizer")
        >>> model[0].output_quantizer.is_enabled
        True
    """
    _switch(model, wildcard_or_filter_func, True)


def disable_quantizer(model: nn.Module, wildcard_or_filter_func: str | Callable[[str], bool]) -> None:
    """Switch off the quantizers whose full name matches a wildcard or satisfies a function.

    Raises:
        DetentError: no quantizer matches.


    Example:
        >>> import torch, detent
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = detent.quantize(model, detent.INT8_WEIGHT_ONLY_CFG)
        >>> detent.disable_quantizer(model, lambda name: name.startswith("0."))
        >>> model[0].weight_quantizer
        TensorQuantizer(disabled)
    """
    _switch(model, wildcard_or_filter_func, False)


def set_quantizer_attribute(
    model: nn.Module,
    wildcard_or_filter_func: str | Callable[[str], bool],
    attribute: QuantizerAttributeConfig | Mapping[str, Any] | Sequence[Any],
    parent_class: str | type[nn.Module] | None = None,
) -> None:
    """Change attributes of all quantizers whose full name matches; those that aren't named stay as they are.

    Args:
        model: a model with quantizers.
        wildcard_or_filter_func: a wildcard on the full name, or a function of it.
        attribute: a dictionary of what changes: ``{"num_bits": 4}`` keeps a weight's axis and leaves a quantizer that
            is off switched off. A list of dictionaries, one for each quantizer in sequence; where a single quantizer
            becomes a sequence, and for a `QuantizerAttributeConfig`, all attributes are replaced.
        parent_class: only quantizers of modules of this class, such as ``"nn.Linear"``.

    Raises:
        DetentError: no quantizer matches, or the result isn't valid. The model is then as it was.

    Example:
        >>> import torch, detent
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = detent.quantize(model, {"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "axis": 0}}})
        >>> detent.set_quantizer_attribute(model, "*", {"num_bits": 4})
        >>> model[0].weight_quantizer.num_bits, model[0].weight_quantizer.axis, model[0].output_quantizer.is_enabled
        (4, 0, False)
    """
    with unchanged_on_failure(model):
        for name in _matching(model, wildcard_or_filter_func, parent_class):
            set_attributes(model, name, _merged(name, attributes_of(model.get_submodule(name)), attribute))
        settle(model)


def set_quantizer_attributes_full(
    model: nn.Module,
    wildcard_or_filter_func: str | Callable[[str], bool],
    attributes: QuantizerAttributeConfig | Mapping[str, Any] | Sequence[Any],
    parent_class: str | type[nn.Module] | None = None,
) -> None:
    """Replace all attributes of the quantizers whose full name matches: what isn't named gets its default.

    The arguments are those of `set_quantizer_attribute`, which changes only what is named.

    Raises:
        DetentError: no quantizer matches, or the attributes aren't valid. The model is then as it was.

    Example:
        >>> import torch, detent
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = detent.quantize(model, {"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "axis": 0}}})
        >>> detent.set_quantizer_attributes_full(model, "*weight_quantizer", {"num_bits": 4})
        >>> print(model[0].weight_quantizer.axis)
        None
    """
    parsed = parse_attributes(attributes)
    with unchanged_on_failure(model):
        for name in _matching(model, wildcard_or_filter_func, parent_class):
            set_attributes(model, name, parsed)
        settle(model)


#: What ModelOpt calls the two.
set_quantizer_attributes_partial = set_quantizer_attribute


def _merged(name: str, current: Attributes, given: Any) -> Attributes:
    """What a quantizer, or a sequence of them, is set to when some attributes change."""
    if isinstance(given, list | tuple):
        if isinstance(current, SequentialConfig) and len(current) == len(given):
            return SequentialConfig(merged(now, step) for now, step in zip(current, given, strict=True))
        return parse_attributes(given)
    if not isinstance(current, SequentialConfig):
        return merged(current, given)
    if isinstance(given, Mapping) and set(given) == {"enable"}:
        return SequentialConfig(merged(now, given) for now in current)
    if isinstance(given, QuantizerAttributeConfig):
        return given
    raise DetentError(f"{name}: {len(current)} quantizers in sequence take a list of {len(current)} dictionaries")
