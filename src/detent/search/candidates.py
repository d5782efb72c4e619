"""A model whose layers can be switched between everything that they may become.

Invariant: switching a layer back to floating point gives it the tensors that it had, not copies of them; what
calibration made of a layer under an option is kept beside it, and only the tensors that it changed take memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from detent.algorithms.weight_ranges import weight_quantizers
from detent.config.attributes import Attributes
from detent.engine import calibration
from detent.engine.data_loop import DataLoop
from detent.errors import DetentError
from detent.model.conversion import attributes_of, named_quantizers, set_attributes, set_quantizer_by_cfg, settle
from detent.model.rollback import ModuleMemory, remember
from detent.nn import QuantWeightBase, TensorQuantizer, quantizers_of
from detent.nn.low_rank import low_rank_of
from detent.nn.sequential import Quantizer, members_of
from detent.notices import notify
from detent.search.options import NONE, Option
from detent.structure import Structure


@dataclass
class Candidate:
    """A layer, and what it may become.

    Attributes:
        name: of its module.
        elements: {weight: number of its elements}, of weights that some option quantizes.
        float_bits: of one element as it is.
        settings: {option: {quantizer: attributes}}, for options that quantize it.
        bits: {option: what its weights take}, floating point included.
    """

    name: str
    elements: dict[str, int] = field(default_factory=dict)
    float_bits: int = 16
    settings: dict[str, dict[str, Attributes]] = field(default_factory=dict)
    bits: dict[str, float] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return sum(self.elements.values())


def find_candidates(model: nn.Module, options: Sequence[Option]) -> dict[str, Candidate]:
    """Every layer of a converted model that some option quantizes; afterwards all quantizers are off.

    Raises:
        DetentError: an option has a pattern that matches nothing, or quantizes nothing.
    """
    found: dict[str, Candidate] = {}
    quantized: dict[tuple[str, str], dict[str, float]] = {}
    elsewhere: list[str] = []
    for option in (option for option in options if option.config is not None):
        assert option.config is not None
        switch_off(model)
        set_quantizer_by_cfg(model, option.config.quant_cfg)
        weights = {name: (q, weight) for name, q, weight in weight_quantizers(model)}
        for name, (quantizer, weight) in weights.items():
            owner, _, attribute = name.rpartition(".")
            candidate = found.setdefault(owner, Candidate(owner))
            candidate.elements[attribute] = weight.numel()
            candidate.float_bits = weight.element_size() * 8
            quantized.setdefault((owner, option.name), {})[attribute] = weight_bits(quantizer, weight)
        if not weights:
            raise DetentError(f"{option.name} quantizes no weight of {type(model).__name__}")
        owners = {name.rpartition(".")[0] for name in weights}
        for name, quantizer in named_quantizers(model):
            owner, _, leaf = name.rpartition(".")
            if quantizer.is_enabled and owner in owners:
                found[owner].settings.setdefault(option.name, {})[leaf] = attributes_of(quantizer)
            elif quantizer.is_enabled:
                elsewhere.append(name)
    switch_off(model)
    if elsewhere:
        notify(
            f"{len(elsewhere)} quantizers that belong to no weight, such as {elsewhere[0]}, are not searched and stay"
            " off"
        )
    for candidate in found.values():
        for option in options:
            parts = quantized.get((candidate.name, option.name), {})
            candidate.bits[option.name] = math.fsum(
                parts.get(weight, count * candidate.float_bits) for weight, count in candidate.elements.items()
            )
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))


def switch_off(model: nn.Module) -> None:
    """Every quantizer off."""
    for _, quantizer in named_quantizers(model):
        quantizer.disable()


def weight_bits(quantizer: Quantizer, weight: Tensor) -> float:
    """What a weight [out, ...] takes under its quantizer, in bits: codes, scales, zero points.

    Of several quantizers in sequence the first has the codes, and each of the others a scale.
    """
    first, *others = members_of(quantizer)
    shape = tuple(weight.shape)
    own = first.attributes.effective_bits
    each = first.format.bits_per_element(shape) if own is None else own
    return each * weight.numel() + 32 * len(others)


def _extra_bits(module: nn.Module) -> float:
    """What calibration has added to a layer: a low-rank branch, a scale for each channel of its input."""
    added = list(low_rank_of(module) or ())
    quantizer = getattr(module, "input_quantizer", None)
    if isinstance(quantizer, TensorQuantizer) and quantizer.pre_quant_scale is not None:
        added.append(quantizer.pre_quant_scale)
    return float(sum(tensor.numel() * tensor.element_size() * 8 for tensor in added))


class Switch:
    """The layers of a model at work.

    Args:
        model: converted, in eval mode, its quantizers off.
        candidates: from `find_candidates`.
    """

    def __init__(self, model: nn.Module, candidates: Mapping[str, Candidate]) -> None:
        self.model, self._candidates = model, candidates
        self._held: dict[tuple[str, str], list[ModuleMemory]] = {}
        for name in candidates:
            self._keep(name, NONE)

    def calibrate(
        self, option: Option, layers: Sequence[str], loop: DataLoop | None, structure: Structure | None
    ) -> None:
        """Calibrate layers under an option, by its own algorithm; afterwards they are in floating point again.

        Raises:
            DetentError: as `detent.calibrate` does.
        """
        settings = {name: self._candidates[name].settings.get(option.name, {}) for name in layers}
        for name, quantizers in settings.items():
            for leaf, attributes in quantizers.items():
                set_attributes(self.model, f"{name}.{leaf}", attributes)
        settle(self.model)
        calibration.run(self.model, option.algorithm, loop, structure=structure)
        for name in settings:
            module = self.model.get_submodule(name)
            self._candidates[name].bits[option.name] += _extra_bits(module)
            self._keep(name, option.name)
        self.put(dict.fromkeys(settings, NONE))

    def put(self, choice: Mapping[str, str]) -> None:
        """Switch layers: {name: option}."""
        for name, option in choice.items():
            for memory in self._held[name, option]:
                memory.restore()

    @contextmanager
    def switched(self, choice: Mapping[str, str]) -> Iterator[None]:
        """The same for a while; afterwards they are in floating point."""
        self.put(choice)
        try:
            yield
        finally:
            self.put(dict.fromkeys(choice, NONE))

    def _keep(self, name: str, option: str) -> None:
        module = self.model.get_submodule(name)
        if isinstance(module, QuantWeightBase):
            module.refresh_weight()
        quantizers = [inner for _, quantizer in quantizers_of(module) for inner in quantizer.modules()]
        self._held[name, option] = remember([module, *quantizers])
