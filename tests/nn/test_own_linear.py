"""Linear layers with a forward of their own: transformers' Conv1D, and subclasses of nn.Linear."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

import detent
import plain_quant

X = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))


class Derived(Conv1D):
    pass


def layer_of(kind: type[nn.Module], dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    layer: Any = kind(48, 32) if issubclass(kind, Conv1D) else kind(32, 48)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer.to(dtype).eval()


def rows_of(layer: Any) -> Tensor:
    """The weight as [out, in]."""
    return layer.weight.detach().t() if isinstance(layer, Conv1D) else layer.weight.detach()


@pytest.mark.parametrize("kind", [Conv1D, Derived, FalconLinear])
def test_int8_weight_and_input(kind: type[nn.Module]) -> None:
    model = nn.Sequential(layer_of(kind))
    weight, bias = rows_of(model[0]), model[0].bias.detach()
    detent.quantize(model, detent.INT8_DEFAULT_CFG, lambda m: m(X))
    expected = F.linear(
        plain_quant.integers(X, X.abs().amax()),
        plain_quant.integers(weight, weight.abs().amax(1, keepdim=True)),
        bias,
    )
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-5)
        detent.fold_weight(model)
        torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(model[0], kind)
    assert torch.equal(rows_of(model[0]), plain_quant.integers(weight, weight.abs().amax(1, keepdim=True)))


@pytest.mark.parametrize("kind", [Conv1D, FalconLinear])
def test_groups_run_along_the_input(kind: type[nn.Module]) -> None:
    model = nn.Sequential(layer_of(kind))
    weight = rows_of(model[0])
    groups = weight.unflatten(1, (2, 16))
    expected = plain_quant.integers(groups, groups.abs().amax(-1, keepdim=True), 4).flatten(1)
    cfg = {"quant_cfg": {"*weight_quantizer": {"num_bits": 4, "block_sizes": {-1: 16}}}}
    detent.quantize(model, cfg)
    eye = torch.eye(32)
    with torch.no_grad():
        torch.testing.assert_close(model(eye) - model[0].bias, expected.t(), rtol=1e-5, atol=1e-5)
        before = model(X)
        detent.compress(model)
        assert torch.equal(model(X), before)
        restored = detent.restore_from_detent_state(nn.Sequential(layer_of(kind)), detent.detent_state(model))
        restored.load_state_dict(model.state_dict())
        assert torch.equal(restored(X), before)


@pytest.mark.parametrize("kind", [Conv1D, FalconLinear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_off_it_computes_what_it_did(kind: type[nn.Module], dtype: torch.dtype) -> None:
    """In bfloat16, FalconLinear rounds before it adds the bias."""
    plain = layer_of(kind, dtype)
    model = nn.Sequential(copy.deepcopy(plain))
    detent.replace_quant_module(model)
    with torch.no_grad():
        assert torch.equal(model(X.to(dtype)), plain(X.to(dtype)))
    assert torch.equal(copy.deepcopy(model)(X.to(dtype)), plain(X.to(dtype)))


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class WithMore(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.more


class OnlyInTraining(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.training else x.round())


class Normalizing(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / x.norm())


@pytest.mark.parametrize("kind", [Scaled, WithMore, OnlyInTraining, Normalizing])
def test_what_computes_something_else_stays(kind: type[nn.Module]) -> None:
    assert kind not in detent.QuantModuleRegistry
