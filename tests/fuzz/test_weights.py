"""Weight files with some of their bytes changed: read, refused in one clear sentence, and never NaN."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import detent
from checkpoints.test_vendor_layouts import experts, write_experts
from checkpoints.toy import llama_source, quantized_llama, toy_source
from detent import formats as f
from detent.checkpoints import Source, layouts, open_quantized, open_source
from detent.checkpoints.gguf.imatrix import read_imatrix, write_imatrix
from detent.formats import decode
from detent.report.contents import contents
from fuzz.mutations import changed, clear, dose, flipped

pytestmark = pytest.mark.fuzz


@dose(0.3)
@given(st.data())
def test_float_checkpoint(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = toy_source(tmp_path_factory.mktemp("float") / "m", {"a": torch.ones(3, 4), "b": torch.ones(2).half()})
    path = folder / "model.safetensors"
    path.write_bytes(data.draw(flipped(path.read_bytes(), 200)))
    clear(contents, folder)
    source = clear(Source, folder)
    for name in source or ():
        assert source is not None
        clear(source.tensor, name)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, formats in {
        "packed": (f.integer(4, f.per_group(32), symmetric=False), None, None),
        "fp8": (f.fp8(), f.fp8(), None),
        "nvfp4": (f.nvfp4(), f.nvfp4(), None),
        "detent": (f.nf4(), f.fp8("e5m2"), None),
        "quark": (f.integer(4, f.per_group(32), symmetric=False), f.integer(8), None),
        "modelopt": (f.nvfp4(), f.nvfp4(), None),
        "autofp8": (f.fp8(), f.fp8(), None),
    }.items():
        out = tmp_path_factory.mktemp(name)
        layout = layouts.get({"autofp8": "fp8"}.get(name, name if name in ("quark", "modelopt") else ""))
        quantized_llama(out, lambda layer, formats=formats: formats, kv_cache=f.fp8(), layout=layout)  # type: ignore[misc]
        folders[name] = out / "out"
    asymmetric = f.integer(4, f.per_group(32), symmetric=False).with_scale_dtype("float16")
    for name, fmt in {"awq": asymmetric, "gptq": asymmetric, "mlx": f.searched(f.Integer(4, signed=False), 32)}.items():
        out = tmp_path_factory.mktemp(name)
        quantized_llama(out, lambda layer, fmt=fmt: (fmt, None, None), layout=layouts[name])  # type: ignore[misc]
        folders[name] = out / "out"
    folders["mxfp4"] = write_experts(tmp_path_factory.mktemp("mxfp4"), experts())
    return folders


FOREIGN = ["quark", "modelopt", "autofp8", "mxfp4"]


@dose(0.15)
@given(st.data())
@pytest.mark.parametrize("layout", ["awq", "gptq", "mlx"])
@pytest.mark.parametrize("described", [True, False])
def test_weights_alone(layout: str, described: bool, quantized: dict[str, Path], data: Any) -> None:
    """As Detent wrote it, and as if another tool had; config.json is changed as well."""
    folder = quantized[layout]
    paths = folder / "model.safetensors", folder / "config.json"
    originals = [path.read_bytes() for path in paths]
    try:
        if not described:
            with safe_open(paths[0], "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            save_file(tensors, paths[0], metadata={"format": "pt"})
        whole = paths[0].read_bytes()
        if data.draw(st.booleans()):
            paths[0].write_bytes(data.draw(flipped(whole, 8 + int.from_bytes(whole[:8], "little"))))
        config = json.loads(originals[1])
        key = "quantization" if layout == "mlx" else "quantization_config"
        paths[1].write_text(json.dumps({**config, key: data.draw(changed(config[key]))}))
        clear(contents, folder)
        checkpoint = clear(open_quantized, folder)
        for layer in [] if checkpoint is None else list(checkpoint.formats.layers):
            assert checkpoint is not None
            found = clear(checkpoint.layer, layer)
            if found is not None and found.weight is not None:
                assert not bool(decode(found.weight).isnan().any())
        source = clear(open_source, folder)
        for name in source or ():
            assert source is not None
            clear(source.tensor, name)
    finally:
        for path, content in zip(paths, originals, strict=True):
            path.write_bytes(content)


@dose(0.15)
@given(st.data())
@pytest.mark.parametrize("name", ["packed", "fp8", "nvfp4", "detent", *FOREIGN])
def test_quantized_checkpoint(name: str, quantized: dict[str, Path], data: Any) -> None:
    path = quantized[name] / "model.safetensors"
    original = path.read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    try:
        path.write_bytes(data.draw(flipped(original, header)))
        clear(contents, quantized[name])
        checkpoint = clear(open_quantized, quantized[name])
        for layer in [] if checkpoint is None else list(checkpoint.formats.layers):
            assert checkpoint is not None
            found = clear(checkpoint.layer, layer)
            if found is not None and found.weight is not None:
                assert not bool(decode(found.weight).isnan().any())
    finally:
        path.write_bytes(original)


@dose(0.15)
@given(st.data())
@pytest.mark.parametrize("name", FOREIGN)
def test_what_other_tools_wrote(name: str, quantized: dict[str, Path], tmp_path_factory: Any, data: Any) -> None:
    """A configuration with something changed, and weights without a description: also as a source."""
    folder = tmp_path_factory.mktemp("foreign")
    config = json.loads((quantized[name] / "config.json").read_text())
    config["quantization_config"] = data.draw(changed(config["quantization_config"]))
    with contextlib.suppress(UnicodeEncodeError):  # half of a surrogate pair is no text
        (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(quantized[name] / "model.safetensors")
    for gone in data.draw(st.lists(st.sampled_from(sorted(tensors)), max_size=1)):
        del tensors[gone]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for opened in (clear(open_quantized, folder), clear(open_source, folder)):
        if opened is not None and hasattr(opened, "formats"):
            clear(opened.check)
            for layer in list(opened.formats.layers)[:3]:
                clear(opened.layer, layer)
        elif opened is not None:
            for tensor in list(opened)[:5]:
                clear(opened.tensor, tensor)


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


CONFIGS: dict[str, Any] = {
    "ranges": detent.INT8_DEFAULT_CFG,
    "packed": {"quant_cfg": {"*weight_quantizer": {"num_bits": 4, "block_sizes": {-1: 16}}}, "algorithm": "max"},
    "sequence": {"quant_cfg": {"*weight_quantizer": [{"num_bits": 4, "block_sizes": {-1: 16}}, {"num_bits": (4, 3)}]}},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {}
    for name, config in CONFIGS.items():
        model = detent.quantize(make(), config, lambda m: m(torch.ones(2, 32)))
        if name == "packed":
            detent.compress(model)
        paths[name] = tmp_path_factory.mktemp("saved") / name
        detent.save(model, paths[name])
    return paths


def restore(path: Path) -> None:
    model = clear(detent.restore, make, path)
    if model is not None:
        assert not bool(model(torch.ones(2, 32)).isnan().any())


@dose(0.15)
@given(st.data())
@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_of_saved_models(name: str, saved: dict[str, Path], tmp_path_factory: Any, data: Any) -> None:
    original = saved[name].read_bytes()
    path = tmp_path_factory.mktemp("restore") / "m"
    path.write_bytes(data.draw(flipped(original, 8 + int.from_bytes(original[:8], "little"))))
    restore(path)


@dose(0.15)
@given(st.data())
@pytest.mark.parametrize("name", CONFIGS)
def test_descriptions_of_saved_models(name: str, saved: dict[str, Path], tmp_path_factory: Any, data: Any) -> None:
    with safe_open(saved[name], "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        state = json.loads(file.metadata()["detent_state"])
    path = tmp_path_factory.mktemp("restore") / "m"
    save_file(tensors, path, metadata={"detent_state": json.dumps(data.draw(changed(state)))})
    restore(path)


@pytest.fixture(scope="module")
def gguf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture as GGUF: codes, float16 and float32."""
    pytest.importorskip("gguf")
    source = llama_source(tmp_path_factory.mktemp("float") / "m")
    export = detent.ExportOptions("gguf", gguf_type="Q5_K_M", verify=False)
    out = tmp_path_factory.mktemp("gguf") / "out"
    detent.quantize_checkpoint(
        detent.ModelOptions(str(source)),
        detent.SchemeOptions(export=export),
        out,
        evaluation=detent.EvaluationOptions(skip=True),
    )
    return out


@dose(0.3)
@given(st.data())
def test_gguf(gguf_folder: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.mktemp("changed")
    content = (gguf_folder / "model.gguf").read_bytes()
    (folder / "model.gguf").write_bytes(data.draw(flipped(content, 6000)))
    (folder / "config.json").write_bytes((gguf_folder / "config.json").read_bytes())
    checkpoint = clear(open_quantized, folder)
    for name in () if checkpoint is None else checkpoint.formats.layers:
        layer = clear(checkpoint.layer, name)
        assert layer is None or bool(torch.isfinite(decode(layer.weight)).all())
    for name in () if checkpoint is None else checkpoint.kept:
        clear(checkpoint.tensor, name)


@dose(0.3)
@given(st.data())
def test_imatrix(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("imatrix")
    write_imatrix(folder / "a", {"x": torch.ones(8)}, {"x": 2})
    binary = struct.pack("<ii", 1, 1) + b"x" + struct.pack("<ii8f", 3, 8, *range(8))
    for content in ((folder / "a").read_bytes(), binary):
        (folder / "b").write_bytes(data.draw(flipped(content, 100)))
        found = clear(read_imatrix, folder / "b")
        assert found is None or all(bool(torch.isfinite(values).all()) for values in found.values())
