"""What transforms leave for run time: rotations in quantizers, and low-rank branches; to and from checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from detent.checkpoints import LayerCheckpoint, ModelFormats
from detent.nn.attention import attention_modules, route_attention
from detent.nn.hadamard import rotation_block
from detent.nn.low_rank import low_rank_of, set_low_rank
from detent.nn.sequential import members_of
from detent.transforms.rotation_parts import rotate_in


def with_online(record: LayerCheckpoint, module: nn.Module) -> LayerCheckpoint:
    """`record` with the rotation of its module's input and the low-rank branch alongside its weight."""
    branch = low_rank_of(module)
    return replace(
        record,
        rotated=_input_block(module, record.shape[-1]),
        low_rank=None if branch is None else (branch[0].detach().cpu(), branch[1].detach().cpu()),
    )


def with_online_formats(formats: ModelFormats, records: Iterable[LayerCheckpoint], model: nn.Module) -> ModelFormats:
    """`formats` as the finished model has them: the plan could not know what would be rotated."""
    layers = {**formats.layers, **{record.name: record.formats for record in records}}
    return replace(formats, layers=layers, keys_rotated=_keys_rotated(model))


def attach_online(model: nn.Module, formats: ModelFormats, records: Iterable[LayerCheckpoint]) -> None:
    """Give a model with quantizers the rotations and branches of a checkpoint."""
    modules = dict(model.named_modules())
    for record in records:
        module: Any = modules[record.name]
        if record.rotated:
            rotate_in(module.input_quantizer, record.rotated)
        if record.low_rank is not None:
            set_low_rank(module, *record.low_rank, record.name)
    if formats.keys_rotated:
        for _, attention in attention_modules(model):
            for side in ("q", "k"):
                rotate_in(getattr(attention, f"{side}_bmm_quantizer"))
        route_attention(model)


def _input_block(module: nn.Module, width: int) -> int:
    quantizer: Any = getattr(module, "input_quantizer", None)
    rotation = None if quantizer is None else members_of(quantizer)[0].rotation
    return 0 if rotation is None else rotation_block(width, rotation.block_size)


def _keys_rotated(model: nn.Module) -> bool:
    quantizers = [getattr(module, "k_bmm_quantizer", None) for _, module in attention_modules(model)]
    return any(q is not None and members_of(q)[0].rotation is not None for q in quantizers)
