"""Frozen weights are quantized once, and again after every change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import detent
import plain_quant
from detent.nn import QuantWeightBase

CFG = {"quant_cfg": {"*weight_quantizer": {"num_bits": 4, "axis": 0}}, "algorithm": "max"}


class Counted:
    """How often a model quantizes its weight."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        original = QuantWeightBase.quantize_weight

        def counting(module: QuantWeightBase, weight: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return original(module, weight)

        monkeypatch.setattr(QuantWeightBase, "quantize_weight", counting)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def quantized() -> Any:
    torch.manual_seed(0)
    return detent.quantize(nn.Sequential(nn.Linear(64, 40)), CFG).eval()


X = torch.eye(64)


def expected(model: Any) -> torch.Tensor:
    layer = model[0]
    weight = layer._parameters["weight"]
    values = plain_quant.integers(weight, layer.weight_quantizer.amax, 4)
    return nn.functional.linear(X.to(weight.dtype), values, layer.bias)


def test_once_in_eval_mode_without_gradients(counted: Counted) -> None:
    model = quantized()
    with torch.no_grad():
        for _ in range(5):
            assert torch.equal(model(X), expected(model))
    assert counted.calls == 1


def test_once_where_weights_are_frozen_and_inputs_want_gradients(counted: Counted) -> None:
    model = quantized().requires_grad_(False)
    with torch.inference_mode():
        model(X)
    x = X.clone().requires_grad_(True)
    for _ in range(3):
        model(x).sum().backward()
    assert counted.calls == 1
    assert x.grad is not None


@pytest.mark.parametrize("train", [True, False])
def test_every_time_where_gradients_are_wanted(counted: Counted, train: bool) -> None:
    model = quantized().train(train)
    for _ in range(3):
        model(X).sum().backward()
    assert counted.calls == 3
    assert model[0].weight.grad.abs().sum() > 0


def step(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(X).square().sum().backward()
    optimizer.step()


def fused_step(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(X).square().sum().backward()
    optimizer.step()


def load(model: Any) -> None:
    model.load_state_dict({k: v * 0.5 if k == "0.weight" else v for k, v in model.state_dict().items()})


def edit(model: Any) -> None:
    with torch.no_grad():
        model[0].weight[3, 5] = 0.0


def edit_data_of_one_element(model: Any) -> None:
    model[0].weight.data[3, 5] = 0.0


def edit_data_held_from_elsewhere(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(0.5)


def swap_data(model: Any) -> None:
    model[0]._parameters["weight"].data = torch.ones(40, 64) * 0.01


def replace(model: Any) -> None:
    model[0].weight = nn.Parameter(torch.ones(40, 64) * 0.01)


def new_range(model: Any) -> None:
    model[0].weight_quantizer.amax = model[0].weight_quantizer.amax * 2


def edit_range(model: Any) -> None:
    model[0].weight_quantizer.amax.mul_(2)


def through_bfloat16(model: Any) -> None:
    model.bfloat16()


def to_bfloat16_and_back(model: Any) -> None:
    model.bfloat16()
    model.float()


CHANGES = [
    step,
    fused_step,
    load,
    edit,
    edit_data_of_one_element,
    edit_data_held_from_elsewhere,
    swap_data,
    replace,
    new_range,
    edit_range,
    through_bfloat16,
    to_bfloat16_and_back,
]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change: Callable[[Any], None]) -> None:
    model = quantized()
    with torch.no_grad():
        before = model(X)
    change(model)
    with torch.no_grad():
        after = model(X.to(model[0].weight.dtype))
    assert torch.equal(after, expected(model))
    assert not torch.equal(after.float(), before)


def test_switching_and_new_attributes_are_seen() -> None:
    model = quantized()
    layer = model[0]
    with torch.no_grad():
        before = model(X)
        detent.disable_quantizer(model, "*weight_quantizer")
        assert torch.equal(model(X), nn.functional.linear(X, layer.weight, layer.bias))
        detent.enable_quantizer(model, "*weight_quantizer")
        assert torch.equal(model(X), before)
        detent.set_quantizer_attribute(model, "*weight_quantizer", {"num_bits": 2, "axis": None})
        weight = plain_quant.integers(layer.weight, layer.weight.abs().amax(), 2)
        assert torch.equal(model(X), nn.functional.linear(X, weight, layer.bias))


def test_asking_for_the_weight_does_not_quantize_again(counted: Counted) -> None:
    model = quantized()
    with torch.no_grad():
        for _ in range(3):
            model(X)
            assert model[0].weight.dtype == torch.float32
    assert counted.calls == 1


def test_quantization_aware_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    x, target = torch.randn(128, 16), torch.randn(128, 4)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    cfg = {"quant_cfg": {"*weight_quantizer": {"num_bits": 3, "axis": 0}, "*input_quantizer": {"num_bits": 8}}}
    model = detent.quantize(net, cfg, lambda m: m(x))
    ranges = [q.amax.clone() for q in model.modules() if isinstance(q, detent.TensorQuantizer) and q.is_enabled]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def loss() -> torch.Tensor:
        return nn.functional.mse_loss(model(x), target)

    with torch.no_grad():
        before = loss()
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        assert loss() < 0.6 * before
    after = [q.amax for q in model.modules() if isinstance(q, detent.TensorQuantizer) and q.is_enabled]
    assert all(torch.equal(a, b) for a, b in zip(ranges, after, strict=True))
