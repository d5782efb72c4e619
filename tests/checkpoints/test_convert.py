"""`convert_checkpoint`: the same values in another format, for every layout that is registered, or a refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import detent
from checkpoints.toy import quantized_llama
from detent import DetentError, ExportOptions
from detent import formats as f
from detent.checkpoints import LayerFormats, ModelFormats, layouts, open_quantized
from detent.config import Scheme
from detent.formats import Format, decode

G32 = f.per_group(32)
BF16 = torch.bfloat16
FORMATS = (
    f.integer(4, G32),
    f.integer(4, G32, symmetric=False, signed=False),
    f.integer(8, f.per_channel(0)),
    f.fp8(),
    f.fp8(granularity=f.per_channel(0)),
    f.mx("e2m1"),
    f.nvfp4(),
)
PAIRS = [(layout, fmt) for layout in layouts if layout != "detent" for fmt in FORMATS]


def held(layout: str, fmt: Format) -> bool:
    adapted = layouts[layout].adapt(Scheme("", fmt)).weight
    assert adapted is not None
    shapes = {"model.layers.0.mlp.up_proj": (96, 64), "model.layers.0.mlp.down_proj": (64, 96)}
    formats = (ModelFormats({n: LayerFormats(s, each) for n, s in shapes.items()}) for each in (fmt, adapted))
    return any(layouts[layout].can_hold(each) is None for each in formats)


def values(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_quantized(folder)
    layers = {name: checkpoint.layer(name).weight for name in checkpoint.formats.layers}
    return {name: decode(weight) for name, weight in layers.items() if weight is not None}


def assert_same_values(one: Path, other: Path) -> None:
    ours, theirs = values(one), values(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize(("layout", "fmt"), [pair for pair in PAIRS if held(*pair)], ids=str)
def test_there_and_back(layout: str, fmt: Format, tmp_path: Path) -> None:
    quantized_llama(tmp_path, lambda name: (fmt.with_scale_dtype("float16"), None, None), torch.float16)
    adapted = layouts[layout].adapt(Scheme("", fmt)).weight
    minimum = adapted is not None and adapted.zero_point == "minimum"
    if minimum and fmt.zero_point == "int":  # float16 has -8 times a scale, and not every multiple of one
        with pytest.raises(DetentError, match=rf"{layout} would store it as \[uint4 with a minimum"):
            detent.convert_checkpoint(str(tmp_path / "out"), tmp_path / "there", ExportOptions(layout))
        return
    detent.convert_checkpoint(str(tmp_path / "out"), tmp_path / "there", ExportOptions(layout))
    detent.convert_checkpoint(str(tmp_path / "there"), tmp_path / "back", ExportOptions("detent"))
    assert_same_values(tmp_path / "there", tmp_path / "out")
    assert_same_values(tmp_path / "back", tmp_path / "out")


def test_what_another_tool_wrote(tmp_path: Path) -> None:
    """Without the description that Detent leaves in the header, with scales of activations and of keys and values."""
    plan = (f.integer(8, f.per_channel(0)), f.integer(8, f.per_tensor()), None)
    quantized_llama(tmp_path, lambda name: plan, kv_cache=f.fp8())
    file = tmp_path / "out" / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt"})
    assert not open_quantized(tmp_path / "out").described
    report = detent.convert_checkpoint(str(tmp_path / "out"), tmp_path / "there", ExportOptions("detent"))
    assert report.scheme == "compressed-tensors as detent"
    assert_same_values(tmp_path / "there", tmp_path / "out")
    there, here = open_quantized(tmp_path / "there"), open_quantized(tmp_path / "out")
    assert there.kv_scales().keys() == here.kv_scales().keys()
    for name in here.formats.layers:
        ours, theirs = here.layer(name).input, there.layer(name).input
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours.scales.scale, theirs.scales.scale)
    assert there.formats.ignored == ("lm_head",)
    detent.convert_checkpoint(str(tmp_path / "there"), tmp_path / "back", ExportOptions("compressed-tensors"))
    ours, theirs = load_file(file), load_file(tmp_path / "back" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class TestRefused:
    def source(self, tmp_path: Path, fmt: Format) -> str:
        quantized_llama(tmp_path, lambda name: (fmt, None, None), BF16)
        return str(tmp_path / "out")

    def test_no_such_grid(self, tmp_path: Path) -> None:
        source = self.source(tmp_path, f.integer(4, G32).with_scale_dtype("bfloat16"))
        options = {"scheme": "w_int3_per_group_sym", "group_size": 32}
        with pytest.raises(DetentError, match=r"layers\.0\..*would store it as \[int3 .*in which its values, \[int4"):
            detent.convert_checkpoint(source, tmp_path / "x", ExportOptions("detent"), **options)
        assert not (tmp_path / "x").exists()
        report = detent.convert_checkpoint(source, tmp_path / "x", ExportOptions("detent"), requantize=True, **options)
        assert "14 of 14 weights were rounded once more" in report.notices[-1]
        before, after = values(Path(source)), values(tmp_path / "x")
        for name, value in before.items():
            error = (after[name] - value).norm() / value.norm()
            assert 0.1 < error < 0.3  # of int3 in groups of 32

    def test_not_held(self, tmp_path: Path) -> None:
        source = self.source(tmp_path, f.mx("e3m2"))
        with pytest.raises(DetentError, match="compressed-tensors does not hold model.layers.0"):
            detent.convert_checkpoint(source, tmp_path / "x", ExportOptions("compressed-tensors"), requantize=True)
        assert not (tmp_path / "x").exists()

    def test_shared_scales_are_not_made_one_by_one(self, tmp_path: Path) -> None:
        source = self.source(tmp_path, f.integer(8, f.per_channel(0)))
        for scheme, why in (("w_fp4_scale_fp8", "a scale that layers share"), ("fp8", "not one of weights alone")):
            with pytest.raises(DetentError, match=why):
                detent.convert_checkpoint(
                    source, tmp_path / "x", ExportOptions("detent"), requantize=True, scheme=scheme
                )

    def test_a_float_checkpoint(self, tmp_path: Path) -> None:
        self.source(tmp_path, f.fp8())
        with pytest.raises(DetentError, match="is not quantized"):
            detent.convert_checkpoint(str(tmp_path / "source"), tmp_path / "x", ExportOptions("detent"))

    def test_unknown_format_and_a_group_size_alone(self, tmp_path: Path) -> None:
        source = self.source(tmp_path, f.fp8())
        with pytest.raises(DetentError, match="unknown checkpoint format 'foo'; known: hf_format, compressed-tensors"):
            detent.convert_checkpoint(source, tmp_path / "x", ExportOptions("foo"))
        with pytest.raises(DetentError, match="group_size belongs to a scheme"):
            detent.convert_checkpoint(source, tmp_path / "x", ExportOptions("detent"), group_size=32)

    def test_damaged_codes(self, tmp_path: Path) -> None:
        source = self.source(tmp_path, f.integer(4, G32))
        file = tmp_path / "out" / "model.safetensors"
        tensors = load_file(file)
        del tensors["model.layers.1.mlp.up_proj.weight_scale"]
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(DetentError, match="up_proj"):
            detent.convert_checkpoint(source, tmp_path / "x", ExportOptions("detent"))
        assert not (tmp_path / "x").exists()


def test_a_wrong_writer_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes that are wrong as they are written: nothing appears."""
    quantized_llama(tmp_path, lambda name: (f.fp8(), None, None), BF16)
    right = layouts["detent"].layer_tensors

    def wrong(layer):  # type: ignore[no-untyped-def]
        tensors = right(layer)
        if layer.name.endswith("1.mlp.up_proj"):
            tensors[f"{layer.name}.weight.scale"] = tensors[f"{layer.name}.weight.scale"] * 2
        return tensors

    monkeypatch.setattr(layouts["detent"], "layer_tensors", wrong)
    with pytest.raises(DetentError, match="up_proj decodes to other values"):
        detent.convert_checkpoint(str(tmp_path / "out"), tmp_path / "x", ExportOptions("detent"))
    assert not (tmp_path / "x").exists()
