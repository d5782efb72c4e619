"""A low-rank branch beside a quantized weight: what it computes, and that it is kept with the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import detent
from detent.errors import DetentError
from detent.formats import fake_quantize
from detent.nn.low_rank import drop_low_rank, low_rank_of, set_low_rank

INT4 = {
    "*weight_quantizer": {"num_bits": 4, "block_sizes": {-1: 16}},
    "*input_quantizer": {"num_bits": 8, "axis": None},
}


def quantized() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8)).eval()
    x = torch.randn(16, 32)
    return detent.quantize(model, {"quant_cfg": INT4, "algorithm": "max"}, lambda m: m(x))


def branched() -> nn.Sequential:
    model = quantized()
    torch.manual_seed(1)
    set_low_rank(model[0], torch.randn(3, 32), torch.randn(24, 3))
    return model


@torch.no_grad()
def test_branch_adds_the_unrounded_product() -> None:
    model = branched()
    layer, x = model[0], torch.randn(5, 32)
    layer.input_quantizer.pre_quant_scale = torch.rand(32) + 0.5
    a, b = low_rank_of(layer)
    scaled = x * layer.input_quantizer.pre_quant_scale
    rounded = layer.input_quantizer(x).double() @ fake_quantize(layer.weight, layer.weight_quantizer.format).double().T
    expected = rounded + layer.bias.double() + scaled.double() @ a.double().T @ b.double().T
    torch.testing.assert_close(layer(x), expected.float(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_branch_stays_when_quantizers_are_off_folded_or_packed() -> None:
    x = torch.randn(5, 32)
    reference = branched()
    detent.disable_quantizer(reference, "*")
    a, b = low_rank_of(reference[0])
    torch.testing.assert_close(
        reference[0](x), nn.functional.linear(x, reference[0].weight + b @ a, reference[0].bias), rtol=1e-5, atol=1e-5
    )
    model, expected = branched(), branched()(x)
    detent.fold_weight(model)
    torch.testing.assert_close(model(x), expected)
    model = detent.compress(branched())
    assert model[0].is_packed
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
def test_branch_is_saved_and_restored(tmp_path: Path, packed: bool) -> None:
    model, x = branched(), torch.randn(5, 32)
    if packed:
        detent.compress(model)
    detent.save(model, tmp_path / "model.safetensors")
    again = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8)).eval()
    detent.restore(again, tmp_path / "model.safetensors")
    assert torch.equal(again(x), model(x))
    assert torch.equal(again[0].weight_quantizer.svdquant_lora_a, model[0].weight_quantizer.svdquant_lora_a)


def test_branch_follows_the_input_type_and_can_be_dropped() -> None:
    model = branched().to(torch.bfloat16)
    assert model(torch.randn(2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert low_rank_of(model[0])[0].dtype == torch.float32
    drop_low_rank(model[0])
    assert low_rank_of(model[0]) is None
    assert low_rank_of(nn.Linear(2, 2)) is None


def test_what_takes_no_branch() -> None:
    model = quantized()
    with pytest.raises(DetentError, match=r"layers\.0: a low-rank branch needs a quantized nn.Linear, not ReLU"):
        set_low_rank(model[1], torch.zeros(1, 2), torch.zeros(2, 1), "layers.0")
    with pytest.raises(DetentError, match=r"\[rank, 32\] and \[24, rank\], not \(3, 24\)"):
        set_low_rank(model[0], torch.zeros(3, 24), torch.zeros(32, 3))
