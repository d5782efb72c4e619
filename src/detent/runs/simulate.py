"""A loaded model quantized by its plan, and what is known of each layer then."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from detent.algorithms.modes import ForwardLoop
from detent.algorithms.outcome import Outcome
from detent.checkpoints import Activation, LayerCheckpoint, ModelFormats
from detent.checkpoints.records import exported_format
from detent.config import QuantizeConfig
from detent.engine import quantization
from detent.formats import QTensor, Scales, decode
from detent.model import edit
from detent.model.kv_cache import floor_kv_scales, kv_scales, stored_scales
from detent.nn import QuantWeightBase, TensorQuantizer
from detent.plan.plan import Plan
from detent.progress import track
from detent.runs.online import with_online, with_online_formats

#: Elements of a weight whose error is measured at once, and in all: its sampling error is then below a percent of it.
PIECE, MEASURED = 1 << 15, 1 << 18


@dataclass(frozen=True)
class SimulatedLayer:
    """One layer as it was simulated.

    Attributes:
        record: what will be written.
        relative_error: ``norm(W - W^) / norm(W)`` of its weight (0 for a weight of zeros), None if only activations are
            quantized.
    """

    record: LayerCheckpoint
    relative_error: float | None
    outcomes: list[Outcome] = field(default_factory=list)


class Quantized(Protocol):
    """A model or checkpoint quantized by its plan, as the writer takes it."""

    @property
    def formats(self) -> ModelFormats:
        """Of everything, with what transforms left for run time."""
        ...

    @property
    def values(self) -> Mapping[str, Tensor]:
        """Other parameters that have new values, by their names in the model."""
        ...

    @property
    def kv(self) -> Mapping[str, tuple[Scales, ...]]:
        """The calibrated scales of keys and values, by attention module."""
        ...

    @property
    def untied(self) -> bool:
        """Whether the output embedding has a tensor of its own now."""
        ...

    def layer(self, name: str, *, measured: bool = True) -> SimulatedLayer:
        """One of the layers of `formats`; `measured`: whether the error of its weight is wanted."""
        ...


@dataclass(frozen=True)
class Simulation:
    """A model in memory quantized by its plan: a `Quantized`."""

    layers: dict[str, SimulatedLayer]
    formats: ModelFormats
    values: Mapping[str, Tensor]
    kv: Mapping[str, tuple[Scales, ...]]
    untied: bool

    def layer(self, name: str, *, measured: bool = True) -> SimulatedLayer:
        return self.layers[name]


def simulate(
    model: nn.Module, plan: Plan, forward_loop: ForwardLoop | None, *, min_kv_scale: float = 0.0
) -> Simulation:
    """Quantize a loaded model by its plan; afterwards its weights hold exactly what their codes decode to.

    Args:
        model: the float model; changed in place.
        plan: from `make_plan`.
        forward_loop: runs calibration data, where `plan.needs_data`.
        min_kv_scale: the least scale of keys and values.

    Raises:
        DetentError: NaN or infinity in a weight or an activation; data is needed and missing; an algorithm can't serve
            a format.
    """
    config = QuantizeConfig(quant_cfg=plan.quant_cfg, algorithm=plan.algorithms or "max")
    done = quantization.run(model, config, forward_loop, structure=plan.structure, fold="auto")
    share_outer_scales(model, plan.groups_with_common_scale)
    layers = {}
    for name in track(plan.formats.layers, "Quantizing weights", len(plan.formats.layers)):
        module = model.get_submodule(name)
        assert isinstance(module, QuantWeightBase)
        layers[name] = _simulate_layer(name, module, plan, done.outcomes.get(name, []), done.errors.get(name))
    if plan.formats.kv_cache is not None:
        floor_kv_scales(model, min_kv_scale)
    records = [layer.record for layer in layers.values()]
    weights = {f"{record.name}.weight" for record in records if record.weight is not None}
    return Simulation(
        layers,
        with_online_formats(plan.formats, records, model),
        {name: model.get_parameter(name).detach() for name in sorted(done.changed - weights)},
        kv_scales(model),
        not getattr(getattr(model, "config", None), "tie_word_embeddings", True),
    )


def share_outer_scales(model: nn.Module, groups: Sequence[Sequence[str]]) -> None:
    """Give the layers of each group the largest outer scale of any of them."""
    for names in groups:
        quantizers: list[Any] = [model.get_submodule(name).weight_quantizer for name in names]
        amaxes = [q.global_amax for q in quantizers if q.global_amax is not None]
        if len(amaxes) > 1:
            largest = torch.stack(amaxes).amax()
            for quantizer in quantizers:
                quantizer.global_amax = largest


@torch.no_grad()
def _simulate_layer(
    name: str, module: QuantWeightBase, plan: Plan, outcomes: list[Outcome], error: float | None
) -> SimulatedLayer:
    if plan.formats.layers[name].weight is None:
        return layer_as_quantized(name, module, plan, None)
    weight = module.to_output_first(module.weight.detach(), module).contiguous()
    simulated = layer_as_quantized(name, module, plan, weight, outcomes, error)
    assert simulated.record.weight is not None
    # A tied weight gets memory of its own, so that its twin doesn't change: unless it is what the file has for both.
    value = module.from_output_first(decode(simulated.record.weight, weight.dtype).to(weight.device), module)
    edit.put(module, "weight", value, name, untie=not isinstance(module, nn.Embedding))
    module.weight_quantizer.disable()
    return simulated


def layer_as_quantized(
    name: str,
    module: QuantWeightBase,
    plan: Plan,
    weight: Tensor | None,
    outcomes: Sequence[Outcome] = (),
    error: float | None = None,
    *,
    measured: bool = True,
) -> SimulatedLayer:
    """A layer as its calibrated quantizers have it.

    Args:
        name, module, plan: the layer, in the model or the plan's skeleton.
        weight: what its weight quantizer rounds; None if it doesn't.
        outcomes: what algorithms did to it.
        error: of its weight, where an algorithm has rounded that already.
        measured: whether the error of the weight is wanted.
    """
    formats = plan.formats.layers[name]
    packed = None
    if weight is not None:
        quantizer = module.weight_quantizer
        assert isinstance(quantizer, TensorQuantizer)
        packed = quantizer.quantize_to_codes(weight)
        error = relative_error(packed, weight) if measured and error is None else error
    record = LayerCheckpoint(
        name=name,
        shape=formats.shape,
        weight=None if packed is None else packed.to("cpu"),
        input=_activation(module, "input"),
        output=_activation(module, "output"),
        kind=formats.kind,
    )
    return SimulatedLayer(with_online(record, module), error, list(outcomes))


def relative_error(packed: QTensor, weight: Tensor) -> float:
    """``norm(W - W^) / norm(W)`` in the Frobenius norm; 0 for a weight of zeros.

    A few rows at a time, so that they fit the processor's cache. Of a weight with more than `MEASURED` elements about
    `MEASURED` are measured, in rows spread evenly over it.
    """
    tall = packed.format.granularity.lengths(packed.shape)[0] if packed.format.granularity.kind != "per_tensor" else 1
    step = tall * max(1, PIECE * len(weight) // max(1, weight.numel() * tall))
    starts = range(0, len(weight), step)
    spread = starts[:: max(1, -(-weight.numel() // MEASURED))]
    wrong = total = 0.0
    for start in spread:
        rows = weight[start : start + step].float().flatten()
        total += float(torch.dot(rows, rows))
        difference = decode(packed.rows(start, start + step)).flatten().sub_(rows)
        wrong += float(torch.dot(difference, difference))
    return math.sqrt(wrong / total) if total else 0.0


def _activation(module: nn.Module, side: str) -> Activation | None:
    quantizer = getattr(module, f"{side}_quantizer", None)
    if not isinstance(quantizer, TensorQuantizer) or not quantizer.is_enabled:
        return None
    fmt = exported_format(quantizer.format)
    return Activation(fmt, None if fmt.dynamic else stored_scales(quantizer))
