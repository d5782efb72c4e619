"""Quantized checkpoints seen as the float models that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints import quantized_by_hand as by_hand
from checkpoints.quantized_by_hand import Stored, save_shards
from checkpoints.toy import toy_source
from detent.checkpoints import LayerCheckpoint, ModelFormats, QuantizedWriter, Source, open_source
from detent.errors import DetentError
from detent.formats import decode, encode, integer, micro_exponent, per_group

NAME = "model.layers.0.mlp.down_proj.weight"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
CT = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}


def ct(strategy: str = "group", **weights: Any) -> dict[str, Any]:
    args = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": False, **weights}
    return CT | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": args}}, "ignore": ["lm_head"]}


def weight(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def cases() -> dict[str, tuple[str, Stored, dict[str, Any]]]:
    torch.manual_seed(0)
    deepseek = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    shuffled = (torch.arange(64) // 16)[torch.randperm(64)]
    w, odd = weight(24, 64), weight(200, 300)
    found: dict[str, tuple[str, Stored, dict[str, Any]]] = {
        "fp8 blocks": (NAME, by_hand.fp8_blocks(NAME, odd), deepseek),
        "fp8 blocks, one": (NAME, by_hand.fp8_blocks(NAME, w), deepseek),
        "fp8 blocks of experts": (
            EXPERTS,
            by_hand.fp8_blocks(EXPERTS, weight(3, 40, 70), (32, 32)),
            {"weight_block_size": [32, 32]},
        ),
        "fp8 blocks, ModelOpt": (NAME, by_hand.fp8_blocks(NAME, weight(64, 96), (32, 32), "_scale"), {}),
        "nvfp4": (NAME, by_hand.nvfp4(NAME, w), {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
        "mxfp4": (NAME, by_hand.mxfp4(NAME, w), {"quant_method": "quark"}),
        "gpt-oss": (EXPERTS, by_hand.gpt_oss(EXPERTS, weight(3, 64, 24)), {"quant_method": "mxfp4"}),
        "int4": (NAME, by_hand.int4_packed(NAME, w, 16), ct(group_size=16)),
        "int4, zero points": (NAME, by_hand.int4_packed(NAME, w, 16, zero=True), ct(group_size=16, symmetric=False)),
        "int4, reordered": (
            NAME,
            by_hand.int4_packed(NAME, w, 16, order=shuffled),
            ct(group_size=16, actorder="group"),
        ),
    }
    for per in ("tensor", "one", "row", "row of a vector"):
        found[f"fp8 per {per}"] = NAME, by_hand.fp8(NAME, odd, per), {"quant_method": "modelopt", "quant_algo": "FP8"}
    found["e5m2"] = NAME, by_hand.fp8(NAME, odd, "row", torch.float8_e5m2), {"quant_method": "fbgemm_fp8"}
    return found


CASES = cases()


def source_of(folder: Path, stored: dict[str, Tensor], quantization: dict[str, Any], **config: Any) -> Path:
    whole = {"model.norm.weight": torch.ones(4), "lm_head.weight": weight(5, 4), **stored}
    described = {"quantization_config": {"quant_method": "fp8", **quantization}} if quantization is not None else {}
    return save_shards(folder, whole, {"model_type": "llama", "dtype": "float32", **described, **config})


@pytest.mark.parametrize("case", CASES)
def test_weights_are_what_they_stand_for(case: str, tmp_path: Path) -> None:
    name, (stored, values), quantization = CASES[case]
    source = open_source(source_of(tmp_path / "m", stored, quantization))
    assert sorted(source) == sorted(["model.norm.weight", "lm_head.weight", name])
    assert source.info(name).shape == tuple(values.shape)
    assert source.info(name).dtype == torch.float32
    assert source.nbytes == 4 * (4 + 20 + values.numel())
    found = source.tensor(name)
    assert found.is_contiguous()
    assert torch.equal(found, values.float())  # a code times a scale is rounded once
    assert torch.equal(source.tensor("lm_head.weight"), weight(5, 4))
    assert "quantization_config" not in source.config
    assert "is quantized" in source.notes[0]
    assert len(source.notes) == 1 + any("input_scale" in key for key in stored)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_is_that_of_the_configuration(dtype: str, tmp_path: Path) -> None:
    name, (stored, values), quantization = CASES["fp8 blocks"]
    for nested in ({"dtype": dtype}, {"dtype": None, "text_config": {"torch_dtype": dtype}}):
        source = open_source(source_of(tmp_path / str(len(nested)), stored, quantization, **nested))
        assert torch.equal(source.tensor(name), values.float().to(getattr(torch, dtype)))
        assert source.info(name).dtype == getattr(torch, dtype)


def test_scales_that_are_powers_of_two(tmp_path: Path) -> None:
    stored, _ = by_hand.fp8_blocks(NAME, weight(200, 300))
    exponents = torch.randint(115, 122, (2, 3), dtype=torch.uint8)
    stored[f"{NAME}_scale_inv"] = exponents.view(torch.float8_e8m0fnu)
    source = open_source(source_of(tmp_path / "m", stored, {"weight_block_size": [128, 128]}))
    scales = by_hand.spread(2.0 ** (exponents.double() - 127), (200, 300), (128, 128))
    assert torch.equal(source.tensor(NAME).double(), stored[NAME].double() * scales)


def test_experts_of_gpt_oss_are_those_that_transformers_reads(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    name, (stored, _), quantization = CASES["gpt-oss"]
    blocks, scales = stored[f"{name}_blocks"], stored[f"{name}_scales"]
    source = open_source(source_of(tmp_path / "m", stored, quantization, dtype="bfloat16"))
    assert torch.equal(source.tensor(name), convert_moe_packed_tensors(blocks, scales))


def test_packed_integers_are_those_that_compressed_tensors_reads(tmp_path: Path) -> None:
    from compressed_tensors.compressors import unpack_from_int32

    name, (stored, _), quantization = CASES["int4"]
    codes = unpack_from_int32(stored[f"{name}_packed"], 4, torch.Size((24, 64)))
    source = open_source(source_of(tmp_path / "m", stored, quantization))
    assert torch.equal(source.tensor(name), codes.float() * stored[f"{name}_scale"].repeat_interleave(16, 1))


def test_group_of_each_column_that_was_never_set(tmp_path: Path) -> None:
    stored, values = by_hand.int4_packed(NAME, weight(24, 64), 16)
    stored[f"{NAME}_g_idx"] = torch.full((64,), -1, dtype=torch.int32)
    source = open_source(source_of(tmp_path / "m", stored, ct(group_size=16)))
    assert torch.equal(source.tensor(NAME), values.float())


@pytest.mark.parametrize("fmt", [integer(4, per_group(32)), micro_exponent(6)], ids=str)
def test_what_detent_wrote(fmt: Any, tmp_path: Path) -> None:
    x = weight(8, 64)
    original = toy_source(tmp_path / "m", {"a.weight": x, "b.weight": x[:, :4].contiguous()}, dtype="float32")
    layer = LayerCheckpoint("a", (8, 64), encode(x, fmt))
    with QuantizedWriter(
        tmp_path / "q", source=Source(original), formats=ModelFormats({"a": layer.formats}, ignored=("b",))
    ) as writer:
        writer.add_layer(layer)
        writer.add_tensor("b.weight", x[:, :4])
        writer.finish()
    source = open_source(tmp_path / "q")
    assert layer.weight is not None
    assert list(source) == ["a.weight", "b.weight"]
    assert torch.equal(source.tensor("a.weight"), decode(layer.weight))
    assert source.config == Source(original).config


def test_modelopt_that_says_so_beside_the_configuration(tmp_path: Path) -> None:
    name, (stored, values), _ = CASES["fp8 per tensor"]
    folder = source_of(tmp_path / "m", stored, {}, quantization_config=None)
    with pytest.raises(DetentError, match="config.json has no quantization_config"):
        open_source(folder)
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    assert torch.equal(open_source(folder).tensor(name), values.float())
    with pytest.raises(DetentError, match="quantized already"):
        Source(folder)


def test_what_is_not_quantized_is_opened_as_it_is(tmp_path: Path) -> None:
    source = open_source(toy_source(tmp_path / "m"))
    assert type(source) is Source
    assert not source.notes


BLOCKS = CASES["fp8 blocks"][1][0]


@pytest.mark.parametrize(
    ("change", "quantization", "words"),
    [
        ({}, {"quant_method": "hqq"}, ["quantized already, with hqq, which Detent does not decode", "original"]),
        ({f"{NAME}_scale_inv": None}, {}, [NAME, "form that Detent does not decode"]),
        ({f"{NAME}_scale_inv": torch.ones(2, 2)}, {"weight_block_size": [128, 128]}, ["(2, 2)", "(2, 3)"]),
        ({f"{NAME}_scale_inv": torch.ones(7, 1)}, {}, ["(7, 1)", "its codes call for"]),
        ({f"{NAME}_scale_inv": torch.ones(2, 3, 1)}, {}, ["(2, 3, 1)"]),
        ({f"{NAME}_scale_inv": torch.ones(2, 3, dtype=torch.int64)}, {"weight_block_size": [128, 128]}, ["int64"]),
        ({}, {"weight_block_size": [128]}, ["weight_block_size", "[128]"]),
        ({}, {"weight_block_size": "128x128"}, ["weight_block_size", "128x128"]),
        ({"a.qweight": torch.ones(2, 3, dtype=torch.int32)}, {"weight_block_size": [128, 128]}, ["a.qweight"]),
        (
            {NAME.replace("weight", "pre_quant_scale"): torch.ones(300)},
            {"weight_block_size": [128, 128]},
            ["pre_quant"],
        ),
        ({NAME.replace("weight", "weight_extra"): torch.ones(3)}, {"weight_block_size": [128, 128]}, ["weight_extra"]),
    ],
)
def test_what_is_not_understood_is_refused_when_it_is_opened(
    change: dict[str, Tensor | None], quantization: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    stored = {name: tensor for name, tensor in (BLOCKS | change).items() if tensor is not None}
    folder = source_of(tmp_path / "m", stored, quantization)
    with pytest.raises(DetentError) as refusal:
        open_source(folder)
    assert all(word in str(refusal.value) for word in [str(folder), *words]), str(refusal.value)


@pytest.mark.parametrize(
    ("case", "name", "index", "value", "words"),
    [
        ("fp8 blocks", f"{NAME}_scale_inv", (1, 2), torch.nan, ["scales from nan"]),
        ("fp8 blocks", f"{NAME}_scale_inv", (1, 2), 0.0, ["scales from 0"]),
        ("fp8 blocks", NAME, (199, 299), torch.nan, ["NaN or infinity"]),
        ("gpt-oss", f"{EXPERTS}_scales", (1, 2, 1), 255, ["scale is NaN"]),
        ("int4, reordered", f"{NAME}_g_idx", (3,), 99, ["g_idx"]),
        ("int4, zero points", f"{NAME}_scale", (3, 1), -1.0, ["scales from -1"]),
    ],
)
def test_damage_is_found_when_a_weight_is_read(
    case: str, name: str, index: tuple[int, ...], value: float, words: list[str], tmp_path: Path
) -> None:
    tensor, (stored, _), quantization = CASES[case]
    stored = stored | {name: stored[name].clone()}
    stored[name][index] = value
    source = open_source(source_of(tmp_path / "m", stored, quantization))
    with pytest.raises(DetentError) as refusal:
        source.tensor(tensor)
    assert all(word in str(refusal.value) for word in [name.removesuffix("_scales"), *words][1:]), str(refusal.value)


def test_a_weight_that_is_there_twice(tmp_path: Path) -> None:
    name, (stored, values), quantization = CASES["int4"]
    folder = source_of(tmp_path / "m", stored | {name: values.float()}, quantization)
    with pytest.raises(DetentError, match="quantized and in floating point"):
        open_source(folder)


def test_a_weight_too_large_for_its_dtype(tmp_path: Path) -> None:
    stored = {NAME: torch.full((4, 4), 448.0).to(torch.float8_e4m3fn), f"{NAME}_scale": torch.tensor(1e3)}
    source = open_source(source_of(tmp_path / "m", stored, {}, dtype="float16"))
    with pytest.raises(DetentError, match="decodes to 448000, too large for the float16"):
        source.tensor(NAME)
