"""The layout of MLX, against its definition in Python's integers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoints import int4_by_hand as by_hand
from checkpoints.quantized_by_hand import E2M1, save_shards
from checkpoints.toy import assert_same_layer, quantized_llama
from detent import formats as f
from detent.checkpoints import LayerFormats, ModelFormats, layouts, open_quantized, open_source
from detent.config import parse_scheme
from detent.errors import DetentError
from detent.formats import Format, decode

NAME = "model.layers.0.self_attn.q_proj.weight"
LAYER = NAME.removesuffix(".weight")
MLX = layouts["mlx"]


def affine(bits: int, group: int = 32, dtype: str = "bfloat16") -> Format:
    scheme = parse_scheme(f"w_int{bits}_per_group_sym", group)
    assert scheme.weight is not None
    fmt = MLX.adapt(type(scheme)(scheme.name, scheme.weight.with_scale_dtype(dtype))).weight  # type: ignore[arg-type]
    assert fmt is not None
    return fmt


def rounded_once(values: Tensor, stored: Tensor) -> bool:
    """Whether `stored` is `values` up to the rounding of one float32 addition of numbers up to 1."""
    return bool(((values - stored.double()).abs() <= 2.0**-24).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_as_mlx_sees_it(bits: int, dtype: torch.dtype, tmp_path: Path) -> None:
    fmt = affine(bits, dtype=str(dtype).removeprefix("torch."))
    layers = quantized_llama(tmp_path, lambda layer: (fmt, None, None), dtype, layout=MLX)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    checkpoint = open_quantized(tmp_path / "out")
    checkpoint.check()
    source = load_file(tmp_path / "source" / "model.safetensors")
    for layer in layers[:3]:
        assert layer.weight is not None
        assert tensors[f"{layer.name}.weight"].dtype == torch.uint32
        assert tensors[f"{layer.name}.scales"].dtype == tensors[f"{layer.name}.biases"].dtype == dtype
        values = by_hand.mlx_values(tensors, layer.name, bits, 32)
        assert rounded_once(values, decode(layer.weight))
        assert_same_layer(checkpoint.layer(layer.name), layer)
        weight = source[f"{layer.name}.weight"].double()
        step = weight.reshape(-1, 32).aminmax(dim=1)
        width = (step.max - step.min).reshape(len(weight), -1).repeat_interleave(32, 1) / ((1 << bits) - 1)
        assert bool(((values - weight).abs() <= 1.5 * width + 1e-3).all())


@pytest.mark.parametrize("kind", ["mxfp4", "mxfp8"])
def test_microscaling(kind: str, tmp_path: Path) -> None:
    fmt = f.mx("e2m1" if kind == "mxfp4" else "e4m3")
    layers = quantized_llama(tmp_path, lambda layer: (fmt, None, None), torch.bfloat16, layout=MLX)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    described = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert described == {"group_size": 32, "bits": fmt.bits, "mode": kind}
    checkpoint = open_quantized(tmp_path / "out")
    for layer in layers[:3]:
        assert layer.weight is not None
        codes = by_hand.unpacked(tensors[f"{layer.name}.weight"].to(torch.int64), fmt.bits, layer.shape[1])
        grid = E2M1[codes.long()] if kind == "mxfp4" else codes.to(torch.uint8).view(torch.float8_e4m3fn).double()
        scales = 2.0 ** (tensors[f"{layer.name}.scales"].double() - 127)
        assert torch.equal((grid * scales.repeat_interleave(32, 1)).float(), decode(layer.weight))
        assert_same_layer(checkpoint.layer(layer.name), layer)


def test_layers_that_differ(tmp_path: Path) -> None:
    def plan(name: str) -> Any:
        return f.mx("e2m1") if "down" in name else affine(8, 32) if "layers.1.mlp.up" in name else affine(4), None, None

    layers = quantized_llama(tmp_path, plan, torch.bfloat16, layout=MLX)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    described = config["quantization"]
    assert described == config["quantization_config"]
    assert (described["bits"], described["group_size"], described["mode"]) == (4, 32, "affine")
    assert described["model.layers.1.mlp.up_proj"] == {"group_size": 32, "bits": 8, "mode": "affine"}
    assert described["model.layers.0.mlp.down_proj"]["mode"] == "mxfp4"
    checkpoint = open_quantized(tmp_path / "out")
    for layer in layers:
        assert_same_layer(checkpoint.layer(layer.name), layer)


# ---- what others wrote ----------------------------------------------------------------------------------------------


def folder_of(folder: Path, stored: dict[str, Tensor], settings: dict[str, Any]) -> Path:
    whole = {"model.norm.weight": torch.ones(4), "lm_head.weight": torch.ones(5, 4), **stored}
    return save_shards(folder, whole, {"model_type": "llama", "dtype": "float32", "quantization": settings})


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_what_others_wrote(bits: int, group: int, tmp_path: Path) -> None:
    torch.manual_seed(bits)
    stored, values = by_hand.mlx(NAME, 8, 128, group, bits)
    own = {"group_size": group, "bits": bits}
    usual = {"group_size": 128, "bits": 4, LAYER: own, "lm_head": False}
    for settings in (own, usual):
        folder = folder_of(tmp_path / str(len(settings)), stored, settings)
        checkpoint = open_quantized(folder)
        checkpoint.check()
        assert checkpoint.method == "mlx"
        assert "quantization" not in checkpoint.config
        assert sorted(checkpoint.kept) == ["lm_head.weight", "model.norm.weight"]
        weight = checkpoint.layer(LAYER).weight
        assert weight is not None
        assert torch.allclose(decode(weight).double(), values, rtol=0, atol=2.0**-22)
        source = open_source(folder)
        assert "quantization" not in source.config
        assert torch.equal(source.tensor(NAME), decode(weight))


W, S, B = (f"{LAYER}.{part}" for part in ("weight", "scales", "biases"))


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        ({B: None}, {}, ["holds no tensor", B]),
        ({W: None}, {}, ["holds no tensor", W]),
        ({S: None, B: None}, {}, ["no quantized weight"]),
        ({S: torch.ones(8, 4).half()}, {}, [B, "bfloat16"]),
        ({B: torch.ones(8, 3, dtype=torch.bfloat16)}, {}, [B, "(8, 3)"]),
        ({B: torch.full((8, 4), torch.nan, dtype=torch.bfloat16)}, {}, ["nan"]),
        ({S: torch.full((8, 4), torch.inf, dtype=torch.bfloat16)}, {}, ["inf"]),
        ({W: torch.ones(8, 16)}, {}, [W, "float32"]),
        ({W: torch.ones(8, 15, dtype=torch.uint32)}, {}, [W, "15 words"]),
        ({}, {"bits": 8}, ["16 words", "8-bit"]),
        ({}, {"group_size": 64}, ["4 scales", "groups of 64"]),
        ({}, {"bits": 7}, ["bits", "7"]),
        ({}, {"group_size": 48}, ["group_size", "48"]),
        ({}, {"mode": "nvfp4"}, ["mode", "nvfp4"]),
        ({}, {"mode": "mxfp8"}, ["mxfp8", "8 bits"]),
        ({}, {LAYER: {"bits": "4"}}, ["bits"]),
    ],
)
def test_damage(change: dict[str, Tensor | None], settings: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    stored, _ = by_hand.mlx(NAME, 8, 128, 32, 4)
    tensors = {name: tensor for name, tensor in (stored | change).items() if tensor is not None}
    folder = folder_of(tmp_path / "m", tensors, {"group_size": 32, "bits": 4, "mode": "affine", **settings})
    for opened in (lambda: open_quantized(folder).check(), lambda: open_source(folder).tensor(NAME)):
        with pytest.raises(DetentError) as refusal:
            opened()
        assert all(word in str(refusal.value) for word in [str(folder), *words]), str(refusal.value)


@pytest.mark.parametrize(
    ("fmt", "said"),
    [
        (f.integer(4, f.per_group(32)), "integers with a stored minimum for each group are held"),
        (f.integer(4, f.per_channel(0)), "integers in groups, MXFP4 and MXFP8 are held"),
        (f.fp8(), "integers in groups, MXFP4 and MXFP8 are held"),
        (f.nvfp4(), "integers in groups, MXFP4 and MXFP8 are held"),
        (affine(7), "2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128"),
        (affine(4, 16), "2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128"),
    ],
)
def test_what_is_not_held(fmt: Format, said: str) -> None:
    reason = MLX.can_hold(ModelFormats({LAYER: LayerFormats((64, 64), fmt)}))
    assert reason is not None
    assert said in reason
    assert reason.endswith("hf_format does")


@pytest.mark.parametrize("name", ["w_fp8_a_fp8", "w_mxfp4", "w_int4_per_channel_sym"])
def test_schemes_that_are_left_as_they_are(name: str) -> None:
    assert MLX.adapt(parse_scheme(name)) == parse_scheme(name)
