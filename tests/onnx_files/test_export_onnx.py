"""`detent.export_onnx`: types of 4 bits, TensorRT's operators, and what is refused."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

import detent
from detent.errors import DetentError
from detent.onnx import check_onnx
from onnx_files.plain_models import mlp, run, types

X = torch.randn(4, 7, 64, generator=torch.Generator().manual_seed(1))
WEIGHTS = 64 * 48 + 48 * 256 + 256 * 16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "INT4"),
        ("W4A8_AWQ_BETA_CFG", "INT4"),
        ("INT8_DEFAULT_CFG", "INT8"),
        ("INT8_WEIGHT_ONLY_CFG", "INT8"),
        ("FP8_PER_CHANNEL_PER_TOKEN_CFG", "FLOAT8E4M3FN"),
        ("MXFP8_DEFAULT_CFG", "FLOAT8E4M3FN"),
    ],
)
def test_weights_take_their_own_bits_and_onnxruntime_agrees(tmp_path: Path, name: str, kind: str) -> None:
    model = mlp(getattr(detent, name), X)
    report = detent.export_onnx(model, X, tmp_path / "m.onnx")
    assert report.opset == 21
    assert report.not_run is None
    assert types(tmp_path / "m.onnx")[kind] >= WEIGHTS
    with torch.no_grad():
        np.testing.assert_allclose(run(tmp_path / "m.onnx", X), model(X).numpy(), atol=1e-5)
    bits = 4 if kind == "INT4" else 8
    assert (tmp_path / "m.onnx").stat().st_size < WEIGHTS * bits / 8 * 1.4 + 20_000


@pytest.mark.slow
def test_int4_codes_are_those_of_the_format(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = detent.quantize(nn.Sequential(nn.Linear(256, 6)).eval(), detent.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
    detent.export_onnx(model, torch.randn(2, 256), tmp_path / "m.onnx")
    constants = {t.name: t for t in onnx.load(str(tmp_path / "m.onnx")).graph.initializer}
    codes = numpy_helper.to_array(constants["0.weight_quantizer.codes"])
    assert codes.dtype == ml_dtypes.int4
    blocks = model[0].weight.detach().double().reshape(6, 2, 128)
    scales = blocks.abs().amax(2, keepdim=True) / 7
    assert np.array_equal(codes.astype(np.int8), np.rint(blocks / scales).reshape(6, 256).numpy())
    scale = numpy_helper.to_array(constants["0.weight_quantizer.scale"])
    np.testing.assert_allclose(scale, scales[..., 0].numpy(), rtol=1e-6)


@pytest.mark.slow
def test_fp4_is_told_and_right_by_the_reference_evaluator(tmp_path: Path) -> None:
    model = mlp(detent.NVFP4_DEFAULT_CFG, X)
    report = detent.export_onnx(model, X, tmp_path / "m.onnx")
    assert report.opset == 23
    assert "DequantizeLinear(FLOAT4E2M1)" in str(report.not_run)
    assert types(tmp_path / "m.onnx")["FLOAT4E2M1"] == WEIGHTS
    file = onnx.load(str(tmp_path / "m.onnx"))
    (found,) = ReferenceEvaluator(file).run(None, {file.graph.input[0].name: X.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, model(X).numpy(), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("FP8_DEFAULT_CFG", {"TRT_FP8QuantizeLinear", "TRT_FP8DequantizeLinear"}),
        ("INT4_AWQ_CFG", {"DequantizeLinear"}),
        ("NVFP4_DEFAULT_CFG", {"TRT_FP4DynamicQuantize"}),
        ("MXFP8_DEFAULT_CFG", {"TRT_MXFP8DynamicQuantize", "TRT_MXFP8DequantizeLinear"}),
    ],
)
def test_tensorrt(tmp_path: Path, name: str, expected: set[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 32)).eval()
    x = torch.randn(3, 256)
    model = detent.quantize(model, getattr(detent, name), lambda m: m(x))
    report = detent.export_onnx(model, x, tmp_path / "m.onnx", dialect="tensorrt")
    assert "trt::" in str(report.not_run)
    file = onnx.load(str(tmp_path / "m.onnx"))
    assert {node.op_type for node in file.graph.node if node.domain == "trt"} == expected
    assert {entry.domain for entry in file.opset_import} == {"", "trt"}


def test_what_cannot_be_exported_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(2, 8)
    with pytest.raises(DetentError, match="training mode"):
        detent.export_onnx(model, x, tmp_path / "m.onnx")
    with pytest.raises(DetentError, match="unknown dialect 'openvino'; known: standard, tensorrt"):
        detent.export_onnx(model.eval(), x, tmp_path / "m.onnx", dialect="openvino")
    with pytest.raises(DetentError, match="no such folder"):
        detent.export_onnx(model, x, tmp_path / "missing" / "m.onnx")

    def fails(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("importlib.import_module", fails)
    with pytest.raises(DetentError, match=r"pip install 'detent\[onnx\]'"):
        detent.export_onnx(model, x, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_model_that_cannot_be_traced_leaves_no_file(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if bool(x.sum() > 0) else x

    with pytest.raises(DetentError, match="can't be exported"):
        detent.export_onnx(Branches().eval(), torch.randn(2), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def stored_outside(folder: Path) -> Path:
    tensor = numpy_helper.from_array(np.arange(6, dtype=np.float32), "w")
    node = onnx.helper.make_node("Add", ["x", "w"], ["y"])
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [6]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:], [tensor])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    path = folder / "m.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="m.data", size_threshold=0)
    return path


def test_tensors_outside_of_the_file(tmp_path: Path) -> None:
    path, data = stored_outside(tmp_path), tmp_path / "m.data"
    assert check_onnx(path) == {"FLOAT": 24}
    whole = data.read_bytes()
    data.write_bytes(whole[:20])
    with pytest.raises(DetentError, match="w ends at byte 24, and the file at 20"):
        check_onnx(path)
    data.write_bytes(whole[:20] + np.float32(np.inf).tobytes())
    with pytest.raises(DetentError, match="w holds NaN or infinity"):
        check_onnx(path)
    data.unlink()
    with pytest.raises(DetentError, match=r"m\.data, which is missing"):
        check_onnx(path)
    path.write_bytes(path.read_bytes().replace(b"m.data", b"../etc"))
    with pytest.raises(DetentError, match="outside of the folder"):
        check_onnx(path)


@pytest.mark.parametrize("damage", [b"", b"not onnx at all", bytes(range(256))])
def test_damaged_files(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(damage)
    with pytest.raises(DetentError, match=r"m\.onnx: not"):
        check_onnx(tmp_path / "m.onnx")
