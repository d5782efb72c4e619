"""From a checkpoint folder to a quantized one: simulate in the model, write what was simulated, read it back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detent.algorithms.outcome import Outcome
from detent.checkpoints import (
    Activation,
    LayerCheckpoint,
    QuantizedCheckpoint,
    QuantizedWriter,
    Source,
    open_quantized,
)
from detent.engine.conversion import replace_quant_module, set_quantizer_attribute
from detent.engine.data_loop import ForwardLoop
from detent.engine.folding import Folding
from detent.engine.layers import outcomes
from detent.engine.models import load_config, load_model, model_dtype, read_weights
from detent.engine.online import attach_online, with_online, with_online_formats
from detent.engine.plan import Plan, exported_format
from detent.engine.quantization import quantize
from detent.errors import DetentError
from detent.formats import FloatScale, QTensor, Scales, decode
from detent.nn import QuantWeightBase, TensorQuantizer
from detent.nn.attention import attention_modules, route_attention
from detent.progress import track
from detent.structure import find_structure, linears_sharing_input

_log = logging.getLogger(__name__)

#: Bytes in a file of weights: small enough that progress shows while they are written.
SHARD_SIZE = 1_000_000_000


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


@dataclass(frozen=True)
class Simulation:
    """A model quantized by its plan.

    Attributes:
        layers: by name, with codes, scales and errors.
        changed: names of other parameters that algorithms gave new values.
    """

    layers: dict[str, SimulatedLayer]
    changed: set[str]


def simulate(model: nn.Module, plan: Plan, forward_loop: ForwardLoop | None) -> Simulation:
    """Quantize a loaded model by its plan; afterwards its weights hold exactly what their codes decode to.

    Args:
        model: the float model; changed in place.
        plan: from `make_plan`.
        forward_loop: runs calibration data, where `plan.needs_data`.

    Raises:
        DetentError: NaN or infinity in a weight or an activation; data is needed and missing; an algorithm can't serve
            a format.
    """
    groups = _groups_with_common_scale(model, plan)
    folding = Folding(model, find_structure(model)) if plan.algorithms else None
    config = {"quant_cfg": plan.quant_cfg, "algorithm": plan.algorithms or "max"}
    quantize(model, config, forward_loop, folding=folding)
    for names in groups:
        _share_outer_scale(model, names)
    layers = {}
    for name in track(plan.formats.layers, "Quantizing weights", len(plan.formats.layers)):
        module = model.get_submodule(name)
        assert isinstance(module, QuantWeightBase)
        layers[name] = _simulate_layer(name, module, plan)
    return Simulation(layers, set() if folding is None else folding.changed)


def _groups_with_common_scale(model: nn.Module, plan: Plan) -> list[list[str]]:
    """Layers that engines fuse, where a scale covers a whole matrix (NVFP4) and so has to be common."""
    if not any(f.weight is not None and _has_outer(f.weight) for f in plan.formats.layers.values()):
        return []
    device = next(model.parameters()).device
    ids = torch.ones(1, 2, dtype=torch.long, device=device)
    groups = linears_sharing_input(model, lambda m: m(input_ids=ids))
    return [[n for n in names if n in plan.formats.layers] for names in groups]


def _has_outer(fmt: Any) -> bool:
    return isinstance(fmt.scale, FloatScale) and fmt.scale.outer


def _share_outer_scale(model: nn.Module, names: list[str]) -> None:
    quantizers: list[Any] = [model.get_submodule(name).weight_quantizer for name in names]
    amaxes = [q.global_amax for q in quantizers if q.global_amax is not None]
    if len(amaxes) > 1:
        largest = torch.stack(amaxes).amax()
        for quantizer in quantizers:
            quantizer.global_amax = largest


@torch.no_grad()
def _simulate_layer(name: str, module: QuantWeightBase, plan: Plan) -> SimulatedLayer:
    formats = plan.formats.layers[name]
    packed, error = None, None
    if formats.weight is not None:
        quantizer = module.weight_quantizer
        assert isinstance(quantizer, TensorQuantizer)
        weight = module.weight.detach()
        if bool((weight == 0).all()):
            packed, error = quantizer.quantize_to_codes(weight), 0.0
        else:
            packed = quantizer.quantize_to_codes(weight)
            difference = decode(packed).sub_(weight.float())
            error = float(difference.double().norm() / weight.double().norm())
        _fold(module, decode(packed, weight.dtype))
    record = LayerCheckpoint(
        name=name,
        shape=formats.shape,
        weight=None if packed is None else packed.to("cpu"),
        input=_activation(module, "input"),
        output=_activation(module, "output"),
        kind=formats.kind,
    )
    return SimulatedLayer(with_online(record, module), error, list(outcomes(module)))


def _fold(module: QuantWeightBase, values: Tensor) -> None:
    """Put the simulated values in the weight's place. A tied weight gets memory of its own: its twin stays as it is."""
    module.refresh_weight()
    module._parameters["weight"] = nn.Parameter(values, requires_grad=False)
    module.weight_quantizer.disable()


