"""Putting quantizers into a model, and setting them by a configuration.

Invariant: a conversion that fails leaves the model as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from detent.config import QuantizerAttributeConfig
from detent.config.attributes import Attributes, SequentialConfig, parse_attributes
from detent.config.matching import check_matches, match
from detent.config.quant_cfg import Rule, normalize
from detent.errors import DetentError
from detent.nn import QuantModuleRegistry, SequentialQuantizer, TensorQuantizer
from detent.nn.attention import add_attention_quantizers, attention_modules, route_attention

_log = logging.getLogger(__name__)

Quantizer = TensorQuantizer | SequentialQuantizer


def named_quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """(full name, quantizer) of every quantizer; a sequence counts once."""
    sequences = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, SequentialQuantizer))
    for name, module in model.named_modules():
        if isinstance(module, SequentialQuantizer) or (
            isinstance(module, TensorQuantizer) and not (sequences and name.startswith(sequences))
        ):
            yield name, module


def is_quantized(model: nn.Module) -> bool:
    """Whether the model has quantizers, on or off."""
    return any(isinstance(m, TensorQuantizer) for m in model.modules())


def replace_quant_module(model: nn.Module) -> Callable[[], None]:
    """Convert every registered module in place, with quantizers that are all off.

    Returns:
        A function that undoes the conversion.

    Raises:
        DetentError: the model itself, or nothing in it, can be converted.
    """
    undo: list[tuple[nn.Module, type[nn.Module], set[str]]] = []
    for name, module in list(model.named_modules()):
        if _weight_used_from_outside(model, name):
            _log.warning("%s: its parent multiplies with the weight itself, so it stays unquantized", name)
            continue
        if type(module) in QuantModuleRegistry:
            undo.append((module, type(module), set(module._modules)))
            QuantModuleRegistry.convert(module)
    attention = [(m, type(m), set(m._modules)) for _, m in attention_modules(model)]
    add_attention_quantizers(model)
    if not undo:
        known = ", ".join(sorted(k.__name__ for k in QuantModuleRegistry))
        raise DetentError(
            f"{type(model).__name__} has no module that Detent can quantize (known: {known}); see detent.register()"
        )
    for name, quantizer in named_quantizers(model):
        quantizer.name = name
        quantizer.disable()

    def revert() -> None:
        for module, kind, children in undo + attention:
            module.__class__ = kind
            for child in set(module._modules) - children:
                del module._modules[child]

    return revert


def _weight_used_from_outside(model: nn.Module, name: str) -> bool:
    """`nn.MultiheadAttention` hands `out_proj.weight` to a function and never calls `out_proj`."""
    parent = model.get_submodule(name.rpartition(".")[0]) if "." in name else None
    return isinstance(parent, nn.MultiheadAttention)


def set_quantizer_by_cfg(model: nn.Module, quant_cfg: Any, *, strict: bool = True) -> list[str]:
    """Set every quantizer of a converted model by the rules of `quant_cfg`; the last rule that matches one wins.

    Args:
        model: a model with quantizers.
        quant_cfg: a dict of wildcards or an ordered list of entries.
        strict: whether a rule that sets a format and matches nothing is an error (else a warning).

    Returns:
        Warnings: exclusions that match nothing and, unless strict, the errors.

    Raises:
        DetentError: a rule is malformed or matches nothing.
    """
    rules = normalize(quant_cfg)
    names = {name: _parent_classes(model, name) for name, _ in named_quantizers(model)}
    warnings = check_matches(rules, names, strict=strict)
    _apply(model, rules, names)
    for warning in warnings:
        _log.warning("%s", warning)
    return warnings


def _apply(model: nn.Module, rules: list[Rule], names: dict[str, set[str]]) -> None:
    for name, parents in names.items():
        before = _attributes(model.get_submodule(name))
        attributes = match(rules, name, parents, before)
        if attributes is not None and attributes != before:
            _set(model, name, attributes)
    route_attention(model)


def _attributes(quantizer: nn.Module) -> Attributes:
    """What a quantizer is set to now, on or off included."""
    if isinstance(quantizer, SequentialQuantizer):
        return SequentialConfig([_attributes(q) for q in quantizer])
    assert isinstance(quantizer, TensorQuantizer)
    return quantizer.attributes.model_copy(update={"enable": quantizer.is_enabled})


def _parent_classes(model: nn.Module, quantizer_name: str) -> set[str]:
    return QuantModuleRegistry.names_of(model.get_submodule(quantizer_name.rpartition(".")[0]))


def _set(model: nn.Module, name: str, attributes: Attributes) -> None:
    """Give one quantizer its attributes, changing between single and sequence where needed."""
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    quantizer = getattr(parent, leaf)
    if isinstance(attributes, SequentialConfig):
        if not isinstance(quantizer, SequentialQuantizer) or len(quantizer) != len(attributes):
            quantizer = SequentialQuantizer(*(TensorQuantizer(a) for a in attributes))
            setattr(parent, leaf, quantizer)
        quantizer.set_from_attribute_config(list(attributes))
    else:
        if isinstance(quantizer, SequentialQuantizer):
            quantizer = TensorQuantizer(attributes)
            setattr(parent, leaf, quantizer)
        quantizer.set_from_attribute_config(attributes)
    quantizer.name = name


@contextmanager
def set_quantizer_by_cfg_context(model: nn.Module, quant_cfg: Any) -> Iterator[None]:
    """Set quantizers inside the ``with`` block; afterwards every one has its attributes and calibrated state back."""
    before = {name: _snapshot(quantizer) for name, quantizer in named_quantizers(model)}
    try:
        set_quantizer_by_cfg(model, quant_cfg)
        yield
    finally:
        for name, quantizer in before.items():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, quantizer)
        route_attention(model)


def _snapshot(quantizer: Quantizer) -> Quantizer:
    """A copy with state of its own, to be put back."""
    from copy import deepcopy

    return deepcopy(quantizer)


def _matcher(wildcard_or_filter: str | Callable[[str], bool]) -> Callable[[str], bool]:
    from fnmatch import fnmatchcase

    if callable(wildcard_or_filter):
        return wildcard_or_filter
    return lambda name: fnmatchcase(name, wildcard_or_filter)


def _switch(model: nn.Module, wildcard_or_filter: str | Callable[[str], bool], on: bool) -> None:
    matches = _matcher(wildcard_or_filter)
    chosen = [quantizer for name, quantizer in named_quantizers(model) if matches(name)]
    if not chosen:
        some = ", ".join(name for name, _ in list(named_quantizers(model))[:3]) or "none: call quantize() first"
        raise DetentError(f"no quantizer matches {wildcard_or_filter!r}; quantizers are called, for instance, {some}")
    for quantizer in chosen:
        quantizer.enable() if on else quantizer.disable()
    route_attention(model)


def enable_quantizer(model: nn.Module, wildcard_or_filter_func: str | Callable[[str], bool]) -> None:
    """Switch on the quantizers whose full name matches a wildcard or satisfies a function.

    Raises:
        DetentError: no quantizer matches.
    """
    _switch(model, wildcard_or_filter_func, True)


def disable_quantizer(model: nn.Module, wildcard_or_filter_func: str | Callable[[str], bool]) -> None:
    """Switch off the quantizers whose full name matches a wildcard or satisfies a function.

    Raises:
        DetentError: no quantizer matches.
    """
    _switch(model, wildcard_or_filter_func, False)


def set_quantizer_attribute(
    model: nn.Module,
    wildcard_or_filter_func: str | Callable[[str], bool],
    attribute: QuantizerAttributeConfig | dict[str, Any] | list[Any],
) -> None:
    """Replace the attributes of all quantizers whose full name matches.

    Raises:
        DetentError: no quantizer matches, or the attributes are not valid.
    """
    matches = _matcher(wildcard_or_filter_func)
    names = [name for name, _ in named_quantizers(model) if matches(name)]
    if not names:
        raise DetentError(f"no quantizer matches {wildcard_or_filter_func!r}")
    for name in names:
        _set(model, name, parse_attributes(attribute))
    route_attention(model)
