"""read(write(q)) == q, bit for bit, for every format, in every layout that holds it; and what lies on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints.toy import (
    assert_same_layer,
    assert_same_tensor,
    calibrated,
    llama_source,
    quantized_layer,
    toy_source,
    write,
)
from detent import formats as f
from detent.checkpoints import (
    Activation,
    LayerCheckpoint,
    LayerFormats,
    ModelFormats,
    QuantizedWriter,
    Source,
    choose,
    layouts,
    open_quantized,
)
from detent.checkpoints.quantized import PREFERRED
from detent.errors import DetentError
from detent.formats import Format

GRANULARITIES = [
    f.per_tensor(),
    f.per_channel(0),
    f.per_channel(1),
    f.per_group(16),
    f.per_group(24),
    f.per_token(),
    f.per_block({-1: 16, -2: 8}),
]
INTEGERS = [
    f.integer(bits, signed=signed, symmetric=symmetric, rule=rule)
    for bits in range(2, 9)
    for signed in (True, False)
    for symmetric, rule in ((True, "qmax"), (True, "half_range"), (False, "half_range"))
]
FLOATS = [f.small_float(kind, f.per_tensor()) for kind in ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1")]
OTHERS = [
    *(f.mx(kind) for kind in ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "int8")),
    f.mx("e2m1", rounding="floor"),
    f.nvfp4(),
    f.nvfp4(four_over_six=True),
    f.nvfp4(32, scale="ue5m3"),
    f.bfp16(),
    *(f.micro_exponent(n) for n in (4, 6, 9)),
    f.progressive(),
    f.nf4(f.per_group(16)),
    f.integer(4, f.per_group(16), symmetric=False, float_zero_point=True),
    f.integer(5, f.per_group(16), narrow=True),
    f.integer(4, f.per_group(16)).with_scale_dtype("bfloat16"),
    f.integer(4, f.per_group(16), signed=False, symmetric=False).with_scale_dtype("float16"),
    f.small_float("e2m1", f.per_group(16), scale_dtype="e4m3"),
    *f.GGUF_FORMATS.values(),
]
FORMATS: list[Format] = [fmt.with_granularity(g) for fmt in INTEGERS + FLOATS for g in GRANULARITIES] + OTHERS
#: Rows and columns that fill no byte, word, group, block or pair.
SHAPES = [(9, 96), (5, 43), (1, 1)]


def weight(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x.view(-1)[::7] = 0.0
    return x * 0.05


@pytest.mark.parametrize("layout", [layouts[name] for name in PREFERRED], ids=lambda layout: layout.name)
def test_every_format_comes_back_bit_for_bit(layout, tmp_path: Path) -> None:
    layers = []
    for number, (fmt, shape) in enumerate((fmt, shape) for fmt in FORMATS for shape in SHAPES):
        formats = LayerFormats(shape, fmt)
        if layout.can_hold(ModelFormats({"m": formats})) is None:
            layers.append(quantized_layer(f"layers.{number}", weight(shape, number), (fmt, None, None)))
    assert len(layers) > (150 if layout.name == "compressed-tensors" else len(FORMATS) * len(SHAPES) - 1)
    write(tmp_path / "out", Source(toy_source(tmp_path / "src")), layers, layout=layout, ignored=())
    found = open_quantized(tmp_path / "out")
    assert found.method == layout.name
    assert list(found.formats.layers) == [layer.name for layer in layers]
    for layer in layers:
        assert_same_layer(found.layer(layer.name), layer)
    assert found.kept == ["model.norm.weight"]


def test_integers_beside_calibrated_inputs_come_back(tmp_path: Path) -> None:
    """They are stored unpacked, and signed, whatever their width."""
    layers = [
        quantized_layer(f"layers.{n}", weight((9, 96), n), (fmt.with_granularity(f.per_channel(0)), f.integer(8), None))
        for n, fmt in enumerate(fmt for fmt in INTEGERS if fmt.element.minimum < 0 or fmt.zero_point != "none")
    ]
    write(
        tmp_path / "out", Source(toy_source(tmp_path / "src")), layers, layout=layouts["compressed-tensors"], ignored=()
    )
    found, stored = open_quantized(tmp_path / "out"), load_file(tmp_path / "out" / "model.safetensors")
    for layer in layers:
        assert stored[f"{layer.name}.weight"].dtype == torch.int8
        assert_same_layer(found.layer(layer.name), layer)
    assert int(stored[f"{layers[-1].name}.weight"].min()) < 0


def test_other_shapes_and_kinds(tmp_path: Path) -> None:
    """Convolutions, vectors, empty tensors: in Detent's own layout."""
    shapes = {"Conv2d": (6, 5, 3, 3), "Conv1d": (4, 3, 5), "Vector": (13,), "Empty": (0, 16)}
    formats = [f.integer(3, f.per_channel(0)), f.integer(5), f.micro_exponent(6), f.mx("e3m2"), f.fp8()]
    layers = [
        quantized_layer(f"{kind}.{n}", weight(shape), (fmt, None, None), kind)
        for kind, shape in shapes.items()
        for n, fmt in enumerate(formats)
    ]
    write(tmp_path / "out", Source(toy_source(tmp_path / "src")), layers, ignored=())
    found = open_quantized(tmp_path / "out")
    assert found.method == "detent"
    for layer in layers:
        assert_same_layer(found.layer(layer.name), layer)