def _activation(module: nn.Module, side: str) -> Activation | None:
    quantizer = getattr(module, f"{side}_quantizer", None)
    if not isinstance(quantizer, TensorQuantizer) or not quantizer.is_enabled:
        return None
    fmt = exported_format(quantizer.format)
    return Activation(fmt, None if fmt.dynamic else stored_scales(quantizer))


def stored_scales(quantizer: TensorQuantizer) -> Scales:
    """The calibrated scales of an activation, on the CPU."""
    scales = quantizer.scales()
    if scales is None:
        outer = quantizer.outer_scale()
        if outer is None:
            raise DetentError(f"{quantizer.name}: not calibrated, so there is no scale to write")
        scales = Scales(torch.empty(0, dtype=quantizer.format.scale.stored_dtype), None, outer)
    move = [None if t is None else t.detach().cpu() for t in (scales.scale, scales.zero_point, scales.outer_scale)]
    return Scales(*move)  # type: ignore[arg-type]


def kv_scales(model: nn.Module) -> dict[str, tuple[Scales, Scales]]:
    """Calibrated (key, value) scales by attention module; none for dynamic formats."""
    found = {}
    for name, module in attention_modules(model):
        key, value = getattr(module, "k_bmm_quantizer", None), getattr(module, "v_bmm_quantizer", None)
        if not (isinstance(key, TensorQuantizer) and isinstance(value, TensorQuantizer) and key.is_enabled):
            continue
        if not exported_format(key.format).dynamic:
            found[name] = (stored_scales(key), stored_scales(value))
    return found


def floor_kv_scales(model: nn.Module, minimum: float) -> None:
    """Raise calibrated key and value ranges until no scale lies below `minimum`, keys and values of a block alike."""
    for _, module in attention_modules(model):
        for name in ("k_bmm_quantizer", "v_bmm_quantizer"):
            quantizer = getattr(module, name, None)
            if isinstance(quantizer, TensorQuantizer) and quantizer.is_enabled and quantizer.amax is not None:
                rule = quantizer.format.scale
                assert isinstance(rule, FloatScale)
                least = minimum * rule.divisor(quantizer.format.element)
                quantizer.amax = quantizer.amax.clamp_min(least)


def write(
    out_dir: Path,
    source: Source,
    plan: Plan,
    model: nn.Module,
    simulation: Simulation,
    *,
    dtype: torch.dtype,
    convert: bool = False,
    overwrite: bool = False,
    complete: Callable[[Path, int], None] = lambda folder, size: None,
) -> None:
    """Write the simulated model as a checkpoint, whole or not at all, and compare what is read back.

    Args:
        out_dir: the folder to appear.
        source: the original checkpoint; tensors that aren't quantized are copied from it.
        plan, model, simulation: as planned and simulated.
        dtype: the dtype that the model was held in, which config.json then names.
        convert: write tensors that stay in the dtype that the model held them in; else as they are in `source`.
        overwrite: replace a folder that Detent wrote.
        complete: called with the folder, under its temporary name, and the bytes of its tensors, once it was written
            and read back; may add to it.

    Raises:
        DetentError: the folder can't be written, or what is read back differs from what was simulated.
    """
    scales, layers = kv_scales(model), simulation.layers
    config = {key: value for key, value in source.config.items() if key not in ("torch_dtype", "dtype")}
    config["dtype"] = str(dtype).removeprefix("torch.")
    if plan.unties or _was_untied(model, config):
        config["tie_word_embeddings"] = False
    source.config = config
    held = {name: p.dtype for name, p in model.named_parameters()} if convert else {}
    changed = {
        name: model.get_parameter(name) for name in simulation.changed if name.removesuffix(".weight") not in layers
    }
    kept = [*plan.kept, *sorted(changed.keys() - plan.kept.keys())]

    def check(folder: Path) -> None:
        verify(folder, layers, scales)
        complete(folder, open_quantized(folder).source.nbytes)

    formats = with_online_formats(plan.formats, [layer.record for layer in layers.values()], model)
    with QuantizedWriter(
        out_dir, source=source, formats=formats, overwrite=overwrite, max_shard_size=SHARD_SIZE
    ) as writer:
        for name in track([*layers, *kept], "Writing", len(layers) + len(kept)):
            if name in layers:
                writer.add_layer(layers[name].record)
            elif name in changed:
                writer.add_tensor(name, changed[name].detach().cpu())
            else:
                tensor = source.tensor(name)
                writer.add_tensor(name, tensor.to(held.get(name, tensor.dtype)))
        for module, (key, value) in scales.items():
            writer.add_kv(module, key, value)
        writer.finish(check=check)


def _was_untied(model: nn.Module, config: dict[str, Any]) -> bool:
    """Whether an algorithm gave the output embedding a tensor of its own."""
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", True)
    return bool(config.get("tie_word_embeddings", True)) and not tied


