"""`svdquant` at one layer of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import detent
from detent.algorithms.layer import Layer
from detent.algorithms.registry import LayerFacts, refusals
from detent.algorithms.svdquant import split_layer
from detent.config import parse_algorithm
from detent.config.transforms import SVDQuantConfig
from detent.errors import DetentError
from detent.nn.low_rank import low_rank_of

INT4 = {"*weight_quantizer": {"num_bits": 4, "axis": 0}, "*input_quantizer": {"enable": False}}


def layer_and_inputs() -> tuple[Any, Layer, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 32)).eval()
    model = detent.quantize(model, {"quant_cfg": INT4, "algorithm": None}, strict=False)
    return model, Layer("0", model[0]), torch.randn(200, 48) * torch.linspace(0.1, 3, 48)


@torch.no_grad()
def test_objective_is_the_error_of_the_layers_outputs() -> None:
    model, layer, x = layer_and_inputs()
    wanted = nn.functional.linear(x.double(), model[0].weight.double(), model[0].bias.double())
    plain = float((model(x) - wanted).square().sum())
    outcome = split_layer(layer, x.T @ x, SVDQuantConfig(lowrank=4))
    assert outcome.before == pytest.approx(plain, rel=1e-3)
    assert outcome.after == pytest.approx(float((model(x) - wanted).square().sum()), rel=1e-2)
    assert outcome.after < 0.7 * outcome.before
    assert outcome.decided == {"rank": 4}


@torch.no_grad()
def test_a_second_branch_replaces_the_first() -> None:
    model, layer, x = layer_and_inputs()
    weight = model[0].weight.clone()
    first = split_layer(layer, None, SVDQuantConfig(lowrank=2))
    second = split_layer(layer, None, SVDQuantConfig(lowrank=6))
    assert second.before == pytest.approx(first.before, rel=1e-4)
    a, b = low_rank_of(model[0])
    assert len(a) == 6
    error = weight - b @ a - model[0].quantized_weight()
    assert second.after == pytest.approx(float(error.square().sum()), rel=1e-3)


def test_layers_that_get_none() -> None:
    model, layer, _ = layer_and_inputs()
    before = model[0].weight.clone()
    assert "skip_layers" in split_layer(layer, None, SVDQuantConfig(skip_layers=["0*"])).notice
    layer.set_matrix(torch.zeros(32, 48))
    outcome = split_layer(layer, None, SVDQuantConfig())
    assert outcome.kept_plain
    assert outcome.noteworthy
    assert "keeping round-to-nearest" in outcome.notice
    assert low_rank_of(model[0]) is None
    assert not torch.equal(model[0].weight, before)


def test_scales_come_before_branches() -> None:
    model, layer, x = layer_and_inputs()
    wrong = ["svdquant", "awq_lite"]
    message = "awq_lite: 0: it has a low-rank branch; name awq_lite before svdquant"
    assert refusals(parse_algorithm("awq_lite"), {"0": LayerFacts.of(layer)}) == []
    assert refusals(parse_algorithm(wrong), {"0": LayerFacts.of(layer)}) == [message]
    skipped = [{"method": "svdquant", "skip_layers": ["0"]}, "awq_lite"]
    assert refusals(parse_algorithm(skipped), {"0": LayerFacts.of(layer)}) == []
    split_layer(layer, None, SVDQuantConfig(lowrank=2))
    with pytest.raises(DetentError, match=message):
        detent.calibrate(model, "awq_lite", lambda m: m(x))