@pytest.mark.parametrize("layout", [layouts[name] for name in PREFERRED], ids=lambda layout: layout.name)
def test_negative_scales_of_weights_come_back(layout, tmp_path: Path) -> None:
    """Algorithms choose them for integers with a code to spare below zero."""
    layer = quantized_layer("layers.0", weight((32, 64), 0), (f.integer(4, f.per_group(32)), None, None))
    assert layer.weight is not None
    layer.weight.scale[::2].neg_()
    write(tmp_path / "out", Source(toy_source(tmp_path / "src")), [layer], layout=layout, ignored=())
    assert_same_layer(open_quantized(tmp_path / "out").layer("layers.0"), layer)


ACTIVATIONS = [
    f.integer(8),
    f.integer(8, dynamic=True),
    f.integer(8, f.per_token(), dynamic=True),
    f.integer(8, signed=False),
    f.integer(8, signed=False, symmetric=False),
    f.integer(8, symmetric=False),
    f.integer(4, signed=False, symmetric=False),
    f.fp8(),
    f.fp8().with_scale_dtype("bfloat16"),
    f.fp8("e5m2"),
    f.nvfp4(),
    f.nvfp4(dynamic=True),
    f.mx("e2m1", dynamic=True),
    f.micro_exponent(6, dynamic=True),
    f.integer(8, symmetric=False, float_zero_point=True),
]


@pytest.mark.parametrize("layout", [layouts[name] for name in PREFERRED], ids=lambda layout: layout.name)
def test_activations_come_back(layout, tmp_path: Path) -> None:
    int4, layers = f.integer(4, f.per_group(32)), []
    for number, fmt in enumerate(ACTIVATIONS):
        for side in (0, 1):
            formats = (int4, *((fmt, None) if side == 0 else (None, fmt)))
            layer = quantized_layer(f"layers.{number}.{side}", weight((32, 64)), formats)
            if layout.can_hold(ModelFormats({"m": layer.formats})) is None:
                layers.append(layer)
    assert len(layers) >= 20
    write(tmp_path / "out", Source(toy_source(tmp_path / "src")), layers, layout=layout, ignored=())
    found = open_quantized(tmp_path / "out")
    for layer in layers:
        assert_same_layer(found.layer(layer.name), layer)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_unsigned_codes_beside_activations_are_stored_signed(bits: int, tmp_path: Path) -> None:
    """A byte each, the middle of the range at zero, whatever the width."""
    weights, inputs = (f.integer(bits, g, signed=False, symmetric=False) for g in (f.per_channel(0), f.per_token()))
    formats = weights, inputs.as_dynamic()
    layer = quantized_layer("m", weight((32, 64)), (*formats, None))
    write(
        tmp_path / "out",
        Source(toy_source(tmp_path / "src")),
        [layer],
        layout=layouts["compressed-tensors"],
        ignored=(),
    )
    assert layer.weight is not None
    stored = load_file(tmp_path / "out" / "model.safetensors")["m.weight"]
    assert stored.dtype == torch.int8
    assert torch.equal(stored.long(), layer.weight.codes.long() - 2 ** (bits - 1))
    assert_same_layer(open_quantized(tmp_path / "out").layer("m"), layer)