def verify(folder: Path, layers: dict[str, SimulatedLayer], kv: dict[str, tuple[Scales, Scales]]) -> None:
    """Read a written checkpoint and compare it with the simulation, bit for bit.

    Raises:
        DetentError: a weight, a scale or a format differs.
    """
    checkpoint = open_quantized(folder)
    for name, layer in track(layers.items(), "Reading back", len(layers)):
        read = checkpoint.layer(name)
        if read.formats != layer.record.formats:
            raise DetentError(f"{name}: read back as {read.formats}, but {layer.record.formats} was simulated")
        if layer.record.weight is not None and read.weight is not None:
            _same_weight(name, layer.record.weight, read.weight)
        for side in ("input", "output"):
            ours, theirs = getattr(layer.record, side), getattr(read, side)
            if ours is not None and ours.scales is not None:
                _same_scales(f"{name} {side}", ours.scales, theirs.scales)
    read_kv = checkpoint.kv_scales()
    for module, pair in kv.items():
        for which, ours, theirs in zip(("key", "value"), pair, read_kv[module], strict=True):
            _same_scales(f"{module} {which}", ours, theirs)


def _same_weight(name: str, simulated: QTensor, read: QTensor) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        if not torch.equal(decode(simulated, dtype), decode(read, dtype)):
            raise DetentError(f"{name}: the weight read back differs from the one that was simulated")


def _same_scales(name: str, simulated: Scales, read: Scales) -> None:
    for ours, theirs in zip(vars(simulated).values(), vars(read).values(), strict=True):
        if (ours is None) != (theirs is None) or (ours is not None and not _identical(ours, theirs)):
            raise DetentError(f"{name}: the scale read back differs from the calibrated one")


def _identical(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits, whatever their shapes."""
    return a.dtype == b.dtype and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def load_quantized(
    folder: Path,
    *,
    data_type: str = "auto",
    device: str = "cpu",
    attention: str | None = None,
    trust_remote_code: bool = False,
    notify: Callable[[str], None] = _log.warning,
) -> nn.Module:
    """The simulated model of a quantized checkpoint: weights decoded, activations and cache quantized as calibrated.

    Args:
        folder: a checkpoint in a layout that Detent reads.
        data_type: the dtype to hold it in: a key of `models.DTYPES`, or ``auto`` for what config.json says.
        device, attention, trust_remote_code, notify: as for `load_model`.

    Raises:
        DetentError: the checkpoint isn't readable or doesn't fit its model.
    """
    checkpoint = open_quantized(folder)
    source = checkpoint.source
    config = load_config(folder, trust_remote_code=trust_remote_code, values=checkpoint.config)
    dtype = model_dtype(data_type, config, source)
    state = read_weights(source, checkpoint.kept)
    records = {}
    for name in track(checkpoint.formats.layers, "Decoding weights", len(checkpoint.formats.layers)):
        record = checkpoint.layer(name)
        if record.weight is not None:
            state[f"{name}.weight"] = decode(record.weight, dtype)
        records[name] = record
    model = load_model(
        source,
        config,
        dtype=dtype,
        device=device,
        attention=attention,
        trust_remote_code=trust_remote_code,
        state_dict=state,
        notify=notify,
    )
    _attach(model, checkpoint, records)
    return model


def _attach(model: nn.Module, checkpoint: QuantizedCheckpoint, records: dict[str, LayerCheckpoint]) -> None:
    """Put the activation quantizers of a checkpoint into a model of decoded weights."""
    replace_quant_module(model)
    for name, record in records.items():
        for side in ("input", "output"):
            activation = getattr(record, side)
            if activation is not None:
                _set_activation(model, f"{name}.{side}_quantizer", activation)
    attach_online(model, checkpoint.formats, records.values())
    kv = checkpoint.formats.kv_cache
    if kv is not None:
        scales = checkpoint.kv_scales()
        for name, _ in attention_modules(model):
            for index, which in enumerate(("k_bmm_quantizer", "v_bmm_quantizer")):
                calibrated = None if kv.dynamic else scales[name][index]
                _set_activation(model, f"{name}.{which}", Activation(kv, calibrated))
    route_attention(model)


def _set_activation(model: nn.Module, quantizer_name: str, activation: Activation) -> None:
    fmt = activation.format
    blocks_anew = activation.scales is not None and activation.scales.scale.numel() == 0
    set_quantizer_attribute(
        model, lambda name: name == quantizer_name, {"format": fmt.as_dynamic() if blocks_anew else fmt}
    )
    quantizer = model.get_submodule(quantizer_name)
    assert isinstance(quantizer, TensorQuantizer)
    if activation.scales is not None:
        device = next(model.parameters()).device
        move = [None if t is None else t.to(device) for t in vars(activation.scales).values()]
        quantizer.load_scales(Scales(*move))  # type: ignore[arg-type]
