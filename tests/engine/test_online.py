"""Rotations and branches of a finished model, taken to a checkpoint's records and given to a fresh model."""

from __future__ import annotations

from typing import Any

import torch

import detent
from detent.checkpoints import LayerCheckpoint, ModelFormats
from detent.nn.low_rank import low_rank_of, set_low_rank
from detent.runs.online import attach_online, with_online, with_online_formats
from detent.transforms.rotation_parts import rotate_in
from tiny_language_model import make_model

CFG = {
    "*input_quantizer": {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}},
    "*k_bmm_quantizer": {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}},
    "default": {"enable": False},
}


def quantized() -> Any:
    return detent.quantize(make_model(), {"quant_cfg": CFG, "algorithm": None})


@torch.no_grad()
def test_a_fresh_model_computes_the_same() -> None:
    model = quantized()
    down, up = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"
    rotate_in(model.get_submodule(down).input_quantizer)
    set_low_rank(model.get_submodule(up), torch.randn(2, 16), torch.randn(32, 2))
    for side in "qk":
        for layer in model.model.layers:
            rotate_in(getattr(layer.self_attn, f"{side}_bmm_quantizer"))
    records = [
        with_online(LayerCheckpoint(name, tuple(model.get_submodule(name).weight.shape)), model.get_submodule(name))
        for name in (down, up)
    ]
    formats = with_online_formats(ModelFormats({}), records, model)
    assert (formats.layers[down].rotated, formats.layers[up].low_rank, formats.keys_rotated) == (32, 2, True)

    again = quantized()
    ids = torch.arange(12)[None]
    assert not torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    attach_online(again, formats, records)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert low_rank_of(again.get_submodule(up)) is not None


def test_plain_models_have_none() -> None:
    model = quantized()
    record = with_online(LayerCheckpoint("lm_head", (63, 16)), model.lm_head)
    assert (record.rotated, record.low_rank) == (0, None)
    assert with_online_formats(ModelFormats({}), [record], model).keys_rotated is False


def test_quantizers_stay_on_or_off() -> None:
    quantizer = quantized().model.layers[0].self_attn.q_bmm_quantizer
    rotate_in(quantizer, 4)
    assert not quantizer.is_enabled
    assert quantizer.fused_rotation == 4


@torch.no_grad()
def test_another_configuration_keeps_what_weights_rely_on() -> None:
    model = quantized()
    quantizer = model.model.layers[0].mlp.down_proj.input_quantizer
    rotate_in(quantizer)
    quantizer.disable()
    x = torch.randn(3, 32)
    turned = quantizer(x)
    assert not torch.equal(turned, x)
    detent.quantize(model, {"quant_cfg": {"*input_quantizer": {"num_bits": 4}}, "algorithm": None})
    quantizer.disable()
    assert torch.equal(quantizer(x), turned)
    quantizer.fused_rotation = None
    assert torch.equal(quantizer(x), x)