def test_activation_scales_per_channel_come_back(tmp_path: Path) -> None:
    fmt = f.integer(8, f.per_channel(-1))
    low = -torch.rand(1, 64) - 0.1
    scales = f.scales_from_range(fmt, low, -low)
    layer = LayerCheckpoint("m", (32, 64), None, Activation(fmt, scales))
    write(tmp_path / "out", Source(toy_source(tmp_path / "src")), [layer], ignored=())
    found = open_quantized(tmp_path / "out")
    assert found.method == "detent"
    assert_same_layer(found.layer("m"), layer)


@pytest.mark.parametrize("layout", [layouts[name] for name in PREFERRED], ids=lambda layout: layout.name)
@pytest.mark.parametrize("fmt", [f.fp8(), f.integer(8), f.fp8().with_scale_dtype("bfloat16")], ids=str)
def test_key_value_scales_come_back(layout, fmt: Format, tmp_path: Path) -> None:
    source = Source(llama_source(tmp_path / "src"))
    write(tmp_path / "out", source, [], kv_cache=fmt, layout=layout, ignored=("a", "b"))
    found = open_quantized(tmp_path / "out")
    assert found.formats == ModelFormats({}, fmt, ("a", "b"))
    scales = found.kv_scales()
    assert list(scales) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    for n, (key, value) in enumerate(scales.values()):
        assert_same_tensor(key.scale, calibrated(fmt, -n - 1.0, n + 1.0).scale, "k")
        assert_same_tensor(value.scale, calibrated(fmt, -0.5, 0.5).scale, "v")
    assert set(found.kept) == set(source)


def test_dynamic_key_values_have_no_scales(tmp_path: Path) -> None:
    fmt = f.integer(8, f.per_token(), dynamic=True)
    write(tmp_path / "out", Source(llama_source(tmp_path / "src")), [], kv_cache=fmt)
    found = open_quantized(tmp_path / "out")
    assert (found.method, found.formats.kv_cache, found.kv_scales()) == ("detent", fmt, {})


@pytest.mark.parametrize(
    ("fmt", "bits_per_element"),
    [
        (f.micro_exponent(4), 4),
        (f.micro_exponent(6), 6),
        (f.micro_exponent(9), 9),
        (f.bfp16(), 9),
        (f.mx("e3m2"), 6.25),
        (f.nf4(f.per_group(64)), 4.5),
        (f.mx("e5m2"), 8.25),
        (f.integer(3, f.per_group(64), float_zero_point=True, symmetric=False), 4),
        (f.integer(4, f.per_group(64), signed=False, symmetric=False), 4.5625),
    ],
    ids=str,
)
def test_bits_on_disk_are_those_of_the_format(fmt: Format, bits_per_element: float, tmp_path: Path) -> None:
    shape = (32, 128)
    layer = quantized_layer("m", weight(shape), (fmt, None, None))
    write(tmp_path / "out", Source(toy_source(tmp_path / "src")), [layer], layout=layouts["detent"], ignored=())
    stored = {name: t for name, t in load_file(tmp_path / "out" / "model.safetensors").items() if name.startswith("m.")}
    assert sum(t.numel() * t.element_size() for t in stored.values()) * 8 == bits_per_element * 32 * 128
    assert fmt.bits_per_element(shape) == bits_per_element


def test_codes_are_packed_least_significant_bit_first(tmp_path: Path) -> None:
    """Against numpy's unpackbits: 5-bit two's complement (MX6) of rows that end within a byte."""
    layer = quantized_layer("m", weight((3, 13)), (f.micro_exponent(6), None, None))
    write(tmp_path / "out", Source(toy_source(tmp_path / "src")), [layer], ignored=())
    packed = load_file(tmp_path / "out" / "model.safetensors")["m.weight.codes"].numpy()
    assert packed.shape == (3, 9)  # 65 bits
    bits = np.unpackbits(packed, axis=1, bitorder="little")[:, :65].reshape(3, 13, 5)
    values = (bits * [1, 2, 4, 8, -16]).sum(-1)
    assert layer.weight is not None
    assert values.tolist() == layer.weight.codes.tolist()


