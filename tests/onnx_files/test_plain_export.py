"""`torch.onnx.export(model, sample, file)`, called as on any model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import detent
from onnx_files.plain_models import Cnn, mlp, operators, run, types

X = torch.randn(4, 7, 64, generator=torch.Generator().manual_seed(1))

#: Results differ by the order of sums; a rounded activation that took the next code would show in the third digit.
CLOSE = 1e-5


def export(model: nn.Module, x: torch.Tensor, path: Path, dynamo: bool = True) -> np.ndarray:
    """Export, and return what the model itself computes."""
    with torch.no_grad():
        y = model(x).numpy()
    torch.onnx.export(model, (x,), str(path), dynamo=dynamo, verbose=False)
    onnx.checker.check_model(str(path), full_check=True)
    return y


@pytest.mark.parametrize("dynamo", [True, False])
def test_int8_is_codes_and_quantize_dequantize_pairs(tmp_path: Path, dynamo: bool) -> None:
    model = mlp(detent.INT8_DEFAULT_CFG, X)
    y = export(model, X, tmp_path / "m.onnx", dynamo)
    weights = [w for w in model.parameters() if w.dim() == 2]
    codes = [np.rint(w.detach().double() / (w.detach().double().abs().amax(1, keepdim=True) / 127)) for w in weights]
    file = onnx.load(str(tmp_path / "m.onnx"))
    constants = [numpy_helper.to_array(t) for t in file.graph.initializer]
    constants += [numpy_helper.to_array(n.attribute[0].t) for n in file.graph.node if n.op_type == "Constant"]
    stored = {c.shape: c for c in constants if c.ndim == 2}
    for expected in codes:
        assert stored[tuple(expected.shape)].dtype == np.int8
        assert np.array_equal(stored[tuple(expected.shape)], expected.numpy())
    assert len(stored) == len(codes)  # no weight is left in floating point
    assert [n.op_type for n in file.graph.node].count("QuantizeLinear") == 3
    np.testing.assert_allclose(run(tmp_path / "m.onnx", X), y, atol=CLOSE)


#: A preset of each kind, with the types of its codes at opset 20: what has 4 bits takes 8.
PRESETS = {
    "INT8_SMOOTHQUANT_CFG": "INT8",
    "FP8_DEFAULT_CFG": "FLOAT8E4M3FN",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": "FLOAT8E4M3FN",
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": "FLOAT8E4M3FN",
    "INT4_AWQ_CFG": "INT8",
    "W4A8_AWQ_BETA_CFG": "INT8",
    "NVFP4_DEFAULT_CFG": "FLOAT8E4M3FN",
    "NVFP4_FOUR_OVER_SIX_CFG": "FLOAT8E4M3FN",
    "NVFP4_SVDQUANT_DEFAULT_CFG": "FLOAT8E4M3FN",
    "W4A8_NVFP4_FP8_CFG": "FLOAT8E4M3FN",
    "MXFP4_DEFAULT_CFG": "FLOAT8E4M3FN",
    "MXFP6_DEFAULT_CFG": "FLOAT8E4M3FN",
    "MXFP8_DEFAULT_CFG": "FLOAT8E4M3FN",
    "MXINT8_DEFAULT_CFG": "INT8",
}


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("name", PRESETS)
def test_each_preset(tmp_path: Path, name: str, dynamo: bool) -> None:
    y = export(mlp(getattr(detent, name), X), X, tmp_path / "m.onnx", dynamo)
    np.testing.assert_allclose(run(tmp_path / "m.onnx", X), y, atol=CLOSE)
    if "INT" not in name and "W4A8_AWQ" not in name:
        np.testing.assert_allclose(run(tmp_path / "m.onnx", X, fused=True), y, atol=CLOSE)
    if dynamo:
        assert types(tmp_path / "m.onnx")[PRESETS[name]] >= 64 * 48 + 48 * 256 + 256 * 16
        assert types(tmp_path / "m.onnx")["FLOAT"] < 64 * 48 or "SVDQUANT" in name


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("name", ["INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG"])
def test_convolutions(tmp_path: Path, name: str, dynamo: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    model = detent.quantize(Cnn().eval(), getattr(detent, name), lambda m: m(x))
    y = export(model, x, tmp_path / "m.onnx", dynamo)
    np.testing.assert_allclose(run(tmp_path / "m.onnx", x), y, atol=CLOSE)
    assert {"Conv", "ConvTranspose", "QuantizeLinear", "DequantizeLinear"} <= operators(tmp_path / "m.onnx")


@pytest.mark.slow
def test_batches_of_other_sizes_run(tmp_path: Path) -> None:
    model = mlp(detent.FP8_PER_CHANNEL_PER_TOKEN_CFG, X)
    shapes = ({0: "batch", 1: "tokens"},)
    torch.onnx.export(model, (X,), str(tmp_path / "m.onnx"), dynamic_shapes=shapes, verbose=False)
    other = torch.randn(2, 3, 64)
    with torch.no_grad():
        np.testing.assert_allclose(run(tmp_path / "m.onnx", other), model(other).numpy(), atol=CLOSE)


@pytest.mark.slow
def test_an_exported_program_of_a_quantized_model_computes_the_same(tmp_path: Path) -> None:
    """`torch.export` alone, then ONNX: no codes, but the same function."""
    model = mlp(detent.NVFP4_DEFAULT_CFG, X)
    program = torch.export.export(model, (X,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(X), model(X), rtol=0, atol=CLOSE)


def test_what_a_second_export_writes_is_what_changed(tmp_path: Path) -> None:
    """An edit that PyTorch doesn't count, between two exports."""
    torch.manual_seed(0)
    model = detent.quantize(nn.Sequential(nn.Linear(8, 4)).eval(), detent.INT8_WEIGHT_ONLY_CFG)
    x = torch.randn(2, 8)
    export(model, x, tmp_path / "m.onnx", dynamo=False)
    weight = model[0]._parameters["weight"]
    weight.data[0, 0] = -weight.data[0, 0]
    with torch.no_grad():
        model[0].refresh_weight()
    y = export(model, x, tmp_path / "m.onnx", dynamo=False)
    np.testing.assert_allclose(run(tmp_path / "m.onnx", x), y, atol=CLOSE)


