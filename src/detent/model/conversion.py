"""Putting quantizers into a model, and setting them by a configuration.

Invariant: a conversion that fails leaves the model as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from detent.config.attributes import Attributes, SequentialConfig
from detent.config.matching import check_matches, match
from detent.config.quant_cfg import Rule, normalize
from detent.errors import DetentError
from detent.model.adapters import adapter_names, rules_for_adapters
from detent.model.rollback import remember, unchanged_on_failure
from detent.model.save_guard import guard_save_pretrained
from detent.nn import (
    QuantModuleRegistry,
    QuantWeightBase,
    SequentialQuantizer,
    TensorQuantizer,
    quantizers_of,
)
from detent.nn.attention import add_attention_quantizers, route_attention
from detent.nn.experts_layout import take_experts_apart
from detent.nn.instance_forward import float_forward
from detent.nn.quant_module import check_module
from detent.nn.sequential import Quantizer, members_of
from detent.nn.torch_transformer import leave_fast_path, weight_used_from_outside
from detent.nn.walk import walk
from detent.notices import notify

_log = logging.getLogger(__name__)


def named_quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """(full name, quantizer) of every quantizer; a sequence counts once. Raises DetentError for what isn't a module."""
    check_module(model)
    modules = walk(model)
    sequences = tuple(f"{n}." if n else "" for n, m in modules if isinstance(m, SequentialQuantizer))
    for name, module in modules:
        if isinstance(module, SequentialQuantizer) or (
            isinstance(module, TensorQuantizer) and not (sequences and name.startswith(sequences))
        ):
            yield name, module


def named_members(model: nn.Module) -> Iterator[TensorQuantizer]:
    """Every single quantizer, those in sequences included."""
    for _, quantizer in named_quantizers(model):
        yield from members_of(quantizer)


def is_quantized(model: nn.Module) -> bool:
    """Whether the model has quantizers, on or off."""
    return any(isinstance(m, TensorQuantizer) for m in check_module(model).modules())


def replace_quant_module(model: nn.Module, *, adapters: Collection[str] = ()) -> None:
    """Convert every registered module in place, with quantizers that are all off. What is converted already stays.

    Experts whose weights a module holds in one tensor become linear layers first. Modules that look as if they should
    be converted and can't be (a subclass of a registered class with a forward of its own, recurrent layers, experts in
    one tensor that is used in an unknown way) are named in a warning.

    Args:
        model: any module.
        adapters: names of the modules of adapters (LoRA) that are converted too; the others stay in float.

    Raises:
        DetentError: nothing in the model can be converted; the model is then as it was.

    Example:
        >>> import torch, detent
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> detent.replace_quant_module(model)
        >>> model[0].weight_quantizer
        TensorQuantizer(disabled)
    """
    with unchanged_on_failure(model):
        left = adapter_names(model) - set(adapters)
        take_experts_apart(model)
        old = {id(quantizer) for quantizer in model.modules() if isinstance(quantizer, TensorQuantizer)}
        for name, module in walk(model):
            if isinstance(module, TensorQuantizer) or type(module) not in QuantModuleRegistry or name in left:
                continue
            if not weight_used_from_outside(model, name):
                _check_initialized(name, module)
                QuantModuleRegistry.convert(module)
        add_attention_quantizers(model)
        if not any(True for _ in named_quantizers(model)):
            known = ", ".join(sorted(k.__name__ for k in QuantModuleRegistry))
            raise DetentError(
                f"{type(model).__name__} has no module that Detent can quantize (known: {known}); see detent.register()"
            )
        leave_fast_path(model)
        guard_save_pretrained(model)
        for name, quantizer in named_quantizers(model):
            quantizer.name = name
            if not any(id(member) in old for member in members_of(quantizer)):
                quantizer.disable()
    for name, why in unconverted(model):
        _log.warning("%s stays unquantized: %s", name, why)
    in_float = [name for name in left if type(model.get_submodule(name)) in QuantModuleRegistry]
    if in_float:
        notify(
            f"{len(in_float)} layers of adapters (for instance {min(in_float)}) stay in float; to quantize them, give"
            " them an entry in quant_cfg whose pattern matches nothing else"
        )


def _check_initialized(name: str, module: nn.Module) -> None:
    if any(is_lazy(p) for p in module.parameters(recurse=False)):
        raise DetentError(f"{name}: its parameters have no shape yet; run the model once before quantizing it")


