"""Algorithms on the grids of GGUF: super-blocks of integer scales, and stored minimums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import detent
from detent.algorithms.autoround import OffsetWeight
from detent.algorithms.gptq import Job, factorise, gptq
from detent.algorithms.learned import LearnedWeight
from detent.algorithms.objective import rounded_to_nearest
from detent.algorithms.scale_search import weighted_range
from detent.formats import GGUF_FORMATS, QTensor, decode, encode

_KINDS = ["Q4_0", "Q4_1", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS", "TQ2_0"]


def _problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    """(weight [24, 512], second moment of inputs that are correlated and of different sizes)."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(1500, 512, generator=generator) @ torch.randn(512, 512, generator=generator) * 0.1
    inputs = mixed + torch.randn(1500, 512, generator=generator) * torch.rand(512, generator=generator) ** 2
    return torch.randn(24, 512, generator=generator) * 0.02, inputs.T @ inputs


def _objective(difference: Tensor, moment: Tensor) -> float:
    d, g = difference.double(), moment.double()
    return float((d @ g * d).sum())


@pytest.mark.parametrize("name", _KINDS)
def test_gptq_is_better_than_rounding_by_importance(name: str) -> None:
    weight, moment = _problem()
    fmt = GGUF_FORMATS[name]
    q = encode(weight, fmt, importance=moment.diagonal())
    result = gptq([Job(weight, fmt, q.scales)], factorise(moment))[0]
    back = decode(encode(result.weight, fmt, q.scales))
    assert torch.equal(back, result.weight)
    assert _objective(back - weight, moment) < 0.85 * _objective(decode(q) - weight, moment)


@pytest.mark.parametrize("name", _KINDS)
def test_rounding_under_given_scales_is_that_of_the_codec(name: str) -> None:
    weight, _ = _problem(1)
    fmt = GGUF_FORMATS[name]
    q = encode(weight, fmt)
    values, exact = rounded_to_nearest(weight, fmt, q.scales), decode(q)
    assert float((values != exact).float().mean()) < 1e-3  # what float32 takes for a tie may fall either way
    assert torch.equal(decode(encode(values, fmt, q.scales)), values)


@pytest.mark.parametrize("name", _KINDS)
def test_a_search_under_the_second_moment_weighs_columns(name: str) -> None:
    weight, moment = _problem(2)
    fmt = GGUF_FORMATS[name]
    choice = weighted_range(weight, fmt, moment.diagonal(), [1.0])
    values = decode(encode(weight, fmt, choice.scales(fmt)))
    error = ((values - weight).double().square() * moment.diagonal().double()).sum()
    assert choice.after <= choice.before
    assert choice.after == pytest.approx(float(error), rel=1e-3)


@pytest.mark.parametrize("name", _KINDS)
def test_learned_weights_start_and_end_on_the_grid(name: str) -> None:
    weight, _ = _problem(3)
    fmt = GGUF_FORMATS[name]
    q = encode(weight, fmt)
    for learned in (LearnedWeight(weight, fmt, q.scales), OffsetWeight(weight, fmt, q.scales)):
        assert torch.allclose(learned(), decode(q), atol=1e-6)
        learned().square().sum().backward()
        with torch.no_grad():
            for parameter in learned.parameters():
                parameter.sub_(1e-2 * parameter.grad.sign())
        learned.settle()
        values, scales = learned.result()
        assert torch.equal(decode(encode(values, fmt, scales)), values)
        assert torch.allclose(values, learned().detach(), atol=1e-6)


@pytest.mark.parametrize("algorithm", ["awq_lite", "awq_full", "gptq", "local_hessian", "autoround"])
@pytest.mark.parametrize("name", ["Q4_1", "Q4_K"])
def test_a_model_is_calibrated_on_them(name: str, algorithm: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64, bias=False), nn.ReLU(), nn.Linear(64, 256, bias=False))
    batches = [torch.randn(64, 256) * torch.linspace(0.1, 2.0, 256) for _ in range(4)]
    wanted = [model(batch).detach() for batch in batches]
    fmt = GGUF_FORMATS[name]
    step = {"method": algorithm} | ({"iterations": 20} if algorithm == "autoround" else {})
    config = {
        "quant_cfg": {"*weight_quantizer": {"format": fmt}, "*input_quantizer": {"enable": False}},
        "algorithm": step,
    }
    detent.quantize(model, config, lambda m: [m(batch) for batch in batches])
    error = sum(float((model(b).detach() - y).square().sum()) for b, y in zip(batches, wanted, strict=True))
    assert error < 0.02 * sum(float(y.square().sum()) for y in wanted)
    again = nn.Sequential(nn.Linear(256, 64, bias=False), nn.ReLU(), nn.Linear(64, 256, bias=False))
    detent.restore_from_detent_state(again, detent.detent_state(model))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(batches[0]), model(batches[0]))
    for layer in (model[0], model[2]):
        q = layer.weight_quantizer.quantize_to_codes(layer.weight.detach())
        assert isinstance(q, QTensor)
        assert torch.equal(decode(q), layer.weight_quantizer(layer.weight.detach()))