def test_choose_prefers_compressed_tensors_and_says_why_not() -> None:
    held = {"model.a": LayerFormats((64, 64), f.integer(4, f.per_group(32)))}
    layout, reasons = choose(ModelFormats(held))
    assert (layout.name, reasons) == ("compressed-tensors", [])
    layout, reasons = choose(ModelFormats({**held, "model.b": LayerFormats((64, 64), f.micro_exponent(6))}))
    assert layout.name == "detent"
    assert len(reasons) == 1
    assert "model.b" in reasons[0]


@pytest.mark.parametrize(
    ("layer", "word"),
    [
        (LayerFormats((64, 60), f.integer(4, f.per_group(32))), "short last group"),
        (LayerFormats((64, 60), f.mx("e2m1")), "multiple of 32"),
        (LayerFormats((64, 40), f.nvfp4()), "multiple of 16"),
        (LayerFormats((64, 64), f.nvfp4(32)), "groups of 16"),
        (LayerFormats((64, 64), f.mx("e3m2")), "E2M3"),
        (LayerFormats((64, 64), f.mx("int8")), "MXFP4"),
        (LayerFormats((64, 64), f.bfp16()), "MXFP4"),
        (LayerFormats((64, 64), f.fp8("e5m2")), "e5m2"),
        (LayerFormats((64, 64), f.nf4()), "nf4"),
        (LayerFormats((64, 64), f.progressive()), "progressive"),
        (LayerFormats((64, 64), f.integer(4, symmetric=False, float_zero_point=True)), "zero points"),
        (LayerFormats((64, 64), f.small_float("e2m1", f.per_group(16), scale_dtype="e4m3")), "outer scale"),
        (LayerFormats((64, 64), f.integer(4, f.per_channel(1))), "per block"),
        (LayerFormats((64, 64), f.integer(4, f.per_block({-1: 32, -2: 32}))), "per block"),
        (LayerFormats((8, 8, 3, 3), f.integer(8), kind="Conv2d"), "Conv2d"),
        (LayerFormats((8, 64), f.integer(8), kind="Embedding"), "Embedding"),
        (LayerFormats((8, 8, 8), f.integer(8)), "matrices"),
        (LayerFormats((64, 64), f.nvfp4(), f.nvfp4(dynamic=True)), "outer scale is dynamic"),
        (LayerFormats((64, 64), None, f.integer(8, f.per_channel(-1))), "calibrated"),
        (LayerFormats((64, 64), None, f.integer(8, narrow=True)), "narrow"),
        (LayerFormats((64, 64), None, f.mx("e2m1")), "recomputed"),
        (LayerFormats((64, 48), None, f.mx("e2m1", dynamic=True)), "short last group"),
        (LayerFormats((64, 64), None, f.micro_exponent(6, dynamic=True)), "power-of-two"),
    ],
    ids=str,
)
def test_compressed_tensors_refuses_what_its_reader_cannot_read(layer: LayerFormats, word: str) -> None:
    reason = layouts["compressed-tensors"].can_hold(ModelFormats({"model.x": layer}))
    assert reason is not None
    assert "model.x" in reason
    assert word in reason


@pytest.mark.parametrize(
    "fmt", [f.fp8(dynamic=True), f.integer(8, symmetric=False), f.integer(4), f.fp8("e5m2")], ids=str
)
def test_compressed_tensors_refuses_other_caches(fmt: Format) -> None:
    assert layouts["compressed-tensors"].can_hold(ModelFormats({}, fmt)) is not None


def test_kept_tensors_keep_names_dtypes_and_bits(tmp_path: Path) -> None:
    tensors = {
        "model.embed.weight": torch.randn(5, 4).bfloat16(),
        "model.norm.weight": torch.tensor([1.0, float("nan"), -0.0]),
        "experts.gate_up_proj": torch.randn(2, 4, 4).half(),
        "buffer": torch.arange(3),
        "flag": torch.tensor(True),
    }
    source = Source(toy_source(tmp_path / "src", tensors))
    layer = quantized_layer("m", weight((4, 32)), (f.integer(4), None, None))
    write(tmp_path / "out", source, [layer])
    found = open_quantized(tmp_path / "out")
    assert sorted(found.kept) == sorted(tensors)
    for name, tensor in tensors.items():
        assert_same_tensor(found.tensor(name), tensor, name)
    assert found.config == source.config


