"""Compressed-tensors exports in the hands of the real reader: transformers with the compressed-tensors library.

The reference is transformers' own load of the original checkpoint, its weights replaced by decoded ones and its inputs
and outputs fake-quantized by hooks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints.toy import Plan, calibrated, linear_weights, llama_source, quantized_layer, quantized_llama, write
from detent import formats as f
from detent.checkpoints import Activation, LayerCheckpoint, Source, open_quantized
from detent.formats import Format, decode, fake_quantize

pytest.importorskip("compressed_tensors")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TOKENS = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(1))


def plan(weight: Format | None, input: Format | None = None, output: Format | None = None) -> Plan:
    return lambda name: (weight, input, output)


@dataclass(frozen=True)
class Case:
    name: str
    plan: Plan
    layout: str
    dtype: torch.dtype = F32
    options: dict[str, Any] = field(default_factory=dict)


PACK, INT = "pack-quantized", "int-quantized"
INT8_TOKEN = f.integer(8, f.per_token(), symmetric=False, dynamic=True)


def mixed(name: str) -> tuple[Format | None, Format | None, Format | None]:
    if "mlp" in name:
        return f.fp8("e4m3", f.per_channel(0)), f.fp8(), None
    return f.integer(4, f.per_group(32)), None, None


#: Where the reader's arithmetic is that of `decode`: logits must be the same bits.
EXACT = [
    Case("int4", plan(f.integer(4, f.per_group(32))), "pack-quantized"),
    Case("uint4", plan(f.integer(4, f.per_group(16), signed=False)), "pack-quantized", options={"tied": True}),
    Case("int3", plan(f.integer(3, f.per_channel(0), rule="qmax")), "pack-quantized"),
    Case("int5_long_group", plan(f.integer(5, f.per_group(128))), "pack-quantized"),
    Case("int8", plan(f.integer(8)), "pack-quantized"),
    Case("int4_bf16", plan(f.integer(4, f.per_group(32)).with_scale_dtype("bfloat16")), "pack-quantized", BF16),
    Case("w8a8", plan(f.integer(8, f.per_channel(0)), f.integer(8)), "int-quantized"),
    Case("w4a8", plan(f.integer(4, f.per_group(32)), INT8_TOKEN), "int-quantized"),
    Case("w4a8_static", plan(f.integer(4, f.per_group(32)), f.integer(8)), INT),
    Case(
        "u8u8_asymmetric",
        plan(*[f.integer(8, signed=False, symmetric=False)] * 2),
        "int-quantized",
    ),
    Case("fp8", plan(f.fp8(), f.fp8(), f.fp8()), "float-quantized"),
    Case(
        "fp8_channel",
        plan(f.fp8("e4m3", f.per_channel(0)), f.fp8("e4m3", f.per_token(), dynamic=True)),
        "float-quantized",
    ),
    Case("fp8_block", plan(f.fp8("e4m3", f.per_block({-1: 64, -2: 48}))), "float-quantized"),
    Case("fp8_group", plan(f.fp8("e4m3", f.per_group(32))), "float-quantized"),
    Case("mxfp4", plan(f.mx("e2m1"), f.mx("e2m1", dynamic=True)), "mxfp4-pack-quantized", BF16),
    Case("mxfp6", plan(f.mx("e2m3")), "mxfp6-pack-quantized", BF16),
    Case("mxfp8", plan(f.mx("e4m3")), "mxfp8-quantized", BF16),
    Case("mixed", mixed, "mixed-precision"),
    Case("inputs_only", plan(None, f.fp8()), "dense"),
]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(level)


def load(folder: Path, dtype: torch.dtype, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    unread = set(report["unexpected_keys"]) if "quantization_config" not in options else set()
    assert not unread
    assert not set(report["missing_keys"])
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(TOKENS).logits


def simulated(folder: Path, layers: list[LayerCheckpoint], dtype: torch.dtype) -> Any:
    """The original model with decoded weights and hooks that quantize activations."""
    model = load(folder / "source", dtype)

    def apply(x: Tensor, activation: Activation) -> Tensor:
        return fake_quantize(x, activation.format, activation.scales)

    for layer in layers:
        module = model.get_submodule(layer.name)
        if layer.weight is not None:
            module.weight.data = decode(layer.weight, dtype)
        if (a := layer.input) is not None:
            module.register_forward_pre_hook(lambda _, args, a=a: (apply(args[0], a),))
        if (a := layer.output) is not None:
            module.register_forward_hook(lambda _, args, out, a=a: apply(out, a))
    return model


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_logits_are_bit_identical(case: Case, tmp_path: Path) -> None:
    layers = quantized_llama(tmp_path, case.plan, case.dtype, **case.options)
    config = open_quantized(tmp_path / "out").source.config["quantization_config"]
    assert config["format"] == case.layout
    wanted = logits(simulated(tmp_path, layers, case.dtype))
    assert not torch.equal(wanted, logits(load(tmp_path / "source", case.dtype)))
    assert torch.equal(logits(load(tmp_path / "out", case.dtype)), wanted)


@pytest.mark.parametrize("fmt", [f.integer(4, f.per_group(32), symmetric=False), f.mx("e2m1")], ids=str)
def test_logits_are_bit_identical_when_dequantized(fmt: Format, tmp_path: Path) -> None:
    """Where the default load fails: packed zero points (a fault of the reader), and FP4 in float32 models."""
    from transformers import CompressedTensorsConfig

    layers = quantized_llama(tmp_path, plan(fmt))
    found = load(tmp_path / "out", F32, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert torch.equal(logits(found), logits(simulated(tmp_path, layers, F32)))


@pytest.mark.parametrize("fmt", [f.nvfp4(), f.nvfp4(four_over_six=True)], ids=str)
def test_nvfp4_weights_differ_by_rounding_only(fmt: Format, tmp_path: Path) -> None:
    """The reader divides by the reciprocal of the outer scale, then rounds to bfloat16: near a tie, a step apart."""
    layers = quantized_llama(tmp_path, plan(fmt, f.nvfp4()), BF16)
    model = load(tmp_path / "out", BF16)
    logits(model)  # decompresses
    for layer in layers:
        assert layer.weight is not None
        module, wanted = model.get_submodule(layer.name), decode(layer.weight, BF16)
        torch.testing.assert_close(module.weight, wanted, rtol=2**-7, atol=0)
        assert (module.weight != wanted).float().mean() < 0.2
        assert module.input_global_scale.item() == pytest.approx(6 * 448 / 3.7)


@pytest.mark.parametrize(
    ("weight", "layout"),
    [
        (f.integer(4, f.per_group(32)), PACK),
        (f.integer(3, f.per_channel(0)), PACK),
        (f.integer(8, f.per_group(32)), PACK),
        (f.integer(8, f.per_channel(0)), INT),  # which engines multiply as bytes
        (f.integer(4), INT),
    ],
    ids=str,
)
def test_integer_weights_with_integer_inputs(weight: Format, layout: str, tmp_path: Path) -> None:
    """Packed where vLLM multiplies packed integers with inputs that are scaled anew for each token."""
    layers = quantized_llama(tmp_path, plan(weight, f.integer(8, f.per_token(), dynamic=True)))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == layout
    model = load(tmp_path / "out", F32)
    found = logits(model)
    for layer in layers:
        assert layer.weight is not None
        assert torch.equal(model.get_submodule(layer.name).weight, decode(layer.weight, F32))
    # The reader makes the scales of symmetric inputs in its own way: a step of 8 bits more or less, here and there.
    wanted = logits(simulated(tmp_path, layers, F32))
    assert (found - wanted).norm() < 2**-5 * wanted.norm()


def test_key_value_scales_land_on_the_attention(tmp_path: Path) -> None:
    quantized_llama(tmp_path, plan(f.integer(4, f.per_group(32))), kv_cache=f.fp8())
    model = load(tmp_path / "out", F32)
    for n, block in enumerate(model.model.layers):
        assert block.self_attn.k_scale.item() == calibrated(f.fp8(), -n - 1.0, n + 1.0).scale.item()
        assert block.self_attn.v_scale.item() == calibrated(f.fp8(), -0.5, 0.5).scale.item()
    assert torch.isfinite(logits(model)).all()


def test_an_output_embedding_is_a_target_by_name(tmp_path: Path) -> None:
    """vLLM finds its output embedding by the module's name alone; transformers takes it among all linear layers."""
    source = Source(llama_source(tmp_path / "source"))
    weights = {**linear_weights(source), "lm_head": source.tensor("lm_head.weight")}
    layers = [quantized_layer(name, w, (f.integer(4, f.per_group(32)), None, None)) for name, w in weights.items()]
    write(tmp_path / "out", source, layers, ignored=())
    (group,) = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"][
        "config_groups"
    ].values()
    kind, by_name = group["targets"]
    assert kind == "Linear"
    assert by_name.startswith("re:")
    for module, wanted in (("lm_head", True), ("language_model.lm_head", True), ("my_lm_head", False)):
        assert bool(re.match(by_name.removeprefix("re:"), module)) is wanted
    assert not re.match(by_name.removeprefix("re:"), "lm_head.other")
    found = load(tmp_path / "out", F32)
    assert torch.equal(logits(found), logits(simulated(tmp_path, layers, F32)))


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    quantized_llama(tmp_path, plan(f.integer(4, f.per_group(32))), tied=True)
    kept = open_quantized(tmp_path / "out").kept
    assert "model.embed_tokens.weight" in kept
    assert "lm_head.weight" not in kept


