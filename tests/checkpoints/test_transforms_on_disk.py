"""Rotated inputs, rotated keys and low-rank branches: in Detent's own layout, and refused by others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoints.toy import assert_same_tensor, linear_weights, llama_source, quantized_layer
from detent import formats as f
from detent.checkpoints import ModelFormats, QuantizedWriter, Source, choose, layouts, open_quantized
from detent.errors import DetentError

INT8 = (f.integer(8, f.per_channel(0)), f.integer(8, f.per_token(), dynamic=True), None)


def written(folder: Path) -> tuple[ModelFormats, list]:
    source = Source(llama_source(folder / "source"))
    layers = [quantized_layer(name, weight, INT8) for name, weight in linear_weights(source).items()]
    layers = [replace(layer, rotated=32) if layer.name.endswith("down_proj") else layer for layer in layers]
    layers = [
        replace(layer, low_rank=(torch.randn(3, layer.shape[1]), torch.randn(layer.shape[0], 3).bfloat16()))
        if layer.name.endswith("up_proj")
        else layer
        for layer in layers
    ]
    cache = f.fp8(dynamic=True)
    formats = ModelFormats({layer.name: layer.formats for layer in layers}, cache, ("lm_head",), keys_rotated=True)
    with QuantizedWriter(folder / "out", source=source, formats=formats) as writer:
        for layer in layers:
            writer.add_layer(layer)
        for name in source:
            if not name.endswith("_proj.weight"):
                writer.add_tensor(name, source.tensor(name))
        writer.finish()
    return formats, layers


def test_round_trip(tmp_path: Path) -> None:
    formats, layers = written(tmp_path)
    checkpoint = open_quantized(tmp_path / "out")
    assert checkpoint.method == "detent"
    assert checkpoint.formats == formats
    assert not any("low_rank" in name for name in checkpoint.kept)
    for layer in layers:
        read = checkpoint.layer(layer.name)
        assert read.formats == layer.formats
        assert read.rotated == (32 if layer.name.endswith("down_proj") else 0)
        for found, wanted in zip(read.low_rank or (), layer.low_rank or (), strict=True):
            assert_same_tensor(found, wanted, layer.name)


def test_description_mentions_only_what_is_there(tmp_path: Path) -> None:
    written(tmp_path)
    described = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["layers"]
    assert described["model.layers.0.mlp.down_proj"]["rotated"] == 32
    assert described["model.layers.0.mlp.up_proj"]["low_rank"] == 3
    assert "rotated" not in described["model.layers.0.self_attn.q_proj"]


def test_misshapen_branch_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text().replace('"low_rank": 3', '"low_rank": 4'))
    with pytest.raises(DetentError, match=r"low_rank\.a is \(3, 64\), not \(4, 64\)"):
        open_quantized(tmp_path / "out").layer("model.layers.0.mlp.up_proj")


@pytest.mark.parametrize("change", [{"rotated": 4}, {"low_rank": 2}, {"keys_rotated": True}], ids=str)
def test_other_layouts_do_not_hold_them(change: dict) -> None:
    layer = f.integer(8, f.per_channel(0))
    from detent.checkpoints import LayerFormats

    if "keys_rotated" in change:
        formats = ModelFormats({"a": LayerFormats((4, 4), layer)}, None, (), True)
    else:
        formats = ModelFormats({"a": LayerFormats((4, 4), layer, **change)})
    layout, reasons = choose(formats)
    assert layout.name == "detent"
    assert "compressed-tensors does not hold" in reasons[0]
    assert layouts["compressed-tensors"].can_hold(formats) == reasons[0]
