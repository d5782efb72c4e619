"""The layouts of AutoAWQ and GPTQ, against their definition in Python's integers and another library's reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoints import int4_by_hand as by_hand
from checkpoints.quantized_by_hand import save_shards
from checkpoints.toy import assert_same_layer, quantized_llama
from detent import formats as f
from detent.checkpoints import LayerFormats, ModelFormats, Source, layouts, open_quantized, open_source, wanted_layouts
from detent.checkpoints.gptq import GptqLayout
from detent.errors import DetentError
from detent.formats import Format, decode

NAME = "model.layers.0.self_attn.q_proj.weight"
LAYER = NAME.removesuffix(".weight")


def ints(bits: int, group: int | None = 32, **options: Any) -> Format:
    granularity = f.per_channel(0) if group is None else f.per_group(group)
    return f.integer(bits, granularity, **options).with_scale_dtype("float16")


def uniform(fmt: Format | None) -> Any:
    return lambda layer: (fmt, None, None)


INT4 = {
    "signed": ints(4),
    "narrow": ints(4, narrow=True),
    "unsigned": ints(4, signed=False),
    "asymmetric": ints(4, symmetric=False),
    "unsigned, asymmetric": ints(4, symmetric=False, signed=False),
    "rows": ints(4, None, symmetric=False),
}


@pytest.mark.parametrize("fmt", INT4.values(), ids=INT4)
def test_awq_as_its_readers_see_it(fmt: Format, tmp_path: Path) -> None:
    layers = quantized_llama(tmp_path, uniform(fmt), torch.bfloat16, layout=layouts["awq"])
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    checkpoint = open_quantized(tmp_path / "out")
    checkpoint.check()
    for layer in layers[:4]:
        assert layer.weight is not None
        group = fmt.granularity.group_size or -1
        assert torch.equal(by_hand.awq_values(tensors, layer.name, group).float(), decode(layer.weight))
        assert_same_layer(checkpoint.layer(layer.name), layer)
    described = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert described["zero_point"] is True
    assert described["modules_to_not_convert"] == ["lm_head"]


@pytest.mark.parametrize("fmt", [INT4["signed"], INT4["unsigned, asymmetric"]], ids=str)
def test_awq_as_compressed_tensors_converts_it(fmt: Format, tmp_path: Path) -> None:
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq")
    from compressed_tensors.compressors import unpack_from_int32

    layers = quantized_llama(tmp_path, uniform(fmt), torch.bfloat16, layout=layouts["awq"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    converter = converters.AutoAWQConverter.from_autoawq_config(config)
    tensors = converter.process(load_file(tmp_path / "out" / "model.safetensors"))
    for layer in layers:
        packed, scale, zeros = (tensors[f"{layer.name}.weight_{part}"] for part in ("packed", "scale", "zero_point"))
        codes = unpack_from_int32(packed, 4, torch.Size(layer.shape)).double()
        points = unpack_from_int32(zeros, 4, torch.Size(scale.shape), packed_dim=0).double()
        values = (codes - points.repeat_interleave(32, 1)) * scale.double().repeat_interleave(32, 1)
        assert layer.weight is not None
        assert torch.equal(values.float(), decode(layer.weight))


@pytest.mark.parametrize("version", [None, 1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["signed", "unsigned", "asymmetric", "rows"])
def test_gptq_as_its_readers_see_it(kind: str, bits: int, version: int | None, tmp_path: Path) -> None:
    options: dict[str, Any] = {"unsigned": {"signed": False}, "asymmetric": {"symmetric": False}}.get(kind, {})
    fmt = ints(bits, None if kind == "rows" else 32, **options)
    layout = GptqLayout().with_details(gptq_version=version, pack_method="order")
    if version == 1 and kind == "asymmetric":
        formats = ModelFormats({"a": LayerFormats((32, 32), fmt)})
        assert "no zero point of 0" in (layout.can_hold(formats) or "")
        return
    layers = quantized_llama(tmp_path, uniform(fmt), torch.bfloat16, layout=layout)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    described = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert described == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    less_one = version == 1 or (version is None and kind != "asymmetric")
    assert described["checkpoint_format"] == ("gptq" if less_one else "gptq_v2")
    checkpoint = open_quantized(tmp_path / "out")
    checkpoint.check()
    for layer in layers[:4]:
        assert layer.weight is not None
        assert torch.equal(by_hand.gptq_values(tensors, layer.name, bits, less_one).float(), decode(layer.weight))
        assert_same_layer(checkpoint.layer(layer.name), layer)
    if fmt.symmetric:
        stored = {2: -1431655766, 4: -2004318072, 8: -2139062144}
        if version == 2 and bits in stored:
            assert set(tensors[f"{LAYER}.qzeros"].unique().tolist()) == {stored[bits]}


def test_gptq_of_several_formats(tmp_path: Path) -> None:
    """Layers that differ, and those that stay, as GPTQModel has it: the first pattern that matches a name."""
    import re

    def plan(name: str) -> Any:
        special = ints(8, 32) if "down_proj" in name else ints(4, None) if "layers.1.mlp.up" in name else ints(4)
        return special, None, None

    layers = quantized_llama(tmp_path, plan, torch.bfloat16, layout=layouts["gptq"], ignored=("lm_head", "re:.*x$"))
    described = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (described["bits"], described["group_size"], described["sym"]) == (4, 32, True)

    def of(name: str) -> dict[str, Any] | None:
        for pattern, more in described["dynamic"].items():
            if re.match(pattern[2:], name):
                return None if pattern.startswith("-:") else described | more
        return described

    assert of("lm_head") is None
    assert of("model.x") is None
    for layer in layers:
        own = of(layer.name)
        assert own is not None
        fmt = plan(layer.name)[0]
        assert (own["bits"], own["group_size"]) == (fmt.bits, fmt.granularity.group_size or -1)
    checkpoint = open_quantized(tmp_path / "out")
    for layer in layers:
        assert_same_layer(checkpoint.layer(layer.name), layer)


# ---- what others wrote ----------------------------------------------------------------------------------------------

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
SHUFFLED = (torch.arange(96) // 32)[torch.randperm(96, generator=torch.Generator().manual_seed(1))]


def cases() -> dict[str, tuple[tuple[dict[str, Tensor], Tensor], dict[str, Any]]]:
    torch.manual_seed(0)
    round_ = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "data_type": "int"}
    found: dict[str, Any] = {
        "awq": (by_hand.awq(NAME, 64, 96, 32), AWQ),
        "awq, old names": (by_hand.awq(NAME, 64, 96, 32), {"quant_method": "awq", "w_bit": 4, "q_group_size": 32}),
        "awq, rows": (by_hand.awq(NAME, 64, 96, 96), AWQ | {"group_size": -1, "version": "GEMM"}),
        "awq, symmetric": (by_hand.awq(NAME, 64, 96, 32, symmetric=True), AWQ | {"zero_point": False}),
        "gptq, no index": (by_hand.gptq(NAME, 64, 96, 32, 4, index=False), GPTQ),
        "gptq, symmetric": (by_hand.gptq(NAME, 64, 96, 32, 4, symmetric=True), GPTQ | {"sym": True}),
        "gptq, order": (by_hand.gptq(NAME, 64, 96, 32, 4, order=SHUFFLED), GPTQ | {"desc_act": True}),
        "gptq, order, symmetric": (
            by_hand.gptq(NAME, 64, 96, 32, 4, order=SHUFFLED, symmetric=True),
            GPTQ | {"desc_act": True, "sym": True},
        ),
        "gptq, rows": (by_hand.gptq(NAME, 64, 96, 96, 8), GPTQ | {"bits": 8, "group_size": -1}),
        "gptq, short group": (by_hand.gptq(NAME, 32, 96, 64, 4), GPTQ | {"group_size": 64}),
        "gptq v2": (by_hand.gptq(NAME, 64, 96, 32, 4, less_one=False), GPTQ | {"checkpoint_format": "gptq_v2"}),
        "gptq v2, other name": (by_hand.gptq(NAME, 64, 96, 32, 4, less_one=False), GPTQ | {"format": "gptq_v2"}),
        "gptq, dynamic": (
            by_hand.gptq(NAME, 64, 96, 32, 8),
            GPTQ | {"dynamic": {"+:.*q_proj": {"bits": 8}, "-:lm_head": {}}},
        ),
        "AutoRound": (by_hand.gptq(NAME, 64, 96, 32, 4), round_ | {"packing_format": "auto_round:auto_gptq"}),
        "AutoRound, own": (
            by_hand.gptq(NAME, 64, 96, 32, 4, less_one=False, index=False),
            round_ | {"packing_format": "auto_round:gptqmodel", "extra_config": {"lm_head": {"bits": 16}}},
        ),
        "AutoRound, AWQ": (by_hand.awq(NAME, 64, 96, 32), round_ | {"packing_format": "auto_round:auto_awq"}),
        "AutoRound, mixed": (
            by_hand.gptq(NAME, 64, 96, 96, 2),
            round_ | {"packing_format": "auto_round:auto_gptq", "extra_config": {LAYER: {"bits": 2, "group_size": -1}}},
        ),
    }
    for bits in (2, 3, 8):
        found[f"gptq, {bits} bits"] = by_hand.gptq(NAME, 64, 96, 32, bits), GPTQ | {"bits": bits}
    return found


CASES = cases()


def folder_of(folder: Path, stored: dict[str, Tensor], quantization: dict[str, Any] | None) -> Path:
    whole = {"model.norm.weight": torch.ones(4), "lm_head.weight": torch.ones(5, 4), **stored}
    described = {} if quantization is None else {"quantization_config": quantization}
    return save_shards(folder, whole, {"model_type": "llama", "dtype": "float32", **described})


@pytest.mark.parametrize("case", CASES)
def test_what_others_wrote(case: str, tmp_path: Path) -> None:
    (stored, values), quantization = CASES[case]
    folder = folder_of(tmp_path / "m", stored, quantization)
    checkpoint = open_quantized(folder)
    checkpoint.check()
    assert not checkpoint.described
    assert sorted(checkpoint.kept) == ["lm_head.weight", "model.norm.weight"]
    weight = checkpoint.layer(LAYER).weight
    assert weight is not None
    assert weight.format.symmetric == ("symmetric" in case)
    assert torch.equal(decode(weight), values.float())
    source = open_source(folder)
    assert sorted(source) == ["lm_head.weight", NAME, "model.norm.weight"]
    assert torch.equal(source.tensor(NAME), values.float())


@pytest.mark.parametrize("base", [None, "gptq_model-4bit-32g"])
def test_autogptq_before_transformers_knew_it(base: str | None, tmp_path: Path) -> None:
    (stored, values), quantization = CASES["gptq, no index"]
    folder = folder_of(tmp_path / "m", stored, None)
    with pytest.raises(DetentError, match="no quantization_config that says how"):
        open_source(folder)
    old = {key: value for key, value in quantization.items() if key != "quant_method"}
    (folder / "quantize_config.json").write_text(json.dumps(old | {"model_file_base_name": base}))
    if base is not None:
        from safetensors.torch import save_file

        for file in folder.glob("model*"):
            file.unlink()
        save_file(stored | {"lm_head.weight": torch.ones(5, 4)}, folder / f"{base}.safetensors")
    assert torch.equal(open_source(folder).tensor(NAME), values.float())
    assert open_quantized(folder).method == "gptq"
    with pytest.raises(DetentError, match=r"quantized already \(gptq\)"):
        Source(folder)


def test_a_float_model_beside_the_settings_of_another(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", {NAME: torch.ones(4, 4)}, None)
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4}))
    assert type(open_source(folder)) is Source


# ---- refusals -------------------------------------------------------------------------------------------------------


def formats_of(fmt: Format | None, shape: tuple[int, ...] = (64, 64), **options: Any) -> ModelFormats:
    return ModelFormats({LAYER: LayerFormats(shape, fmt, **options)})


@pytest.mark.parametrize(
    ("formats", "said", "awq"),
    [
        (formats_of(ints(4), input=f.fp8(dynamic=True)), "its input is quantized", None),
        (formats_of(ints(4), rotated=64), "rotated at run time", None),
        (formats_of(ints(4), low_rank=4), "low-rank", None),
        (formats_of(ints(4), kind="Conv1D"), "Conv1D", None),
        (formats_of(ints(4), (64, 64, 3)), r"shape (64, 64, 3)", None),
        (formats_of(f.fp8()), "only integers", None),
        (formats_of(ints(5)), "codes of 5 bits; those of 2, 3, 4, 8 bits", "codes of 5 bits; those of 4 bits"),
        (formats_of(f.integer(4, f.per_group(32))), "float32 scale", None),
        (formats_of(ints(4, symmetric=False, float_zero_point=True)), "zero points are codes", None),
        (formats_of(f.integer(4).with_scale_dtype("float16")), "each row needs scales", None),
        (formats_of(ints(4, 64), (64, 96)), "shorter than 64, which no reader takes; 32 would fit", None),
        (formats_of(ints(4, None), (64, 72)), "72 input features, not a multiple of 32", ""),
        (formats_of(ints(4, None), (36, 64)), "36 output features, not a multiple of 32", "not a multiple of 8"),
    ],
)
def test_what_is_not_held(formats: ModelFormats, said: str, awq: str | None, tmp_path: Path) -> None:
    assert said in (layouts["gptq"].can_hold(formats) or "")
    found = layouts["awq"].can_hold(formats)
    assert (found is None) if awq == "" else (awq or said) in (found or "")


def test_what_no_model_of_weights_alone_has() -> None:
    whole = {LAYER: LayerFormats((64, 64), ints(4))}
    for name in ("awq", "gptq"):
        reason = layouts[name].can_hold(ModelFormats(whole, kv_cache=f.fp8()))
        assert "weights alone" in (reason or "")
    mixed = {"a": LayerFormats((64, 64), ints(4)), "b": LayerFormats((64, 64), ints(4, 64))}
    assert "one group size" in (layouts["awq"].can_hold(ModelFormats(mixed)) or "")
    named_alike = ModelFormats({"x.gate_proj": LayerFormats((64, 64), ints(4))}, ignored=("x.gate",))
    assert "x.gate in its name" in (layouts["awq"].can_hold(named_alike) or "")
    unlike = {"a": LayerFormats((64, 64), ints(4)), "b": LayerFormats((64, 64), ints(4, symmetric=False))}
    assert "version 2 of gptq holds both" in (layouts["gptq"].can_hold(ModelFormats(unlike)) or "")
    (second,) = wanted_layouts("gptq", gptq_version=2)
    assert second.can_hold(ModelFormats(unlike)) is None
    with pytest.raises(DetentError, match="gptq_version is 1 or 2, not 3"):
        wanted_layouts("gptq", gptq_version=3)


def test_engines() -> None:
    for fmt, engines in ((ints(4), 4), (ints(8), 4), (ints(3), 2), (ints(4, symmetric=False), 2)):
        assert len(layouts["gptq"].needs(formats_of(fmt))) == engines
    assert layouts["awq"].needs(formats_of(ints(4)))["transformers"] == "the package gptqmodel"


def test_patterns_of_what_stays_become_parts_of_names() -> None:
    formats = ModelFormats(
        {"m.layers.0.mlp.experts.0.w1": LayerFormats((64, 64), ints(4))},
        ignored=("lm_head", r"re:.*\.layers\.\d+\.mlp\.gate$", r"re:.*\.\d+\.vision\..*"),
    )
    assert layouts["awq"].can_hold(formats) is None
    config = layouts["awq"].quantization_config(formats)
    assert config["modules_to_not_convert"] == ["lm_head", ".mlp.gate", ".vision."]


Q, Z, S, G = (f"{LAYER}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx"))


@pytest.mark.parametrize(
    ("case", "change", "quantization", "words"),
    [
        ("awq", {S: None}, {}, ["holds no tensor", S]),
        ("awq", {Z: None}, {}, ["holds no tensor", Z]),
        ("awq", {Z: None, S: None}, {"zero_point": False}, [S]),
        ("awq", {Z: torch.ones(3, 7, dtype=torch.int32)}, {}, [Z, "(3, 7)", "(3, 8)"]),
        ("awq", {S: torch.ones(3, 64, dtype=torch.int32)}, {}, [S, "int32"]),
        ("awq", {S: torch.full((3, 64), torch.inf).half()}, {}, [S, "inf"]),
        ("awq", {S: torch.full((3, 64), torch.nan).half()}, {}, [S, "nan"]),
        ("awq", {S: torch.zeros(3, 64).half()}, {}, [S, "must be positive"]),
        ("awq", {Q: torch.ones(96, 8)}, {}, [Q, "float32"]),
        ("awq", {Q: torch.ones(96, dtype=torch.int32)}, {}, [Q, "(96,)"]),
        ("awq", {}, {"group_size": 64}, ["96 rows", "64"]),
        ("awq", {}, {"group_size": 0}, ["group_size", "not 0"]),
        ("awq", {}, {"bits": 8}, ["bits", "8"]),
        ("awq", {}, {"version": "gemv"}, ["gemv", "only 'gemm'"]),
        ("awq", {}, {"zero_point": False}, ["symmetric", "zero point"]),
        ("gptq, rows", {Q: None, Z: None, S: None, G: None}, {}, ["no quantized weight"]),
        ("gptq, symmetric", {Z: None}, {}, [Z]),
        ("gptq, symmetric", {Z: torch.ones(3, 7, dtype=torch.int32)}, {}, [Q, "no number of bits"]),
        ("gptq, symmetric", {Q: torch.ones(11, 64, dtype=torch.int32)}, {}, [G, "(96,)", "(88,)"]),
        ("gptq, symmetric", {}, {"checkpoint_format": "gptq_v2"}, ["the zero point 7", "symmetric"]),
        ("gptq, symmetric", {}, {"bits": 8}, ["4 bits", "config.json says of no layer"]),
        ("gptq, symmetric", {}, {"group_size": 64}, ["3 groups in 96"]),
        ("gptq, symmetric", {}, {"checkpoint_format": "marlin"}, ["marlin"]),
        ("gptq, symmetric", {}, {"checkpoint_format": "gptq", "format": "gptq_v2"}, ["gptq", "gptq_v2"]),
        ("gptq, symmetric", {}, {"is_marlin_format": True}, ["Marlin"]),
        ("gptq, symmetric", {}, {"bits": "4"}, ["bits"]),
        ("gptq, order", {G: SHUFFLED.to(torch.int32) + 1}, {}, [G, "1 to 3", "0 to 2"]),
        ("gptq, order", {G: SHUFFLED.to(torch.int32) - 1}, {}, [G, "-1 to 1"]),
        ("gptq, order", {G: SHUFFLED}, {}, [G, "int64"]),
        ("gptq, order", {G: SHUFFLED[:95].to(torch.int32)}, {}, [G, "(95,)"]),
        ("AutoRound", {}, {"packing_format": "auto_round:llm_compressor"}, ["auto_round:llm_compressor"]),
        ("AutoRound", {}, {"data_type": "mx_fp"}, ["mx_fp"]),
        ("AutoRound", {}, {"act_bits": 8}, ["8-bit activations"]),
        ("AutoRound, mixed", {}, {"extra_config": {LAYER: {"bits": "2"}}}, ["extra_config"]),
    ],
)
def test_damage(
    case: str, change: dict[str, Tensor | None], quantization: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    (stored, _), described = CASES[case]
    tensors = {name: tensor for name, tensor in (stored | change).items() if tensor is not None}
    folder = folder_of(tmp_path / "m", tensors, described | quantization)
    for opened in (lambda: open_quantized(folder).check(), lambda: open_source(folder).tensor(NAME)):
        with pytest.raises(DetentError) as refusal:
            opened()
        assert all(word in str(refusal.value) for word in [str(folder), *words]), str(refusal.value)


@pytest.mark.parametrize(
    ("key", "value"), [("bits", 8), ("group_size", 16), ("sym", False), ("checkpoint_format", "gptq_v2")]
)
def test_a_configuration_that_was_edited(key: str, value: object, tmp_path: Path) -> None:
    quantized_llama(tmp_path, uniform(ints(4)), torch.bfloat16, layout=layouts["gptq"])
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"][key] = value
    path.write_text(json.dumps(config))
    with pytest.raises(DetentError, match="one of the two (was edited|is wrong)"):
        open_quantized(tmp_path / "out").check()
