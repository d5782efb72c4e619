"""The layouts of Quark, ModelOpt, FP8 and MXFP4: what is written comes back, other readers take it, and files laid out
by hand as their documents have it are read for what they stand for."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints import quantized_by_hand as by_hand
from checkpoints.quantized_by_hand import E2M1, save_shards
from checkpoints.test_round_trip import FORMATS, weight
from checkpoints.toy import (
    assert_same_layer,
    assert_same_tensor,
    calibrated,
    quantized_layer,
    quantized_llama,
    toy_source,
    write,
)
from detent import formats as f
from detent.checkpoints import (
    LayerCheckpoint,
    LayerFormats,
    ModelFormats,
    QuantizedWriter,
    Source,
    layouts,
    open_quantized,
    open_source,
    wanted_layouts,
)
from detent.errors import DetentError
from detent.formats import Format, decode

BLOCKS = f.fp8("e4m3", f.per_block({-1: 128, -2: 128}))
FP8_TOKEN = f.fp8("e4m3", f.per_token(), dynamic=True)
FP8_GROUP = f.fp8("e4m3", f.per_group(128), dynamic=True)
INPUTS = [
    None, f.fp8(), FP8_TOKEN, f.fp8(dynamic=True), FP8_GROUP, f.integer(8), f.integer(8, f.per_token(), dynamic=True),
    f.integer(8, signed=False, symmetric=False), f.nvfp4(), f.mx("e2m1", dynamic=True), f.mx("e4m3", dynamic=True),
]  # fmt: skip
WEIGHTS = [*FORMATS, BLOCKS, f.nvfp4(32), *(f.integer(4, f.per_group(32), symmetric=s) for s in (True, False))]
SHAPES = [(16, 96), (136, 256), (9, 96)]
#: What each layout holds, with one of `INPUTS` at least.
HELD = {
    "quark": [
        f.integer(4, f.per_group(32)), f.integer(4, f.per_channel(0), signed=False, symmetric=False), f.integer(8),
        f.integer(4, f.per_group(16), signed=False), f.fp8("e4m3", f.per_channel(0)), f.mx("e2m1"), f.mx("e3m2"),
        f.nvfp4(), f.progressive(), f.small_float("e2m1", f.per_group(16)), f.integer(8, f.per_group(24)),
    ],
    "modelopt": [
        f.fp8(), f.fp8("e4m3", f.per_channel(0)), BLOCKS, f.integer(8, f.per_channel(0)), f.integer(4, f.per_group(16)),
        f.nvfp4(), f.nvfp4(32), f.mx("e2m1"), f.mx("e4m3"),
    ],
    "fp8": [f.fp8(), BLOCKS, f.mx("e4m3")],
}  # fmt: skip


def held_pairs(name: str) -> list[tuple[Format, Format | None, tuple[int, int]]]:
    triples = itertools.product(WEIGHTS, INPUTS, SHAPES)
    return [
        (w, i, shape)
        for w, i, shape in triples
        if layouts[name].can_hold(ModelFormats({"m": LayerFormats(shape, w, i)})) is None
    ]


@pytest.mark.parametrize("name", HELD)
def test_every_format_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    pairs = held_pairs(name)
    for wanted in HELD[name]:
        assert any(w == wanted for w, _, _ in pairs), wanted
    alike: dict[str, list[LayerCheckpoint]] = {}  # a file of FP8 has one dialect
    for n, (w, i, shape) in enumerate(pairs):
        key = f"{w.granularity} {w.scale} {i}" if name == "fp8" else ""
        alike.setdefault(key, []).append(quantized_layer(f"layers.{n}.x", weight(shape, n), (w, i, None)))
    for n, layers in enumerate(alike.values()):
        out = tmp_path / str(n)
        write(out, Source(toy_source(tmp_path / "src")), layers, layout=layouts[name])
        found, source = open_quantized(out), open_source(out)
        found.check()
        assert found.kept == ["model.norm.weight"]
        for layer in layers:
            assert layer.weight is not None
            assert_same_layer(found.layer(layer.name), layer)
            assert torch.equal(source.tensor(f"{layer.name}.weight"), decode(layer.weight, torch.bfloat16))


def plain(*formats: Format | None) -> Callable[[str], Any]:
    return lambda name: (*formats, *[None] * (3 - len(formats)))


# ---- Quark ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["reorder", "order"])
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("signed", [True, False])
def test_quark_packs_nibbles_in_its_order(method: str, grouped: bool, signed: bool, tmp_path: Path) -> None:
    granularity = f.per_group(32) if grouped else f.per_channel(0)
    fmt = f.integer(4, granularity, signed=signed, symmetric=False)
    (layout,) = wanted_layouts("hf_format", "quark", pack_method=method)
    layer = quantized_layer("a", weight((16, 64)), (fmt, None, None))
    write(tmp_path / "out", Source(toy_source(tmp_path / "src")), [layer], layout=layout)
    stored, q = load_file(tmp_path / "out" / "model.safetensors"), layer.weight
    assert q is not None
    assert q.zero_point is not None
    codes, points = (q.codes.long().T, q.zero_point.long().T) if grouped else (q.codes.long(), q.zero_point.long().T)
    order = [0, 2, 4, 6, 1, 3, 5, 7] if method == "reorder" else list(range(8))
    for name, values in (("a.weight", codes), ("a.weight_zero_point", points)):
        words = stored[name].reshape(len(values), -1).long() & 0xFFFFFFFF
        for word in range(words.shape[1]):
            for place, column in enumerate(order):
                nibbles = words[:, word] >> 4 * place & 15
                assert torch.equal(nibbles, values[:, 8 * word + column] & 15)
    scale = q.scale.T if grouped else q.scale[:, 0]
    assert_same_tensor(stored["a.weight_scale"], scale.contiguous(), "scale")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["export"]["pack_method"] == method
    spec = config["global_quant_config"]["weight"]
    assert (spec["dtype"], spec["qscheme"]) == ("int4" if signed else "uint4", granularity.kind)
    assert (spec["ch_axis"], spec["group_size"], spec["symmetric"]) == ((-1, 32) if grouped else (0, None)) + (False,)


def quark_by_hand(folder: Path, tensors: dict[str, Tensor], weight: Any, **more: Any) -> Path:
    config = {"weight": weight, "input_tensors": more.pop("inputs", None), "output_tensors": None}
    quantization = {"quant_method": "quark", "global_quant_config": config, "exclude": ["lm_head"], **more}
    whole = {"model.norm.weight": torch.ones(4), **tensors}
    return save_shards(folder, whole, {"model_type": "llama", "dtype": "float32", "quantization_config": quantization})


def spec(dtype: str, qscheme: str = "per_tensor", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "qscheme": qscheme, "is_dynamic": False, "symmetric": True, **more}


def test_quark_by_hand(tmp_path: Path) -> None:
    """One input feature a row, eight output features to a word; signed nibbles, zero points of symmetric ones too."""
    codes = torch.randint(-8, 8, (32, 16), generator=torch.Generator().manual_seed(3))
    scale = torch.rand(2, 16) * 0.1 + 0.01
    shifts = torch.tensor([0, 16, 4, 20, 8, 24, 12, 28])  # of columns 0 to 7
    words = ((codes & 15).view(32, 2, 8) << shifts).sum(-1)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    stored = {"a.weight": words, "a.weight_scale": scale, "a.weight_zero_point": torch.zeros(2, 2, dtype=torch.int32)}
    config = spec("int4", "per_group", ch_axis=-1, group_size=16)
    found = open_quantized(quark_by_hand(tmp_path / "m", stored, config)).layer("a").weight
    assert found is not None
    assert torch.equal(decode(found), (codes.double() * scale.double().repeat_interleave(16, 0)).T.float())
    stored["a.weight_zero_point"] = torch.full((2, 2), 0x11111111, dtype=torch.int32)
    with pytest.raises(DetentError, match="symmetric, yet a zero point is not 0"):
        open_quantized(quark_by_hand(tmp_path / "n", stored, config)).layer("a")


def test_quark_in_two_stages_by_hand(tmp_path: Path) -> None:
    """int4 of each row on the codes of FP8: a value is code * weight_scale_2 * weight_scale, as Quark multiplies."""
    codes = torch.randint(-8, 8, (8, 16), generator=torch.Generator().manual_seed(4))
    words = ((codes & 15).view(8, 2, 8) << torch.arange(0, 32, 4)).sum(-1)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    first, second = torch.tensor(0.003), torch.rand(8) * 50 + 4
    stored = {
        "a.weight": words,
        "a.weight_scale": first,
        "a.weight_scale_2": second,
        "a.weight_zero_point_2": torch.zeros(1, dtype=torch.int32),
    }
    two = [spec("fp8_e4m3"), spec("int4", "per_channel", ch_axis=0)]
    folder = quark_by_hand(tmp_path / "m", stored, two, export={"pack_method": "order"})
    found = open_quantized(folder).layer("a").weight
    assert found is not None
    assert torch.equal(decode(found), codes.float() * second[:, None] * first)


def test_quark_scales_of_keys_and_values(tmp_path: Path) -> None:
    quantized_llama(tmp_path, plain(f.fp8(), f.fp8()), kv_cache=f.fp8(), layout=layouts["quark"])
    stored = load_file(tmp_path / "out" / "model.safetensors")
    key, value = calibrated(f.fp8(), -1.0, 1.0).scale, calibrated(f.fp8(), -0.5, 0.5).scale
    assert_same_tensor(stored["model.layers.0.self_attn.k_proj.output_scale"], key, "keys")
    assert_same_tensor(stored["model.layers.0.self_attn.v_proj.output_scale"], value, "values")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert list(config["kv_cache_quant_config"]) == ["*k_proj", "*v_proj"]
    found = open_quantized(tmp_path / "out").kv_scales()["model.layers.0.self_attn"]
    assert [s.scale.item() for s in found] == [key.item(), value.item()]


# ---- ModelOpt -------------------------------------------------------------------------------------------------------

ONE, TWO = "weight_scale", "weight_scale_2"
#: (word, weight, input, tensors of a layer [128, 256], group_size): what ModelOpt 0.47 wrote of a Llama.
GOLDEN: list[tuple[str, Format, Format | None, dict[str, tuple[torch.dtype, tuple[int, ...]]], int | None]] = [
    ("FP8", f.fp8(), f.fp8(), {"weight": (torch.float8_e4m3fn, (128, 256)), ONE: (torch.float32, ()),
     "input_scale": (torch.float32, ())}, None),
    ("W8A8_SQ_PER_CHANNEL", f.integer(8, f.per_channel(0)), f.integer(8), {"weight": (torch.int8, (128, 256)),
     ONE: (torch.float32, (128,)), "input_scale": (torch.float32, ())}, None),
    ("W8A16", f.integer(8, f.per_channel(0)), None, {"weight": (torch.int8, (128, 256)),
     ONE: (torch.float32, (128,))}, None),
    ("W4A16_AWQ", f.integer(4, f.per_group(128)), None, {"weight": (torch.uint8, (64, 256)),
     ONE: (torch.float32, (128, 2))}, 128),
    ("W4A8_AWQ", f.integer(4, f.per_group(128)), f.fp8(), {"weight": (torch.uint8, (64, 256)),
     ONE: (torch.float32, (128, 2)), TWO: (torch.float32, ()), "input_scale": (torch.float32, ())}, 128),
    ("FP8_PER_CHANNEL_PER_TOKEN", f.fp8("e4m3", f.per_channel(0)), FP8_TOKEN, {
     "weight": (torch.float8_e4m3fn, (128, 256)), ONE: (torch.float32, (128,))}, None),
    ("fp8_pb_wo", BLOCKS, None, {"weight": (torch.float8_e4m3fn, (128, 256)),
     ONE: (torch.float32, (1, 1, 2, 1))}, None),
    ("NVFP4", f.nvfp4(), f.nvfp4(), {"weight": (torch.uint8, (128, 128)), ONE: (torch.float8_e4m3fn, (128, 16)),
     TWO: (torch.float32, ()), "input_scale": (torch.float32, ())}, 16),
    ("W4A16_NVFP4", f.nvfp4(), None, {"weight": (torch.uint8, (128, 128)), ONE: (torch.float8_e4m3fn, (128, 16)),
     TWO: (torch.float32, ())}, 16),
    ("W4A8_NVFP4_FP8", f.nvfp4(32), f.fp8(), {"weight": (torch.uint8, (128, 128)), ONE: (torch.float8_e4m3fn, (128, 8)),
     TWO: (torch.float32, ()), "input_scale": (torch.float32, ())}, 32),
    ("mxfp4", f.mx("e2m1"), f.mx("e2m1", dynamic=True), {"weight": (torch.uint8, (128, 128)),
     ONE: (torch.uint8, (128, 8))}, None),
    ("MXFP8", f.mx("e4m3"), f.mx("e4m3", dynamic=True), {"weight": (torch.float8_e4m3fn, (128, 256)),
     ONE: (torch.uint8, (128, 8))}, 32),
]  # fmt: skip
FP8_ARGS = {"dynamic": False, "num_bits": 8, "type": "float"}
FP4_ARGS = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
GROUPS: dict[str, Any] = {
    "FP8": {"input_activations": FP8_ARGS, "weights": FP8_ARGS},
    "NVFP4": {"input_activations": FP4_ARGS, "weights": FP4_ARGS},
    "W4A16_NVFP4": {"weights": FP4_ARGS},
}


@pytest.mark.parametrize(("word", "weights", "inputs", "tensors", "size"), GOLDEN, ids=[case[0] for case in GOLDEN])
def test_modelopt_writes_its_golden_tables(
    word: str, weights: Format, inputs: Format | None, tensors: dict[str, Any], size: int | None, tmp_path: Path
) -> None:
    name = "model.layers.0.mlp.down_proj"
    layer = quantized_layer(name, weight((128, 256)), (weights, inputs, None))
    ignored = ("lm_head", "model.embed_tokens")
    out = write(
        tmp_path / "out", Source(toy_source(tmp_path / "src")), [layer], layout=layouts["modelopt"], ignored=ignored
    )
    stored = load_file(out / "model.safetensors")
    found = {key.removeprefix(f"{name}."): (t.dtype, tuple(t.shape)) for key, t in stored.items() if name in key}
    assert found == tensors
    beside = json.loads((out / "hf_quant_config.json").read_text())
    awq = {"has_zero_point": False, "pre_quant_scale": False} if "AWQ" in word else {}
    sized = {} if size is None else {"group_size": size}
    described = {"quant_algo": word, "kv_cache_quant_algo": None, **sized, **awq, "exclude_modules": list(ignored)}
    assert beside == {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": described}
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    groups = {"config_groups": {"group_0": {**GROUPS[word], "targets": ["Linear"]}}} if word in GROUPS else {}
    assert config == {
        **groups,
        "ignore": list(ignored),
        "quant_algo": word,
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quant_method": "modelopt",
    }


def test_modelopt_of_several_formats_lists_them(tmp_path: Path) -> None:
    def mixed(name: str) -> Any:
        return (f.fp8(), f.fp8(), None) if "attn" in name else (f.nvfp4(), f.nvfp4(), None)

    layers = quantized_llama(tmp_path, mixed, kv_cache=f.fp8(), layout=layouts["modelopt"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_algo"] == "MIXED_PRECISION"
    assert config["quantized_layers"]["model.layers.0.self_attn.q_proj"] == {"quant_algo": "FP8"}
    assert config["quantized_layers"]["model.layers.1.mlp.up_proj"] == {"quant_algo": "NVFP4", "group_size": 16}
    assert config["kv_cache_scheme"] == FP8_ARGS
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.layers.1.self_attn.v_proj.v_scale"].shape == ()
    found = open_quantized(tmp_path / "out")
    for layer in layers:
        assert_same_layer(found.layer(layer.name), layer)
    forget_description(tmp_path / "out")
    foreign = open_quantized(tmp_path / "out")
    for layer in layers:
        theirs = foreign.formats.layers[layer.name]
        assert theirs == layer.formats, layer.name


def forget_description(folder: Path) -> None:
    """As another tool would have written it."""
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("case", GOLDEN, ids=[case[0] for case in GOLDEN])
def test_modelopt_formats_are_told_by_config_and_tensors(case: Any, tmp_path: Path) -> None:
    _, weights, inputs, _, _ = case
    layer = quantized_layer("a", weight((128, 256)), (weights, inputs, None))
    out = write(tmp_path / "out", Source(toy_source(tmp_path / "src")), [layer], layout=layouts["modelopt"])
    forget_description(out)
    found = open_quantized(out)
    assert not found.described
    assert (found.formats.layers["a"].weight, found.formats.layers["a"].input) == (weights, inputs)
    assert_same_layer(found.layer("a"), layer)


def test_modelopt_int4_by_hand(tmp_path: Path) -> None:
    """Rows in pairs: the even one in the low nibble."""
    codes = torch.randint(-8, 8, (6, 32), generator=torch.Generator().manual_seed(5))
    scale = torch.rand(6, 2) * 0.1 + 0.01
    packed = (codes[::2] & 15 | (codes[1::2] & 15) << 4).to(torch.uint8)
    config = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "ignore": ["lm_head"]}
    tensors = {"model.norm.weight": torch.ones(4), "a.weight": packed, "a.weight_scale": scale}
    folder = save_shards(
        tmp_path / "m", tensors, {"model_type": "llama", "dtype": "float32", "quantization_config": config}
    )
    found = open_quantized(folder).layer("a").weight
    assert found is not None
    assert torch.equal(decode(found), (codes.double() * scale.double().repeat_interleave(16, 1)).float())
    assert torch.equal(open_source(folder).tensor("a.weight"), decode(found))


def test_modelopt_nvfp4_cache_is_read(tmp_path: Path) -> None:
    """Its scale is amax / 448, six times the scale of scales that NVFP4 has. It isn't written: that isn't exact."""
    quantized_llama(tmp_path, plain(f.nvfp4(), f.nvfp4()), kv_cache=f.fp8(), layout=layouts["modelopt"])
    forget_description(tmp_path / "out")
    (tmp_path / "out" / "hf_quant_config.json").unlink()
    folder = changed(tmp_path / "out", lambda config: config.update(kv_cache_scheme="NVFP4"))
    found = open_quantized(folder)
    assert found.formats.kv_cache == f.nvfp4()
    key, _ = found.kv_scales()["model.layers.0.self_attn"]
    assert key.outer_scale is not None
    assert key.outer_scale.item() == pytest.approx(1 / 448 / 6)
    reason = layouts["modelopt"].can_hold(ModelFormats({}, f.nvfp4()))
    assert reason is not None
    assert "only FP8 E4M3 with calibrated scales in float32" in reason
    assert layouts["fp8"].can_hold(ModelFormats({}, f.fp8().with_scale_dtype("bfloat16"))) is not None


@pytest.mark.slow
def test_modelopt_nvfp4_in_the_hands_of_compressed_tensors(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.entrypoints.convert import ModelOptNvfp4Converter, convert_checkpoint
    from compressed_tensors.quantization import preset_name_to_scheme

    layers = quantized_llama(tmp_path, plain(f.nvfp4(), f.nvfp4()), torch.bfloat16, layout=layouts["modelopt"])
    converter = ModelOptNvfp4Converter(ignore=["lm_head"], targets=["re:.*proj$"])
    convert_checkpoint(str(tmp_path / "out"), str(tmp_path / "ct"), converter, max_workers=1)
    stored, scheme = load_file(tmp_path / "ct" / "model.safetensors"), preset_name_to_scheme("NVFP4", ["Linear"])
    for layer in layers:
        assert layer.weight is not None
        keys = ("weight_packed", "weight_scale", "weight_global_scale")
        tensors = {key: stored[f"{layer.name}.{key}"] for key in keys}
        found = NVFP4PackedCompressor.decompress(tensors, scheme)["weight"]
        # The converter stores the reciprocal of the outer scale, rounded: a unit in the last place of bfloat16 at most.
        torch.testing.assert_close(found.bfloat16(), decode(layer.weight, torch.bfloat16), rtol=2**-7, atol=0)


# ---- FP8 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "inputs", "config"),
    [
        (f.fp8("e4m3", f.per_block({-1: 32, -2: 32})), f.fp8("e4m3", f.per_group(32), dynamic=True), "fp8"),
        (f.mx("e4m3"), f.mx("e4m3", dynamic=True), "mxfp8"),
    ],
    ids=["blocks", "mxfp8"],
)
def test_fp8_in_the_hands_of_transformers(weights: Format, inputs: Format, config: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    layers = quantized_llama(tmp_path, plain(weights, inputs), layout=layouts["fp8"])
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (said["quant_method"], said["activation_scheme"]) == (config, "dynamic")
    assert said["modules_to_not_convert"] == ["lm_head"]
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    for layer in layers:
        assert layer.weight is not None
        assert torch.equal(model.get_parameter(f"{layer.name}.weight"), decode(layer.weight))


def autofp8(folder: Path, static: bool = True, **more: Any) -> tuple[Path, Tensor]:
    stored, values = by_hand.fp8("a.weight", weight((24, 64)), "tensor")
    if not static:
        stored = {name: tensor for name, tensor in stored.items() if "input" not in name}
    stored["model.layers.0.self_attn.k_scale"] = torch.tensor([0.02])
    stored["model.layers.0.self_attn.v_scale"] = torch.tensor([0.03])
    scheme = "static" if static else "dynamic"
    config = {"quant_method": "fp8", "activation_scheme": scheme, "ignored_layers": ["lm_head"], **more}
    whole = {"model.norm.weight": torch.ones(4), **stored}
    described = {"model_type": "llama", "dtype": "float32", "quantization_config": config}
    return save_shards(folder, whole, described), values


def test_autofp8_by_hand(tmp_path: Path) -> None:
    for static in (True, False):
        folder, values = autofp8(tmp_path / str(static), static)
        found = open_quantized(folder)
        layer = found.layer("a")
        assert layer.weight is not None
        assert torch.equal(decode(layer.weight), values.float())
        assert found.formats.layers["a"].input == f.fp8(dynamic=not static)
        assert (found.kept, found.formats.ignored) == (["model.norm.weight"], ("lm_head",))
        scales = found.kv_scales()["model.layers.0.self_attn"]
        assert [s.scale.item() for s in scales] == pytest.approx([0.02, 0.03])
    tensors = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    tensors = {name: tensor for name, tensor in tensors.items() if "self_attn" not in name}
    tensors["model.layers.0.self_attn.kv_scale"] = torch.tensor(0.04)  # of its first versions: one for both
    old = save_shards(tmp_path / "old", tensors, json.loads((folder / "config.json").read_text()))
    both = open_quantized(old).kv_scales()["model.layers.0.self_attn"]
    assert [s.scale.item() for s in both] == pytest.approx([0.04, 0.04])


def test_deepseek_by_hand(tmp_path: Path) -> None:
    """The last blocks are cut off, as in its own projection of keys and values."""
    stored, values = by_hand.fp8_blocks("a.weight", weight((200, 300)))
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
    described = {"model_type": "llama", "dtype": "float32", "quantization_config": config}
    layer = open_quantized(save_shards(tmp_path / "m", stored, described)).layer("a")
    assert layer.weight is not None
    assert torch.equal(decode(layer.weight), values.float())
    assert layer.input is not None
    assert layer.input.format == FP8_GROUP


@pytest.mark.parametrize(("rows", "refused"), [(128, False), (64, False), (576, False), (200, True), (256, False)])
def test_blocks_that_transformers_would_misread_are_refused(rows: int, refused: bool) -> None:
    """It takes rows / blocks for the length of a block: 200 rows in blocks of 128 for two of 100."""
    formats = ModelFormats({"a": LayerFormats((rows, 256), BLOCKS, FP8_GROUP)})
    reason = layouts["fp8"].can_hold(formats)
    assert (reason is not None) == refused
    assert not refused or "transformers would take them for 2 equal ones" in str(reason)


# ---- MXFP4 of gpt-oss -----------------------------------------------------------------------------------------------

EXPERTS = "model.layers.0.mlp.experts"


def experts(count: int = 3, hidden: int = 64, inner: int = 32) -> list[LayerCheckpoint]:
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    return [
        quantized_layer(f"{EXPERTS}.{e}.{kind}_proj", weight(shape, 9 * e + n), (f.mx("e2m1"), None, None))
        for e in range(count)
        for n, (kind, shape) in enumerate(shapes.items())
    ]


def write_experts(folder: Path, layers: list[LayerCheckpoint]) -> Path:
    formats = ModelFormats({layer.name: layer.formats for layer in layers}, ignored=("lm_head",))
    source = Source(toy_source(folder / "src", {"a": torch.ones(2)}, dtype="float32"))
    with QuantizedWriter(folder / "out", source=source, formats=formats, layout=layouts["mxfp4"]) as writer:
        for layer in layers:
            names, _ = writer.add_layer(layer)
            assert all(name.startswith(f"{EXPERTS}.") and name.endswith(("_blocks", "_scales")) for name in names)
        writer.add_tensor("a", source.tensor("a"))
        return writer.finish()


def test_experts_are_stacked_as_gpt_oss_has_them(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    layers = experts()
    out = write_experts(tmp_path, layers[::-1])  # in any order
    stored = load_file(out / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in stored.items() if name != "a"} == {
        f"{EXPERTS}.gate_up_proj_blocks": (3, 64, 2, 16),
        f"{EXPERTS}.gate_up_proj_scales": (3, 64, 2),
        f"{EXPERTS}.down_proj_blocks": (3, 64, 1, 16),
        f"{EXPERTS}.down_proj_scales": (3, 64, 1),
    }
    found = open_quantized(out)
    found.check()
    assert found.kept == ["a"]
    for layer in layers:
        assert_same_layer(found.layer(layer.name), layer)
    values = {layer.name: decode(layer.weight, torch.bfloat16) for layer in layers if layer.weight is not None}
    for stack in ("gate_up_proj", "down_proj"):
        name = f"{EXPERTS}.{stack}"
        theirs = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
        assert torch.equal(open_source(out).tensor(name).to(torch.bfloat16), theirs)
        for e in range(3):
            if stack == "down_proj":
                assert torch.equal(theirs[e].T, values[f"{EXPERTS}.{e}.down_proj"])
            else:
                assert torch.equal(theirs[e].T[0::2], values[f"{EXPERTS}.{e}.gate_proj"])
                assert torch.equal(theirs[e].T[1::2], values[f"{EXPERTS}.{e}.up_proj"])


def test_stacks_of_a_run_that_was_interrupted(tmp_path: Path) -> None:
    """Those that were finished are left as they are; a part that comes again, to be compared, changes nothing."""
    layers, whole = experts(), load_file(write_experts(tmp_path / "once", experts()) / "model.safetensors")
    formats = ModelFormats({layer.name: layer.formats for layer in layers}, ignored=("lm_head",))
    source = Source(toy_source(tmp_path / "src", {"a": torch.ones(2)}, dtype="float32"))
    options: dict[str, Any] = {"source": source, "formats": formats, "layout": layouts["mxfp4"]}
    options |= {"progress": tmp_path / "unfinished", "max_shard_size": 1}
    with QuantizedWriter(tmp_path / "out", **options) as writer:
        names = {layer.name: writer.add_layer(layer)[0] for layer in layers}
    with QuantizedWriter(tmp_path / "out", **options) as writer:
        for n, layer in enumerate(layers):
            skipped = n > 0 and writer.skip_layer(layer.name, names[layer.name], {})
            assert skipped == (n > 0 and "down" not in layer.name)  # the last file wasn't finished
            if not skipped:
                writer.add_layer(layer)
        writer.add_tensor("a", source.tensor("a"))
        out = writer.finish()
    found = {name: t for path in out.glob("*.safetensors") for name, t in load_file(path).items()}
    for name, tensor in whole.items():
        assert_same_tensor(found[name], tensor, name)


def test_experts_of_gpt_oss_by_hand(tmp_path: Path) -> None:
    codes = torch.randint(0, 16, (2, 6, 64), generator=torch.Generator().manual_seed(6))
    blocks = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8).view(2, 6, 2, 16)
    scales = torch.randint(120, 126, (2, 6, 2), dtype=torch.uint8)
    stored = {f"{EXPERTS}.gate_up_proj_blocks": blocks, f"{EXPERTS}.gate_up_proj_scales": scales}
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    folder = save_shards(tmp_path / "m", stored, {"model_type": "gpt_oss", "quantization_config": config})
    found = open_quantized(folder)
    assert list(found.formats.layers) == [f"{EXPERTS}.{e}.{p}_proj" for e in range(2) for p in ("gate", "up")]
    values = E2M1[codes] * (2.0 ** (scales.double() - 127)).repeat_interleave(32, -1)
    for e in range(2):
        for first, kind in enumerate(("gate", "up")):
            q = found.layer(f"{EXPERTS}.{e}.{kind}_proj").weight
            assert q is not None
            assert torch.equal(decode(q).double(), values[e, first::2])


# ---- what is refused ------------------------------------------------------------------------------------------------

GATE = LayerFormats((32, 64), f.mx("e2m1"))
DOWN = LayerFormats((64, 32), f.mx("e2m1"))


@pytest.mark.parametrize(
    ("name", "layers", "words"),
    [
        ("quark", {"a": LayerFormats((8, 8), f.integer(3))}, "only those of 4 and 8 bits"),
        ("quark", {"a": LayerFormats((12, 64), f.integer(4, f.per_group(32)))}, "eight codes share a word"),
        ("quark", {"a": LayerFormats((8, 64), f.mx("e4m3"))}, "MXFP4 and MXFP6 alone"),
        ("quark", {"a": LayerFormats((8, 40), f.integer(8, f.per_group(32)))}, "no short last group"),
        ("quark", {"a": LayerFormats((8, 8), f.integer(8), kind="Embedding")}, "Embedding modules"),
        ("quark", {"a": LayerFormats((8, 8), None, f.fp8())}, "only activations are quantized"),
        ("quark", {"a": LayerFormats((8, 8), f.integer(8), rotated=8)}, "rotated at run time"),
        ("quark", {"a": LayerFormats((8, 8), f.fp8(), f.fp8().with_scale_dtype("bfloat16"))}, "only in float32"),
        ("modelopt", {"a": LayerFormats((8, 64), f.mx("e4m3"))}, "no quant_algo stands for weight e4m3"),
        ("modelopt", {"a": LayerFormats((9, 64), f.integer(4, f.per_group(32)))}, "two rows share a byte"),
        ("fp8", {"a": LayerFormats((8, 64), f.fp8())}, "w_fp8_a_fp8"),
        ("fp8", {"a": LayerFormats((8, 8), f.fp8(), f.fp8()), "b": LayerFormats((8, 8), f.fp8(), FP8_TOKEN)}, "alike"),
        ("mxfp4", {"a": GATE}, "experts alone in MXFP4"),
        ("mxfp4", {f"{EXPERTS}.0.gate_proj": GATE, f"{EXPERTS}.0.up_proj": GATE}, "all experts and projections"),
        (
            "mxfp4",
            {f"{EXPERTS}.0.gate_proj": GATE, f"{EXPERTS}.0.up_proj": GATE, f"{EXPERTS}.1.down_proj": DOWN},
            "all experts and projections",
        ),
        ("mxfp4", {f"{EXPERTS}.0.up_proj": LayerFormats((8, 64), f.nvfp4())}, "only MXFP4"),
        ("mxfp4", {f"{EXPERTS}.0.up_proj": LayerFormats((8, 64), f.mx("e2m1"), f.fp8())}, "use w_mxfp4"),
    ],
)
def test_what_a_layout_does_not_hold(name: str, layers: dict[str, LayerFormats], words: str) -> None:
    reason = layouts[name].can_hold(ModelFormats(layers))
    assert reason is not None
    assert reason.startswith(f"{name} does not hold ")
    assert words in reason


def test_the_engines_that_read_a_layout() -> None:
    def engines(name: str, weights: Format, inputs: Format | None) -> set[str]:
        return set(layouts[name].needs(ModelFormats({"a": LayerFormats((32, 64), weights, inputs)})))

    assert engines("fp8", f.fp8(), f.fp8()) == {"vLLM", "SGLang"}
    assert engines("fp8", f.mx("e4m3"), f.mx("e4m3", dynamic=True)) == {"vLLM", "SGLang", "transformers"}
    assert engines("modelopt", f.nvfp4(), f.nvfp4()) == {"TensorRT-LLM", "vLLM", "SGLang"}
    assert engines("modelopt", f.integer(4, f.per_group(32)), None) == {"TensorRT-LLM"}
    assert engines("quark", f.integer(4, f.per_group(32)), None) == {"Quark", "transformers", "vLLM", "SGLang"}
    assert engines("quark", f.integer(8), None) == {"Quark", "transformers"}


def test_a_refusal_names_a_layout_that_holds_the_model() -> None:
    from detent.checkpoints import choose

    with pytest.raises(DetentError, match="fp8 does not hold a: .* the layout compressed-tensors holds the model"):
        choose(ModelFormats({"a": LayerFormats((8, 64), f.integer(4))}), wanted_layouts("hf_format", "fp8"))
    with pytest.raises(DetentError, match="unknown pack_method 'x'; known: reorder, order"):
        wanted_layouts("quark_format", pack_method="x")


def changed(folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("layout", "formats", "edit", "words"),
    [
        ("quark", (f.fp8(), f.fp8()), lambda c: c["export"].update(pack_method="order"), None),
        ("quark", (f.fp8(), f.fp8()), lambda c: c["export"].update(pack_method="x"), "unknown pack_method"),
        ("quark", (f.fp8(), f.fp8()), lambda c: c["global_quant_config"]["weight"].update(dtype="int8"), "edited"),
        ("modelopt", (f.fp8(), f.fp8()), lambda c: c.update(quant_algo="NVFP4"), "quant_algo .* edited"),
        ("fp8", (f.fp8(), f.fp8()), lambda c: c.update(activation_scheme="dynamic"), "activation_scheme .* edited"),
        ("fp8", (f.fp8(), f.fp8()), lambda c: c.update(weight_block_size=[128, 128]), None),
    ],
)
def test_config_that_contradicts_what_was_written(
    layout: str, formats: Any, edit: Any, words: str | None, tmp_path: Path
) -> None:
    quantized_llama(tmp_path, plain(*formats), layout=layouts[layout])
    folder = changed(tmp_path / "out", edit)
    if words is None:  # what nothing in the file depends on
        open_quantized(folder).check()
    else:
        with pytest.raises(DetentError, match=words):
            open_quantized(folder)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c: c.update(activation_scheme="maybe"), "activation_scheme"),
        (lambda c: c.update(weight_block_size=[0, 1]), "weight_block_size"),
        (lambda c: c.update(weight_block_size=[32, 32]), "not activation_scheme static"),
        (lambda c: c.update(ignored_layers="lm_head"), "ignored_layers"),
    ],
)
def test_fp8_config_that_makes_no_sense(edit: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(DetentError, match=words):
        open_quantized(changed(autofp8(tmp_path / "m")[0], edit))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a.weight_scale": None}, "a.weight .* form that Detent does not decode"),
        ({"a.input_scale": None}, "holds no tensor 'a.input_scale'"),
        ({"a.weight_scale": torch.tensor(float("inf"))}, "scales from inf"),
        ({"a.weight_scale": torch.tensor(0.0)}, "scales from 0"),
        ({"a.weight_scale": torch.tensor(3)}, "no scale of FP8"),
        ({"a.input_scale": torch.tensor([1.0, 2.0])}, r"a.input_scale is torch.float32 with shape \(2,\)"),
        ({"a.input_scale": torch.tensor(-1.0)}, "scales from -1"),
        ({"model.layers.0.self_attn.v_scale": None}, "holds no tensor 'model.layers.0.self_attn.v_scale'"),
        ({"model.layers.0.self_attn.k_scale": torch.tensor(float("nan"))}, "scales from nan"),
        ({"a.pre_quant_scale": torch.ones(64)}, "pre_quant_scale"),
        ({"b.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}, "b.weight"),
    ],
)
def test_fp8_tensors_that_are_damaged(change: dict[str, Tensor | None], words: str, tmp_path: Path) -> None:
    folder, _ = autofp8(tmp_path / "m")
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    tensors = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
    again = save_shards(tmp_path / "n", tensors, json.loads((folder / "config.json").read_text()))
    with pytest.raises(DetentError, match=words):
        open_quantized(again).check()


def test_modelopt_config_that_makes_no_sense(tmp_path: Path) -> None:
    stored, _ = by_hand.nvfp4("a.weight", weight((24, 64)))

    def folder(name: str, quantization: dict[str, Any], beside: Any = None, **tensors: Tensor) -> Path:
        config = {"model_type": "llama", "quantization_config": {"quant_method": "modelopt", **quantization}}
        made = save_shards(tmp_path / name, stored | tensors, config)
        if beside is not None:
            (made / "hf_quant_config.json").write_text(json.dumps(beside))
        return made

    with pytest.raises(DetentError, match="'W3A7' is not read by Detent; known: FP8"):
        open_quantized(folder("a", {"quant_algo": "W3A7"}))
    with pytest.raises(DetentError, match="which is not FP8"):
        open_quantized(folder("b", {"quant_algo": "FP8"}))
    with pytest.raises(DetentError, match="NVFP4, but FP8 in hf_quant_config.json"):
        open_quantized(folder("c", {"quant_algo": "NVFP4"}, {"quantization": {"quant_algo": "FP8"}}))
    layers = {"b": {"quant_algo": "FP8"}}
    with pytest.raises(DetentError, match="quantized_layers doesn't have it"):
        open_quantized(folder("d", {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}))
    with pytest.raises(DetentError, match="quant_algo"):
        open_quantized(folder("e", {"quant_algo": 4}))
    beside = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}
    found = open_quantized(folder("f", {}, beside))
    assert found.formats.layers["a"].input == f.nvfp4()
    assert found.formats.ignored == ("lm_head",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gate_up_proj_scales": None}, "gate_up_proj_scales"),
        ({"gate_up_proj_scales": torch.zeros(3, 64, 3, dtype=torch.uint8)}, "its blocks"),
        ({"gate_up_proj_scales": torch.zeros(3, 64, 2)}, "float32"),
        ({"gate_up_proj_blocks": torch.zeros(3, 64, 2, 15, dtype=torch.uint8)}, "of 16 bytes"),
        ({"gate_up_proj_scales": torch.full((3, 64, 2), 255, dtype=torch.uint8)}, "scale is NaN"),
    ],
)
def test_experts_that_are_damaged(change: dict[str, Tensor | None], words: str, tmp_path: Path) -> None:
    out = write_experts(tmp_path, experts())
    tensors = load_file(out / "model.safetensors") | {f"{EXPERTS}.{key}": value for key, value in change.items()}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    again = save_shards(tmp_path / "n", kept, json.loads((out / "config.json").read_text()))
    with pytest.raises(DetentError, match=words):
        open_quantized(again).check()


def test_caches_that_are_not_read(tmp_path: Path) -> None:
    quantized_llama(tmp_path, plain(f.fp8(), f.fp8()), kv_cache=f.fp8(), layout=layouts["modelopt"])
    forget_description(tmp_path / "out")
    (tmp_path / "out" / "hf_quant_config.json").unlink()
    for scheme in ("NVFP4_AFFINE", {"dynamic": False, "num_bits": 8, "type": "int"}):
        folder = changed(tmp_path / "out", lambda config, scheme=scheme: config.update(kv_cache_scheme=scheme))
        with pytest.raises(DetentError, match=r"a key/value cache in .* is not read by Detent; it reads FP8 and NVFP4"):
            open_quantized(folder)
    stored = {"a.weight": torch.ones(8, 4, dtype=torch.int8), "a.weight_scale": torch.tensor(0.1)}
    cache = {"*k_proj": {"output_tensors": spec("int8")}}
    with pytest.raises(DetentError, match="a key/value cache in int8 per_tensor"):
        open_quantized(quark_by_hand(tmp_path / "q", stored, spec("int8"), kv_cache_quant_config=cache))


def test_quark_scales_of_a_cache_that_are_there_twice(tmp_path: Path) -> None:
    """Where scales of keys and values were merged, the attention module has them too."""
    quantized_llama(tmp_path, plain(f.fp8(), f.fp8()), kv_cache=f.fp8(), layout=layouts["quark"])
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for side in "kv":
        for n in range(2):
            name = f"model.layers.{n}.self_attn"
            tensors[f"{name}.{side}_scale"] = tensors[f"{name}.{side}_proj.output_scale"].clone()
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    found = open_quantized(tmp_path / "out")
    found.check()
    assert found.formats.kv_cache == f.fp8()
    assert not [name for name in found.kept if name.endswith("_scale")]
    assert found.formats.layers["model.layers.0.self_attn.k_proj"].output is None


def test_quark_specs_that_are_not_read(tmp_path: Path) -> None:
    stored = {"a.weight": torch.ones(8, 4, dtype=torch.int8), "a.weight_scale": torch.tensor(0.1)}
    for n, (wanted, words) in enumerate(
        {
            "int3": "int3 with float scales",
            "per_block": "scales per_block",
            "per_group": "scales per_group along axis None",
        }.items()
    ):
        config = spec("int8", wanted) if wanted.startswith("per") else spec(wanted)
        with pytest.raises(DetentError, match=words):
            open_quantized(quark_by_hand(tmp_path / str(n), stored, config))
    with pytest.raises(DetentError, match="no format for its weight"):
        open_quantized(quark_by_hand(tmp_path / "none", stored, None))
    with pytest.raises(DetentError, match="by class of layers"):
        open_quantized(quark_by_hand(tmp_path / "t", stored, spec("int8"), layer_type_quant_config={"x": {}}))
