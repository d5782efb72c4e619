"""`quantize` with every preset, and the functions that change a quantized model."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import detent
import plain_quant
from detent.errors import DetentError
from detent.model.conversion import named_quantizers
from detent.nn import SequentialQuantizer, TensorQuantizer
from tiny_language_model import make_model

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
X = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))


def mlp() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


#: Presets for places that a Llama doesn't have.
ELSEWHERE = {"NVFP4_EXPERTS_ONLY_CFG"}


def test_there_are_39_presets() -> None:
    assert len(detent.choices) == 39


@pytest.mark.parametrize("name", sorted(detent.choices))
def test_preset_on_a_language_model(name: str) -> None:
    preset, model = getattr(detent, name), make_model()
    with torch.no_grad():
        before = model(IDS).logits
    if name in ELSEWHERE:
        with pytest.raises(DetentError, match="quantizes nothing"):
            detent.quantize(model, preset, lambda m: m(IDS))
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, before)
        return
    detent.quantize(model, preset, lambda m: m(IDS))
    with torch.no_grad():
        after = model(IDS).logits
    assert torch.isfinite(after).all()
    assert 0 < (after - before).norm() < 1.5 * before.norm()
    assert not model.lm_head.weight_quantizer.is_enabled
    alone = "KV" in name and "MHA" not in name
    assert model.model.layers[0].mlp.up_proj.weight_quantizer.is_enabled is not alone


@pytest.mark.parametrize("name", sorted(detent.choices))
def test_preset_on_an_mlp(name: str) -> None:
    preset, model = getattr(detent, name), mlp()
    if any(place in name for place in ("KV", "_MLP_", "EXPERTS", "OMLP")):
        with pytest.raises(DetentError, match="quantizes nothing|matches no quantizer"):
            detent.quantize(model, preset, lambda m: m(X))
        assert type(model[0]) is nn.Linear
        return
    detent.quantize(model, preset, lambda m: m(X))
    output = model(X)
    assert torch.isfinite(output).all()
    folded = copy.deepcopy(model)
    detent.fold_weight(folded)
    assert torch.equal(folded(X), output)
    detent.compress(model)
    assert torch.equal(model(X), output)


def test_experts_in_one_tensor_that_is_used_in_an_unknown_way_are_named(caplog: pytest.LogCaptureFixture) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.randn(3, 32, 32))
            self.out = nn.Linear(32, 4)

        def forward(self, x: torch.Tensor) -> Any:
            return self.out(torch.einsum("eoi,ti->to", self.weights, x))

    detent.quantize(nn.Sequential(Experts()), detent.INT8_WEIGHT_ONLY_CFG)
    assert "0 stays unquantized: Experts holds the weights of several experts in one tensor" in caplog.text


def test_both_eras_mean_the_same() -> None:
    weight = {"num_bits": 8, "axis": 0}
    as_dict = {"nn.Linear": {"*weight_quantizer": weight}, "*2.*": {"enable": False}, "default": {"enable": False}}
    as_list = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "parent_class": "nn.Linear", "cfg": weight},
        {"quantizer_name": "*2.*", "enable": False},
    ]
    for quant_cfg in (as_dict, as_list):
        plain = mlp()
        model = detent.quantize(mlp(), {"quant_cfg": quant_cfg, "algorithm": "max"})
        assert [n for n, q in named_quantizers(model) if q.is_enabled] == ["0.weight_quantizer"]
        rows = plain[0].weight.abs().amax(1, keepdim=True)
        plain[0].weight.data = plain_quant.integers(plain[0].weight, rows)
        assert torch.equal(model(X), plain(X))


def test_not_strict(caplog: pytest.LogCaptureFixture) -> None:
    model = detent.quantize(mlp(), {"quant_cfg": {"*wieght_quantizer": {"num_bits": 8}}}, strict=False)
    assert torch.equal(model(X), mlp()(X))
    assert "did you mean" in caplog.text


def test_an_exclusion_that_matches_nothing_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    detent.quantize(mlp(), {"quant_cfg": {"*weight_quantizer": {"num_bits": 8}, "*nothing*": {"enable": False}}})
    assert "'*nothing*' excludes nothing" in caplog.text


def test_quantizing_again_sets_quantizers_anew() -> None:
    model = detent.quantize(mlp(), detent.INT8_DEFAULT_CFG, lambda m: m(X))
    detent.quantize(model, detent.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
    assert torch.equal(model(X), detent.quantize(mlp(), detent.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)(X))


def test_quantizers_of_ones_own_do_not_keep_others_from_being_converted() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input_quantizer = TensorQuantizer()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.input_quantizer(x))

    model = detent.quantize(Own(), {"quant_cfg": {"*weight_quantizer": {"num_bits": 8}}, "algorithm": None})
    assert model.linear.weight_quantizer.is_enabled


def test_setting_quantizers_for_a_while() -> None:
    model = detent.quantize(mlp(), detent.INT8_DEFAULT_CFG, lambda m: m(X))
    before, quantizer = model(X), model[0].weight_quantizer
    with detent.set_quantizer_by_cfg_context(model, {"*": {"enable": False}}):
        assert torch.equal(model(X), mlp()(X))
    assert torch.equal(model(X), before)
    with detent.set_quantizer_by_cfg_context(model, {"*weight_quantizer": [{"num_bits": 4}, {"num_bits": (4, 3)}]}):
        assert isinstance(model[0].weight_quantizer, SequentialQuantizer)
        detent.calibrate(model, "max", lambda m: m(X * 2))
    assert model[0].weight_quantizer is quantizer
    assert torch.equal(model(X), before)
    with (
        pytest.raises(RuntimeError, match="inside"),
        detent.set_quantizer_by_cfg_context(model, {"*": {"enable": False}}),
    ):
        raise RuntimeError("inside")
    with pytest.raises(DetentError), detent.set_quantizer_by_cfg_context(model, {"*x": {"num_bits": 4}}):
        pass
    assert torch.equal(model(X), before)


def test_switching_by_name() -> None:
    model = detent.quantize(mlp(), detent.INT8_DEFAULT_CFG, lambda m: m(X))
    before = model(X)
    detent.disable_quantizer(model, lambda name: name.startswith("0."))
    assert [n for n, q in named_quantizers(model) if q.is_enabled] == ["2.input_quantizer", "2.weight_quantizer"]
    detent.enable_quantizer(model, "0.[iw]*_quantizer")
    assert torch.equal(model(X), before)
    for function in (detent.enable_quantizer, detent.disable_quantizer):
        with pytest.raises(DetentError, match=r"no quantizer matches '\*lin\*'"):
            function(model, "*lin*")
    with pytest.raises(DetentError, match="call quantize"):
        detent.disable_quantizer(mlp(), "*")
    with pytest.raises(DetentError, match="no quantizers"):
        detent.set_quantizer_by_cfg(mlp(), {"*": {"enable": False}})
    detent.set_quantizer_by_cfg(model, {"2.*": {"enable": False}})
    assert not model[2].weight_quantizer.is_enabled


def test_summary(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = detent.quantize(mlp(), detent.INT8_DEFAULT_CFG, lambda m: m(X))
    assert capsys.readouterr() == ("", "")
    detent.print_quant_summary(model)
    out = capsys.readouterr().out
    assert out.endswith("6 TensorQuantizers found in model\n")
    assert "0.weight_quantizer" in out
    assert "disabled" in out
    detent.print_quant_summary(model, tmp_path)
    assert (tmp_path / ".quant_summary.txt").read_text() == out
    assert capsys.readouterr().out == ""


def test_model_that_is_one_module() -> None:
    model = detent.quantize(nn.Linear(4, 3), detent.INT8_WEIGHT_ONLY_CFG)
    assert [n for n, q in named_quantizers(model) if q.is_enabled] == ["weight_quantizer"]


def test_nothing_to_quantize() -> None:
    with pytest.raises(DetentError, match="no module that Detent can quantize"):
        detent.quantize(nn.Sequential(nn.ReLU()), detent.INT8_DEFAULT_CFG)
    for config in ({}, [], None, {"quant_cfg": 3}, {"quant_cfg": {}, "algo": "max"}):
        with pytest.raises(DetentError):
            detent.quantize(mlp(), config)  # type: ignore[arg-type]


def test_codes_on_request_are_held_as_codes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    attributes = {"num_bits": 4, "axis": 0}
    simulated = detent.quantize(mlp(), {"quant_cfg": {"*weight_quantizer": attributes}})
    real = detent.quantize(mlp(), {"quant_cfg": {"*weight_quantizer": {**attributes, "fake_quant": False}}})
    assert real[0].is_packed
    assert torch.equal(real(X), simulated(X))
