"""Folding and packing weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import detent
from detent.errors import DetentError

X = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))


def mlp(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64)).to(dtype).eval()


def nbytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("keep", [False, True])
def test_folding(keep: bool) -> None:
    model = detent.quantize(mlp(), detent.INT8_DEFAULT_CFG, lambda m: m(X))
    before = model(X)
    weight = model[0].quantized_weight().detach().clone()
    detent.fold_weight(model, keep_attrs=keep)
    assert torch.equal(model(X), before)
    assert torch.equal(model[0].weight, weight)
    assert not model[0].weight_quantizer.is_enabled
    assert (model[0].weight_quantizer.amax is not None) is keep
    assert model[0].input_quantizer.is_enabled
    with pytest.raises(DetentError, match="call quantize"):
        detent.fold_weight(mlp())


def test_folding_leaves_a_tied_twin_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.head = nn.Linear(8, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    ids = torch.arange(10)
    model = Tied()
    table = model.embed.weight.detach().clone()
    detent.quantize(model, {"quant_cfg": {"*head.weight_quantizer": {"num_bits": 3}}})
    before = model(ids)
    for change in (detent.fold_weight, detent.compress):
        other = copy.deepcopy(model)
        change(other)
        assert torch.equal(other.embed.weight, table)
        assert torch.equal(other(ids), before)


def test_folding_takes_scale_and_rotation_along() -> None:
    model = detent.quantize(mlp(), {"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "rotate": True}}})
    for layer in (model[0], model[2]):
        layer.weight_quantizer.pre_quant_scale = torch.rand(layer.in_features) + 0.5
    before = model(X)
    packed = copy.deepcopy(model)
    detent.fold_weight(model)
    assert torch.equal(model(X), before)
    detent.compress(packed)
    assert torch.equal(packed(X), before)


BITS = {
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG": 4 + 32 / 128,
    "INT8_WEIGHT_ONLY_CFG": 8 + 32 / 128,
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": 8,
    "W4A16_NVFP4_CFG": 4.5,
    "MXFP4_DEFAULT_CFG": 4.25,
    "MXFP6_DEFAULT_CFG": 6.25,
}


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_take_the_bits_of_their_codes(name: str, dtype: torch.dtype) -> None:
    model = detent.quantize(mlp(dtype), getattr(detent, name), lambda m: m(X.to(dtype)))
    before = model(X.to(dtype))
    elements = 256 * 128 + 128 * 64
    detent.compress(model)
    assert torch.equal(model(X.to(dtype)), before)
    assert len(list(model.parameters())) == 2  # biases
    bits = (nbytes(model) - sum(p.nbytes for p in model.parameters())) * 8 / elements
    assert bits == pytest.approx(BITS[name], rel=0.03)
    assert model[0].weight.dtype == dtype


def test_packed_model_changes_dtype_without_losing_bits() -> None:
    model = detent.quantize(mlp(), detent.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG, lambda m: m(X))
    detent.compress(model)
    weight = model[0].weight
    model.bfloat16()
    assert torch.equal(model[0].weight, weight.bfloat16())
    model.float()
    assert torch.equal(model[0].weight, weight)
    assert model(X).dtype == torch.float32


def test_formats_in_sequence_are_packed_as_the_last() -> None:
    cfg = {"quant_cfg": {"*weight_quantizer": [{"num_bits": 4, "block_sizes": {-1: 128}}, {"num_bits": (4, 3)}]}}
    model = detent.quantize(mlp(), cfg)
    before = model(X)
    detent.compress(model)
    assert torch.equal(model(X), before)
    assert model[0]._packed_codes.dtype == torch.float8_e4m3fn


def test_choosing_modules() -> None:
    model = detent.quantize(mlp(), detent.INT8_WEIGHT_ONLY_CFG)
    detent.compress(model, {"*": True, "2": False})
    assert model[0].is_packed
    assert not model[2].is_packed
    detent.compress(model, {"compress": {"2": True}})
    assert model[2].is_packed
    for bad in ({"*x": True}, {"0": 1}, [0]):
        with pytest.raises(DetentError, match="compress"):
            detent.compress(model, bad)  # type: ignore[arg-type]
    with pytest.raises(DetentError, match="no weight is quantized"):
        detent.compress(model)


def test_all_or_nothing() -> None:
    cfg = {
        "quant_cfg": {"*weight_quantizer": {"num_bits": 8}, "2.weight_quantizer": {"num_bits": 8, "bias": {-1: None}}}
    }
    model = detent.quantize(mlp(), cfg)
    before = model(X)
    with pytest.raises(DetentError, match="2: a weight that is rotated back"):
        detent.compress(model)
    assert not model[0].is_packed
    detent.compress(model, {"*": True, "2": False})
    assert torch.equal(model(X), before)
