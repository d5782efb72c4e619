"""Adapters (LoRA and the like) alongside the layers that they adapt.

They are found by structure: peft wraps a layer into a module that holds it as ``base_layer``, and whatever else that
module holds (``lora_A.default``, ``lora_B.default``) belongs to the adapter. Adapters are small and are trained, so
they stay in float unless a rule names them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn

from detent.config.matching import matches
from detent.config.quant_cfg import Rule
from detent.nn import QuantModule, QuantModuleRegistry
from detent.nn.walk import walk

_BASE = "base_layer"
#: What the quantizers of a layer will be called.
_QUANTIZERS = ("weight_quantizer", "input_quantizer", "output_quantizer")


def adapter_names(model: nn.Module) -> set[str]:
    """Names of the modules that adapters are made of."""
    found = set()
    for name, module in walk(model):
        if module._modules.get(_BASE) is not None:
            inside = {child for child, _ in module.named_modules() if child}
            inside -= {child for child in inside if child == _BASE or child.startswith(f"{_BASE}.")}
            found |= {f"{name}.{child}".removeprefix(".") for child in inside}
    return found


def asked_for(model: nn.Module, rules: Iterable[Rule], adapters: Collection[str]) -> set[str]:
    """Those of the adapters' modules that a rule asks to be quantized."""
    if not adapters:
        return set()
    layers = {
        name: QuantModuleRegistry.names_of(module)
        for name, module in model.named_modules()
        if type(module) in QuantModuleRegistry or isinstance(module, QuantModule)
    }
    quantizers = {f"{name}.{leaf}": classes for name, classes in layers.items() for leaf in _QUANTIZERS}
    inside = {name: classes for name, classes in quantizers.items() if name.rpartition(".")[0] in adapters}
    own = rules_for_adapters(rules, quantizers, inside)
    return {
        name.rpartition(".")[0]
        for name, classes in inside.items()
        if any(rule.enables and matches(rule, name, classes) for rule in own)
    }


def rules_for_adapters(rules: Iterable[Rule], quantizers: dict[str, set[str]], inside: Collection[str]) -> list[Rule]:
    """The rules that hold for adapters: those that enable nothing else, and those that only switch off.

    Args:
        rules: of the configuration.
        quantizers: {name of a quantizer: class names of its module}, of the whole model.
        inside: names of those that belong to adapters.
    """

    def reaches_others(rule: Rule) -> bool:
        return any(name not in inside and matches(rule, name, classes) for name, classes in quantizers.items())

    return [rule for rule in rules if not rule.enables or not reaches_others(rule)]