def test_nothing_is_left_in_the_model(tmp_path: Path) -> None:
    model = detent.quantize(nn.Sequential(nn.Linear(8, 4)).eval(), detent.INT8_WEIGHT_ONLY_CFG)
    x, before = torch.randn(2, 8), set(model[0].weight_quantizer.__dict__)
    y = export(model, x, tmp_path / "m.onnx", dynamo=False)
    list(model.modules())  # any walk lets go of the codes
    assert set(model[0].weight_quantizer.__dict__) == before
    assert np.array_equal(model(x).detach().numpy(), y)


def test_an_older_opset_is_refused_where_it_lacks_the_type(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(2, 8)
    model = detent.quantize(model, detent.FP8_DEFAULT_CFG, lambda m: m(x))
    with pytest.raises(detent.DetentError, match="opset 19"):
        torch.onnx.export(model, (x,), str(tmp_path / "m.onnx"), dynamo=False, opset_version=17, verbose=False)


def test_arithmetic_in_place_of_bit_patterns() -> None:
    """floor(log2) without bits, beside frexp, at every power of two, its neighbours, subnormals and zero."""
    from detent.formats.exporting import floor_log2_by_arithmetic

    powers = 2.0 ** torch.arange(-149, 128, dtype=torch.float64)
    v = torch.cat([powers, powers * (1 - 2**-24), powers * (1 + 2**-23), -powers, powers * 1.5])
    expected = np.frexp(v.abs().numpy())[1] - 1
    assert np.array_equal(floor_log2_by_arithmetic(v).numpy(), expected)
    assert float(floor_log2_by_arithmetic(torch.zeros(1, dtype=torch.float64))) == -1023