class TestBadRequests:
    """What the writer and the reader refuse."""

    def formats(self) -> ModelFormats:
        return ModelFormats({"m": LayerFormats((4, 32), f.integer(4))})

    def test_missing_layer(self, tmp_path: Path) -> None:
        source = Source(toy_source(tmp_path / "src"))
        with (
            pytest.raises(DetentError, match="not written: m"),
            QuantizedWriter(tmp_path / "out", source=source, formats=self.formats()) as writer,
        ):
            writer.finish()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]

    def test_unannounced_layer(self, tmp_path: Path) -> None:
        source = Source(toy_source(tmp_path / "src"))
        other = quantized_layer("m", weight((4, 32)), (f.integer(5), None, None))
        with QuantizedWriter(tmp_path / "out", source=source, formats=self.formats()) as writer:
            with pytest.raises(DetentError, match="not announced"):
                writer.add_layer(other)
            same = quantized_layer("m", weight((4, 32)), (f.integer(4), None, None))
            writer.add_layer(same)
            with pytest.raises(DetentError, match="twice"):
                writer.add_layer(same)

    def test_layout_that_cannot_hold_it(self, tmp_path: Path) -> None:
        formats = ModelFormats({"m": LayerFormats((4, 32), f.bfp16())})
        source, layout = Source(toy_source(tmp_path / "src")), layouts["compressed-tensors"]
        with pytest.raises(DetentError, match="does not hold m"):
            QuantizedWriter(tmp_path / "out", source=source, formats=formats, layout=layout)

    def test_not_quantized(self, tmp_path: Path) -> None:
        with pytest.raises(DetentError, match="not quantized"):
            open_quantized(toy_source(tmp_path / "src"))

    def test_other_method(self, tmp_path: Path) -> None:
        path = toy_source(tmp_path / "src", quantization_config={"quant_method": "bitsandbytes"})
        with pytest.raises(DetentError, match="bitsandbytes; Detent reads compressed-tensors, detent"):
            open_quantized(path)

    def test_static_without_scales(self) -> None:
        with pytest.raises(DetentError, match="needs calibrated scales"):
            Activation(f.fp8())
        with pytest.raises(DetentError, match="has no calibrated scales"):
            Activation(f.fp8(dynamic=True), calibrated(f.fp8()))

    @pytest.mark.parametrize("fmt", [f.integer(4, f.per_group(32)), f.micro_exponent(6), f.nvfp4()], ids=str)
    def test_missing_and_misshapen_tensors(self, fmt: Format, tmp_path: Path) -> None:
        layer = quantized_layer("m", weight((4, 64)), (fmt, None, None))
        out = write(tmp_path / "out", Source(toy_source(tmp_path / "src")), [layer], ignored=())
        with Source(out, quantized=True)._file("model.safetensors") as file:  # to keep the metadata
            metadata = file.metadata()
        tensors = load_file(out / "model.safetensors")
        scale = next(name for name in tensors if name.endswith(("weight_scale", "weight.scale")))
        whole = tensors.pop(scale)
        save_file(tensors, out / "model.safetensors", metadata=metadata)
        with pytest.raises(DetentError, match=scale):
            open_quantized(out).layer("m")
        save_file({**tensors, scale: whole[:3].clone()}, out / "model.safetensors", metadata=metadata)
        with pytest.raises(DetentError, match=f"{scale} is .* as config.json says"):
            open_quantized(out).layer("m")

    @pytest.mark.parametrize("damage", ["version", "formats", "layers", "kv_cache"])
    def test_damaged_description(self, damage: str, tmp_path: Path) -> None:
        layer = quantized_layer("m", weight((4, 64)), (f.bfp16(), None, None))
        out = write(tmp_path / "out", Source(toy_source(tmp_path / "src")), [layer])
        config = json.loads((out / "config.json").read_text())
        config["quantization_config"][damage] = 99
        (out / "config.json").write_text(json.dumps(config))
        with pytest.raises(DetentError, match="version 99|damaged"):
            open_quantized(out)