def unconverted(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(name, reason) of modules with large weights that Detent leaves alone although a user may expect otherwise."""
    for name, module in walk(model):
        kind = type(module)
        base = QuantModuleRegistry.overridden(kind)
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            yield name, f"{kind.__name__} is not supported"
        elif base is not None and not _has_quantizers(module):
            yield name, f"{kind.__name__} is a {base.__name__} with its own forward; see detent.register()"
        elif _holds_experts(module):
            yield (
                name,
                f"{kind.__name__} holds the weights of several experts in one tensor, and uses it in a way that Detent"
                " doesn't know",
            )


def _has_quantizers(module: nn.Module) -> bool:
    return any(isinstance(child, (TensorQuantizer, SequentialQuantizer)) for child in module.children())


def _holds_experts(module: nn.Module) -> bool:
    parameters = list(module.parameters(recurse=False))
    return "expert" in type(module).__name__.lower() and any(p.dim() == 3 for p in parameters)


def set_quantizer_by_cfg(model: nn.Module, quant_cfg: Any, *, strict: bool = True) -> list[str]:
    """Set every quantizer of a converted model by the rules of `quant_cfg`; the last rule that matches one wins.

    Quantizers that no rule matches stay as they are, so ``{"*": {"enable": False}}`` switches everything off.

    Args:
        model: a model with quantizers.
        quant_cfg: a dict of wildcards or an ordered list of entries.
        strict: whether a rule that sets a format and matches nothing is an error (else a warning).

    Returns:
        Warnings: exclusions that match nothing and, unless strict, the errors.

    Raises:
        DetentError: a rule is malformed or matches nothing; the model has no quantizers.


    Example:
        >>> import torch, detent
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = detent.quantize(model, detent.INT8_WEIGHT_ONLY_CFG)
        >>> detent.set_quantizer_by_cfg(model, {"*weight_quantizer": {"num_bits": 4, "axis": 0}})
        []
        >>> model[0].weight_quantizer.num_bits
        4
    """
    rules = normalize(quant_cfg)
    modules = dict(walk(check_module(model)))
    names = {name: parent_classes(modules, name) for name, _ in named_quantizers(model)}
    if not names:
        raise DetentError(f"{type(model).__name__} has no quantizers; call quantize() or replace_quant_module() first")
    warnings = check_matches(rules, names, strict=strict, must_enable=False)
    adapters = adapter_names(model)
    inside = {name for name in names if name.rpartition(".")[0] in adapters}
    for_adapters = rules_for_adapters(rules, names, inside) if inside else []
    with unchanged_on_failure(model):
        for name, parents in names.items():
            _apply(modules, for_adapters if name in inside else rules, name, parents)
        settle(model)
    for warning in warnings:
        _log.warning("%s", warning)
    return warnings


def check_something_enabled(model: nn.Module, quant_cfg: Any, *, strict: bool = True) -> None:
    """Refuse (or warn of, unless strict) a configuration after which no quantizer is on, saying why none is."""
    if any(quantizer.is_enabled for _, quantizer in named_quantizers(model)):
        return
    modules = dict(walk(model))
    names = {name: parent_classes(modules, name) for name, _ in named_quantizers(model)}
    skipped = "".join(f"; {name} stays unquantized: {why}" for name, why in list(unconverted(model))[:3])
    try:
        messages = check_matches(normalize(quant_cfg), names, strict=strict)
    except DetentError as error:
        raise DetentError(f"{error}{skipped}") from None
    for message in messages:
        _log.warning("%s%s", message, skipped)


def _apply(modules: Mapping[str, nn.Module], rules: list[Rule], name: str, parents: set[str]) -> None:
    before = attributes_of(modules[name])
    attributes = match(rules, name, parents, before)
    if attributes is not None and attributes != before:
        _set_in(modules[name.rpartition(".")[0]], name, attributes)


def attributes_of(quantizer: nn.Module) -> Attributes:
    """What a quantizer is set to now."""
    if isinstance(quantizer, SequentialQuantizer):
        return SequentialConfig([attributes_of(q) for q in quantizer])
    assert isinstance(quantizer, TensorQuantizer)
    return quantizer.attributes


def parent_classes(modules: Mapping[str, nn.Module], quantizer_name: str) -> set[str]:
    return QuantModuleRegistry.names_of(modules[quantizer_name.rpartition(".")[0]])


def set_attributes(model: nn.Module, name: str, attributes: Attributes) -> None:
    """Give one quantizer its attributes, changing between single and sequence where needed."""
    _set_in(model.get_submodule(name.rpartition(".")[0]), name, attributes)


def _set_in(parent: nn.Module, name: str, attributes: Attributes) -> None:
    leaf = name.rpartition(".")[2]
    quantizer = getattr(parent, leaf)
    steps = attributes if isinstance(attributes, SequentialConfig) else [attributes]
    if not all(step.fake_quant or not step.enable for step in steps):
        _check_codes_allowed(name, parent, leaf, len(steps))
    token_axis = members_of(quantizer)[0].token_axis
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
    for member in members_of(quantizer):
        member.token_axis = token_axis
    quantizer.name = name
    if quantizer.training != parent.training:
        quantizer.train(parent.training)


def _check_codes_allowed(name: str, parent: nn.Module, leaf: str, steps: int) -> None:
    if leaf != "weight_quantizer" or not isinstance(parent, QuantWeightBase) or steps > 1:
        raise DetentError(
            f"{name}: fake_quant=False returns codes, which only a single weight quantizer of a built-in module can do;"
            " use fake_quant=True here"
        )


@contextmanager
def set_quantizer_by_cfg_context(model: nn.Module, quant_cfg: Any) -> Iterator[None]:
    """Set quantizers inside the ``with`` block; afterwards every one has its attributes and calibrated state back.

    Example:
        >>> import torch, detent
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = detent.quantize(model, detent.INT8_WEIGHT_ONLY_CFG)
        >>> with detent.set_quantizer_by_cfg_context(model, {"*": {"enable": False}}):
        ...     model[0].weight_quantizer.is_enabled
        False
        >>> model[0].weight_quantizer.is_enabled
        True
    """
    quantizers = dict(named_quantizers(model))
    before = remember(module for quantizer in quantizers.values() for module in quantizer.modules())
    try:
        set_quantizer_by_cfg(model, quant_cfg)
        yield
    finally:
        for name, quantizer in quantizers.items():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, quantizer)
        for memory in before:
            memory.restore()
        route_attention(model)


def settle(model: nn.Module) -> None:
    """What must follow every change of which quantizers are on."""
    for name, module in walk(model):
        front = float_forward(module)
        on = [child for child, quantizer in quantizers_of(module) if quantizer.is_enabled] if front else []
        if on:
            raise DetentError(
                f"{name}: its forward was replaced on the instance (by {front}) and would go on computing in float, so"
                f" {on[0]} can't be on; quantize before replacing it, define a class for it (see detent.register()), or"
                " switch the module's quantizers off"
            )
    route_attention(model)