@pytest.mark.parametrize(
    ("preset", "in_features"),
    [("W4A16", 256), ("W4A16_ASYM", 256), ("W8A8", 48), ("FP8_BLOCK", 256), ("MXFP4A16", 64), ("MXFP6A16", 64),
     ("MXFP8A16", 64), ("NVFP4A16", 64), ("W3A16", 128)],
)  # fmt: skip
def test_reads_what_compressed_tensors_itself_writes(preset: str, in_features: int, tmp_path: Path) -> None:
    """A layer compressed by their compressor; our decoding against their decompressor."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import (
        QuantizationConfig,
        initialize_module_for_quantization,
        preset_name_to_scheme,
    )

    from checkpoints.toy import toy_source

    torch.manual_seed(0)
    scheme = preset_name_to_scheme(preset, ["Linear"])
    linear = torch.nn.Linear(in_features, 40, bias=False)
    initialize_module_for_quantization(linear, scheme, force_zero_point=False)
    state = {name: value.data for name, value in linear.state_dict().items()}
    scale = torch.rand(state["weight_scale"].shape) * 0.01 + 0.001
    if scheme.weights.scale_dtype is not None:
        scale = 2.0 ** torch.randint(-9, -4, scale.shape)
    state["weight_scale"] = scale
    if "weight_global_scale" in state:
        state["weight_global_scale"] = torch.tensor([1.7])
    if "weight_zero_point" in state:
        state["weight_zero_point"] = torch.randint(-8, 8, scale.shape, dtype=torch.int8)
    layout = infer_module_format(torch.nn.Linear, scheme)
    compressor = BaseCompressor.get_value_from_registry(layout.value)
    stored = compressor.compress(state, scheme)
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=layout.value, quantization_status="compressed", ignore=["lm_head"]
    )
    tensors = {f"m.{name}": value for name, value in stored.items()}
    toy_source(tmp_path / "theirs", tensors, quantization_config=config.model_dump(mode="json"))
    found = open_quantized(tmp_path / "theirs")
    assert found.kept == []
    assert found.formats.ignored == ("lm_head",)
    weight = found.layer("m").weight
    assert weight is not None
    wanted = compressor.decompress(stored, scheme)["weight"]
    if preset.startswith("NVFP4"):
        torch.testing.assert_close(decode(weight, wanted.dtype), wanted, rtol=2**-7, atol=0)
    else:
        assert torch.equal(decode(weight, wanted.dtype), wanted)


class TestRefused:
    """Parts of compressed-tensors that would be misread."""

    def read(self, tmp_path: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> None:
        from checkpoints.toy import toy_source

        tensors = tensors or {"m.weight": torch.zeros(4, 4), "m.weight_scale": torch.ones(4, 1)}
        quantization = {"quant_method": "compressed-tensors", "quantization_status": "compressed", **config}
        open_quantized(toy_source(tmp_path / "theirs", tensors, quantization_config=quantization))

    def test_transforms(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="transform"):
            self.read(tmp_path, transform_config={"config_groups": {"R1": {}}})

    def test_sparsity(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="sparse"):
            self.read(tmp_path, sparsity_config={"format": "sparse-24-bitmask"})

    def test_unquantized_status(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="frozen"):
            self.read(tmp_path, quantization_status="frozen")

    def test_reordered(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="reordered"):
            self.read(tmp_path, {"m.weight_g_idx": torch.zeros(4)})

    def test_untargeted(self, tmp_path: Path) -> None:
        group = {"targets": ["model.other"], "weights": {"num_bits": 8}}
        with pytest.raises(ValueError, match="m has scales, but no group"):
            self.read(tmp_path, config_groups={"group_0": group})

    def test_unknown_type(self, tmp_path: Path) -> None:
        group = {"targets": ["Linear"], "weights": {"num_bits": 16, "type": "int"}}
        with pytest.raises(ValueError, match="16 bits"):
            self.read(tmp_path, config_groups={"group_0": group})
