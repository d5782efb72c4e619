"""From a quantized checkpoint to a simulated model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import nn

from detent.checkpoints import Activation, LayerCheckpoint, QuantizedCheckpoint, open_quantized
from detent.config import QuantizerAttributeConfig
from detent.errors import DetentError
from detent.formats import Scales, decode
from detent.model.conversion import replace_quant_module, set_quantizer_attribute
from detent.nn import TensorQuantizer
from detent.nn.attention import attention_modules, route_attention
from detent.pretrained.loading import load_config, load_model, model_dtype, read_weights
from detent.pretrained.names import CheckpointNames
from detent.progress import track
from detent.runs.online import attach_online

_log = logging.getLogger(__name__)


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
    config = load_config(folder, trust_remote_code=trust_remote_code)
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
    names = CheckpointNames(model, dict.fromkeys([*checkpoint.kept, *(f"{name}.weight" for name in records)]))
    _attach(model, checkpoint, names, [_in_model(record, names, folder) for record in records.values()])
    return model


def _in_model(record: LayerCheckpoint, names: CheckpointNames, folder: Path) -> LayerCheckpoint:
    """A record under the name of the module that it belongs to."""
    parameter = names.parameter(f"{record.name}.weight")
    if parameter is None:
        raise DetentError(f"{folder}: {record.name} is quantized, but the model of its config.json has no such layer")
    return replace(record, name=parameter.removesuffix(".weight"))


def _attach(
    model: nn.Module, checkpoint: QuantizedCheckpoint, names: CheckpointNames, records: list[LayerCheckpoint]
) -> None:
    """Put the activation quantizers of a checkpoint into a model of decoded weights."""
    replace_quant_module(model)
    for record in records:
        for side in ("input", "output"):
            activation = getattr(record, side)
            if activation is not None:
                _set_activation(model, f"{record.name}.{side}_quantizer", activation)
    attach_online(model, checkpoint.formats, records)
    kv = checkpoint.formats.kv_cache
    if kv is not None:
        scales = checkpoint.kv_scales()
        for name, _ in attention_modules(model):
            for index, which in enumerate(("k_bmm_quantizer", "v_bmm_quantizer")):
                calibrated = None if kv.dynamic else scales[names.container(name)][index]
                _set_activation(model, f"{name}.{which}", Activation(kv, calibrated))
    route_attention(model)


def _set_activation(model: nn.Module, quantizer_name: str, activation: Activation) -> None:
    fmt = activation.format
    blocks_anew = activation.scales is not None and activation.scales.scale.numel() == 0
    attributes = QuantizerAttributeConfig(format=fmt.as_dynamic() if blocks_anew else fmt)
    set_quantizer_attribute(model, lambda name: name == quantizer_name, attributes)
    quantizer = model.get_submodule(quantizer_name)
    assert isinstance(quantizer, TensorQuantizer)
    if activation.scales is not None:
        device = next(model.parameters()).device
        move = [None if t is None else t.to(device) for t in vars(activation.scales).values()]
        quantizer.load_scales(Scales(*move))  # type: ignore[arg-type]
