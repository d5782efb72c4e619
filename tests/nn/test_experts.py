"""Experts that a module holds in one tensor, taken apart: the model computes what it did, on every layout."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import detent
from detent.nn.experts import QuantExperts, every_token_to_every_expert, take_apart
from detent.nn.experts_layout import fused_experts, take_experts_apart
from structure import zoo

#: Layouts: [gate; up] in rows; the same in columns, taking turns, with biases and clamps; in columns, for all tokens;
#: one after the other in matrices.
MODELS = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "granitemoe",
    "phimoe",
    "deepseek_v3",
    "glm4_moe",
    "olmoe",
    "ernie4_5_moe",
]
OTHERS = ["gpt_oss", "llama4_text", "dbrx"]


@pytest.mark.parametrize("model_type", [*MODELS, *OTHERS])
def test_the_model_computes_what_it_did(model_type: str) -> None:
    model = zoo.make(model_type)
    inputs = zoo.inputs(model)
    with torch.no_grad():
        before = model(**inputs).logits
        names = [name for name, _, _ in fused_experts(model)]
        take_experts_apart(model)
        after = model(**inputs).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)
    assert names
    assert [name for name, module in model.named_modules() if isinstance(module, QuantExperts)] == names
    assert not [name for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3]


def test_gate_and_up_are_told_apart_by_what_they_do() -> None:
    """Of gpt-oss, by hand: rows take turns, gate first."""
    model = zoo.make("gpt_oss")
    experts = model.model.layers[1].mlp.experts
    weights, biases = experts.gate_up_proj.detach().clone(), experts.gate_up_proj_bias.detach().clone()
    take_experts_apart(model)
    assert torch.equal(experts.get_submodule("2.gate_proj").weight, weights[2, :, ::2].T)
    assert torch.equal(experts.get_submodule("2.up_proj").weight, weights[2, :, 1::2].T)
    assert torch.equal(experts.get_submodule("2.up_proj").bias, biases[2, 1::2])


class PlainExperts(nn.Module):
    """Three experts: what comes between their projections is for subclasses."""

    rows = 10

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, self.rows, 6))
        self.down = nn.Parameter(torch.randn(3, 6, 10))

    def between(self, y: torch.Tensor) -> torch.Tensor:
        return y.relu().square()

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for expert in index.unique():
            token, place = torch.where(index == expert)
            y = self.between(nn.functional.linear(x[token], self.up[expert]))
            out.index_add_(0, token, nn.functional.linear(y, self.down[expert]) * weights[token, place, None])
        return out


class GateLastExperts(PlainExperts):
    rows = 20

    def between(self, y: torch.Tensor) -> torch.Tensor:
        up, gate = y.chunk(2, -1)
        return nn.functional.silu(gate) * (up + 1).clamp(-3, 3)


@pytest.mark.parametrize(
    ("kind", "names"),
    [(PlainExperts, ["up_proj", "down_proj"]), (GateLastExperts, ["up_proj", "gate_proj", "down_proj"])],
)
def test_experts_of_other_libraries(kind: type[PlainExperts], names: list[str]) -> None:
    experts = kind()
    given = (torch.randn(5, 6), torch.randint(3, (5, 2)), torch.rand(5, 2))
    before = experts(*given)
    take_experts_apart(experts)
    assert [name for name, _ in experts.get_submodule("1").named_children()] == names
    torch.testing.assert_close(experts(*given), before)


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_every_token_for_every_expert_and_the_output_of_the_router(model_type: str) -> None:
    model = zoo.make(model_type)
    take_experts_apart(model)
    experts = model.model.layers[1].mlp.experts
    given = (torch.randn(5, 48).double(), torch.tensor([[0, 2]] * 5), torch.rand(5, 2).double())
    before, seen = experts(*given), []
    for expert in experts.experts():
        experts.get_submodule(f"{expert}.up_proj").register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with every_token_to_every_expert():
        after = experts(*given)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)
    assert len(seen) == 4
    assert all(torch.equal(x, given[0]) for x in seen)


def test_weights_are_views_until_they_change() -> None:
    experts = zoo.make("mixtral").model.layers[0].mlp.experts
    memory = experts.gate_up_proj.untyped_storage().data_ptr()
    ((_, module, layout),) = fused_experts(experts)
    take_apart(module, layout)
    places = {
        experts.get_submodule(f"{e}.{n}").weight.untyped_storage().data_ptr()
        for e in range(4)
        for n in ("gate_proj", "up_proj")
    }
    assert places == {memory}


def test_the_layout_of_experts_without_memory() -> None:
    """On the meta device, of a size whose weights would take 90 GB."""
    from transformers import AutoConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = AutoConfig.for_model("mixtral", hidden_size=8192, intermediate_size=28672, num_local_experts=64)
    with torch.device("meta"):
        experts = MixtralExperts(config)
    take_experts_apart(experts)
    assert experts.get_submodule("63.down_proj").weight.shape == (8192, 28672)


def quantized(model_type: str = "mixtral", **more: Any) -> tuple[Any, Any]:
    model = zoo.make(model_type).float()
    float_model = copy.deepcopy(model)
    config = {
        "quant_cfg": {"*experts*weight_quantizer": {"num_bits": 8, "axis": 0}, "default": {"enable": False}},
        **more,
    }
    detent.quantize(model, {"algorithm": "max", **config}, lambda m: m(**zoo.inputs(m)))
    return model, float_model


@pytest.mark.parametrize("model_type", ["mixtral", *OTHERS])
def test_save_and_restore(model_type: str, tmp_path: Any) -> None:
    model, float_model = quantized(model_type)
    inputs = zoo.inputs(model)
    with torch.no_grad():
        simulated, before = model(**inputs).logits, float_model(**inputs).logits
    assert 0 < (simulated - before).norm() < 0.05 * before.norm()
    detent.save(model, tmp_path / "model.safetensors")
    again = detent.restore(zoo.make(model_type, seed=1).float(), tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, simulated)
        detent.fold_weight(model)
        torch.testing.assert_close(model(**inputs).logits, simulated, rtol=1e-5, atol=1e-5)
        detent.compress(again)
        torch.testing.assert_close(again(**inputs).logits, simulated, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(copy.deepcopy(again)(**inputs).logits, simulated, rtol=1e-5, atol=1e-5)


def test_a_failed_quantization_leaves_the_experts_as_they_were() -> None:
    model = zoo.make("mixtral").float()
    before = {name: p.clone() for name, p in model.named_parameters()}
    config = {"quant_cfg": {"*input_quantizer": {"num_bits": 8}}, "algorithm": "max"}
    with pytest.raises(detent.DetentError):
        detent.quantize(model, config, lambda m: None)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(p, after[name]) for name, p in before.items())
    model(**zoo.inputs(model))
