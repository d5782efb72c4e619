"""From a quantized checkpoint to a simulated model."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detent.checkpoints import Activation, LayerCheckpoint, ModelFormats, Source, open_quantized
from detent.checkpoints.records import ATTENTION_SIDES
from detent.config import QuantizerAttributeConfig
from detent.errors import DetentError
from detent.formats import QTensor, Scales, decode
from detent.model.attributes import set_quantizer_attribute
from detent.model.conversion import replace_quant_module
from detent.model.skeleton import StreamedWeights, model_without_weights
from detent.nn import TensorQuantizer
from detent.nn.attention import attention_modules, route_attention
from detent.nn.own_linear import TRANSPOSED
from detent.pretrained.facts import is_beside, is_multimodal, outside_language
from detent.pretrained.loading import check_runs, load_config, model_dtype, read_tensor
from detent.pretrained.names import CheckpointNames
from detent.runs.online import attach_online

_log = logging.getLogger(__name__)


def load_quantized(
    folder: Path,
    *,
    data_type: str = "auto",
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    attention: str | None = None,
    trust_remote_code: bool = False,
    notify: Callable[[str], None] = _log.warning,
    config: Any = None,
    cut: bool = True,
    decoded: Callable[[str, QTensor, torch.dtype], Tensor] | None = None,
    hold_codes: bool = False,
) -> nn.Module:
    """The simulated model of a quantized checkpoint: weights decoded, activations and cache quantized as calibrated.

    Args:
        folder: a checkpoint in a layout that Detent reads.
        data_type: the dtype to hold it in: a key of `DTYPES`, or ``auto`` for what config.json says.
        dtype: the same, where it is known.
        device, attention, trust_remote_code, notify: as for `load_model`.
        config: a transformers configuration in place of the folder's; `cut`: it is that of a model with fewer blocks.
        decoded: gives the decoded weight of a layer, by its name in the file; `decode` by default.
        hold_codes: whether layers hold the codes of their weights in the end, and decode them when they are used.

    Raises:
        DetentError: the checkpoint isn't readable or doesn't fit its model.
    """
    checkpoint = open_quantized(folder)
    cut = cut and config is not None
    config = config or load_config(folder, trust_remote_code=trust_remote_code)
    stored = Stored(
        checkpoint.source, checkpoint.formats, checkpoint.kept, checkpoint.layer, checkpoint.tensor, decoded
    )
    return simulated_model(
        stored,
        config,
        checkpoint.kv_scales,
        cut=cut,
        hold_codes=hold_codes,
        dtype=dtype or model_dtype(data_type, config, checkpoint.source),
        device=device,
        attention=attention,
        trust_remote_code=trust_remote_code,
        notify=notify,
    )


@dataclass(frozen=True)
class Stored:
    """What a simulated model is made of; names are those in the file.

    Attributes:
        source: for messages: where it comes from.
        formats: of the layers.
        kept: the tensors that aren't quantized.
        layer: gives the contents of a layer.
        tensor: gives a tensor that isn't quantized.
        decoded: see `load_quantized`.
    """

    source: Source
    formats: ModelFormats
    kept: Sequence[str]
    layer: Callable[[str], LayerCheckpoint]
    tensor: Callable[[str], Tensor]
    decoded: Callable[[str, QTensor, torch.dtype], Tensor] | None = None


def simulated_model(
    stored: Stored,
    config: Any,
    kv_scales: Callable[[], Mapping[str, tuple[Scales, ...]]],
    *,
    cut: bool = False,
    hold_codes: bool = False,
    dtype: torch.dtype,
    **options: Any,
) -> nn.Module:
    """A model whose weights are decoded and whose activations and cache are quantized as calibrated.

    Args:
        stored: what it is made of.
        config: its transformers configuration.
        kv_scales: gives the calibrated scales of keys and values.
        cut: whether `config` describes fewer blocks than are stored; what it has no place for is left out.
        hold_codes: see `load_quantized`.
        dtype: to hold it in.
        options: as for `load_model`.

    Raises:
        DetentError: a layer is stored that the model doesn't have, or the other way round.
    """
    where, layers = stored.source.path, stored.formats.layers
    remote = {"attention": options.get("attention"), "trust_remote_code": options.get("trust_remote_code", False)}
    model = model_without_weights(stored.source, config, dtype=dtype, **remote)
    names = CheckpointNames(model, [*dict.fromkeys([*stored.kept, *(f"{name}.weight" for name in layers)])])
    records: dict[str, LayerCheckpoint] = {}

    def read(tensor: str) -> Tensor:
        """A tensor as the model takes it; what else is known of a layer is put aside."""
        name = tensor.removesuffix(".weight")
        record = stored.layer(name) if tensor.endswith(".weight") and name in layers else None
        if record is not None:
            records[name] = record if hold_codes else replace(record, weight=None)
        if record is None or record.weight is None:
            return read_tensor(stored.source, tensor, stored.tensor)
        weight = stored.decoded(name, record.weight, dtype) if stored.decoded else decode(record.weight, dtype)
        return weight.t().contiguous() if record.kind == TRANSPOSED else weight

    weights = StreamedWeights(stored.source, names, model, options.get("device", "cpu"), read=read)
    weights.put(weights.parameters, "Decoding weights")
    weights.put_buffers()
    model.to(options.get("device", "cpu"))  # the buffers that no file holds
    if not cut:
        _check_places(model, names, stored, records, options.get("notify", _log.warning))
    check_runs(where, model)
    mine = [in_model(record, names, where) for record in records.values()]
    attach(model, stored.formats, kv_scales, names, mine, where)
    if hold_codes:
        pack_weights(model, mine, dtype)
    return model


def pack_weights(model: nn.Module, records: Iterable[LayerCheckpoint], dtype: torch.dtype) -> None:
    """Let layers whose weights are decoded hold the codes of the records, which are named as they are."""
    for record in records:
        module: Any = model.get_submodule(record.name)
        if record.weight is not None:
            module.pack_weight(record.weight, dtype)


def _check_places(
    model: nn.Module, names: CheckpointNames, stored: Stored, read: Mapping[str, Any], notify: Callable[[str], None]
) -> None:
    """Refuse layers that the model has no place for, and tell of other tensors."""
    lost = next((n for n in stored.formats.layers if n not in read and not is_beside(model, n)), None)
    if lost is not None:
        raise _no_such_layer(lost, stored.source.path)
    ignored: Any = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    unused = [
        name
        for name in stored.kept
        if not names.of_tensor(name).parameters and not any(re.search(pattern, name) for pattern in ignored)
    ]
    if unused:
        notify(f"{len(unused)} tensors of the checkpoint have no place in the model and are ignored: {unused[0]}, ...")


def _no_such_layer(name: str, folder: Path) -> DetentError:
    return DetentError(f"{folder}: {name} is quantized, but the model of its config.json has no such layer")


def in_model(record: LayerCheckpoint, names: CheckpointNames, folder: Path) -> LayerCheckpoint:
    """A record under the name of the module that it belongs to."""
    parameter = names.parameter(f"{record.name}.weight")
    if parameter is None:
        raise _no_such_layer(record.name, folder)
    return replace(record, name=parameter.removesuffix(".weight"))


def attach(
    model: nn.Module,
    formats: ModelFormats,
    kv_scales: Callable[[], Mapping[str, tuple[Scales, ...]]],
    names: CheckpointNames,
    records: list[LayerCheckpoint],
    where: Path,
    device: torch.device | None = None,
) -> None:
    """Put the activation quantizers of a checkpoint into a model of decoded weights, or of none: scales then go to
    `device`."""
    replace_quant_module(model)
    for record in records:
        for side in ("input", "output"):
            activation = getattr(record, side)
            if activation is not None:
                _set_activation(model, f"{record.name}.{side}_quantizer", activation, device)
    attach_online(model, formats, records)
    kv = formats.kv_cache
    if kv is not None:
        scales, outside = kv_scales(), outside_language(model)
        for name in [name for name, _ in attention_modules(model) if not outside(name)]:
            pair = scales.get(names.container(name))
            if pair is None and not kv.dynamic:
                if is_multimodal(model):
                    continue  # cross-attention, which stays: see `detent.plan.kept.check_attention`
                raise DetentError(f"{where}: damaged: no scales of keys and values for {names.container(name)}")
            for index, side in enumerate(ATTENTION_SIDES):
                fmt = kv if index < 2 else formats.attention
                if fmt is not None:
                    calibrated = None if fmt.dynamic or pair is None else pair[index]
                    _set_activation(model, f"{name}.{side}_bmm_quantizer", Activation(fmt, calibrated), device)
    route_attention(model)


def _set_activation(model: nn.Module, quantizer_name: str, activation: Activation, device: torch.device | None) -> None:
    fmt = activation.format
    fresh_blocks = activation.scales is not None and activation.scales.scale.numel() == 0
    attributes = QuantizerAttributeConfig(format=fmt.as_dynamic() if fresh_blocks else fmt)
    set_quantizer_attribute(model, lambda name: name == quantizer_name, attributes)
    quantizer = model.get_submodule(quantizer_name)
    assert isinstance(quantizer, TensorQuantizer)
    if activation.scales is not None:
        quantizer.load_scales(activation.scales.to(device or next(model.parameters()).device))
