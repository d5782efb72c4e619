"""Routers, experts, shared experts, gates, and what engines join, against facts written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detent.structure import Fold, find_structure
from structure.by_hand import apply_all
from structure.zoo import make

#: By model type, in its last block: router, kind, experts' tensors, shared experts, gates.
_FUSED = ("experts.gate_up_proj", "experts.down_proj")
MIXTURES: dict[str, tuple[str, str, tuple[str, ...], set[str], set[str]]] = {
    "mixtral": ("mlp.gate", "stacked", _FUSED, set(), set()),
    "qwen2_moe": ("mlp.gate", "stacked", _FUSED, {"shared_expert"}, {"mlp.shared_expert_gate"}),
    "qwen3_moe": ("mlp.gate", "stacked", _FUSED, set(), set()),
    "olmoe": ("mlp.gate", "stacked", _FUSED, set(), set()),
    "deepseek_v2": ("mlp.gate", "stacked", _FUSED, {"shared_experts"}, set()),
    "deepseek_v3": ("mlp.gate", "stacked", _FUSED, {"shared_experts"}, set()),
    "glm4_moe": ("mlp.gate", "stacked", _FUSED, {"shared_experts"}, set()),
    "ernie4_5_moe": ("mlp.gate", "stacked", _FUSED, {"shared_experts"}, set()),
    "minimax_m2": ("mlp.gate", "stacked", _FUSED, set(), set()),
    "gpt_oss": ("mlp.router", "stacked", _FUSED, set(), set()),
    "llama4_text": ("feed_forward.router", "stacked", _FUSED, {"shared_expert"}, set()),
    "granitemoeshared": ("block_sparse_moe.router", "stacked", _FUSED, {"shared_mlp"}, set()),
    "jetmoe": ("mlp.router.layer", "stacked", ("input_linear", "output_linear"), set(), set()),
    "dbrx": ("ffn.router.layer", "joined", ("mlp.w1", "mlp.v1", "mlp.w2"), set(), set()),
}


@pytest.mark.parametrize("model_type", MIXTURES)
def test_mixtures(model_type: str) -> None:
    structure = find_structure(make(model_type, device="meta"))
    router, kind, tensors, shared, gates = MIXTURES[model_type]
    block = structure.blocks[-1]
    mixture = structure.mixtures[-1]
    assert mixture.router == f"{block}.{router}"
    assert mixture.router in structure.routers
    assert (mixture.kind, mixture.count, mixture.members) == (kind, 4, ())
    assert sorted(mixture.weights) == sorted(f"{mixture.module.removesuffix('.mlp')}.{t}" for t in tensors) or [
        name.rpartition(".")[2] for name in mixture.weights
    ] == [t.rpartition(".")[2] for t in tensors]
    assert {name.removeprefix(f"{block}.").rpartition(".")[0].rpartition(".")[2] for name in mixture.shared} == shared
    assert {name.removeprefix(f"{block}.") for name in structure.gates if structure.block_of(name) == block} == gates
    for weight in mixture.weights:
        assert structure.mixture_of(weight) == mixture
        assert structure.expert_of(weight) == mixture.module
        site = structure.site_of(weight)
        assert site is not None
        assert weight in site.routed
    for weight in (mixture.router, *mixture.shared):
        assert structure.expert_of(weight) is None


FUSED_GROUPS: dict[str, list[str]] = {
    "llama": ["q_proj k_proj v_proj", "gate_proj up_proj"],
    "qwen3": ["q_proj k_proj v_proj", "gate_proj up_proj"],
    "olmo2": ["q_proj k_proj v_proj", "gate_proj up_proj"],
    "phi": ["q_proj k_proj v_proj"],
    "cohere": ["q_proj k_proj v_proj", "gate_proj up_proj"],
    "gpt2": [],
    "phi3": [],
    "opt": ["q_proj k_proj v_proj"],
    "bert": ["query key value"],
    "mixtral": ["q_proj k_proj v_proj"],
    "deepseek_v3": ["q_a_proj kv_a_proj_with_mqa", "gate_proj up_proj"],
    "qwen2_moe": ["q_proj k_proj v_proj", "gate_proj up_proj"],
    "dbrx": ["w1 v1"],
}


@pytest.mark.parametrize("model_type", FUSED_GROUPS)
def test_fused_groups(model_type: str) -> None:
    structure = find_structure(make(model_type, device="meta"))
    last = [group for group in structure.fused_groups if structure.block_of(group[0]) == structure.blocks[-1]]
    found = [" ".join(name.rpartition(".")[2] for name in group) for group in last]
    assert sorted(found) == sorted(FUSED_GROUPS[model_type])


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.gate(x).relu() * self.up(x))
        return y


class Mixture(nn.Module):
    """Experts in a list, of which only those with tokens are called."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.norm, self.gate = nn.RMSNorm(12), nn.Linear(12, experts, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(0, 1)
        weights, chosen = self.gate(tokens).softmax(-1).topk(1)
        out = torch.zeros_like(tokens)
        for index in chosen.unique().tolist():
            rows, slot = (chosen == index).nonzero(as_tuple=True)
            out = out.index_add(0, rows, self.experts[index](tokens[rows]) * weights[rows, slot, None])
        return x + out.view_as(x)


def test_experts_without_tokens_are_like_their_siblings() -> None:
    """Two tokens reach two experts of 24 at most; a scale on their common input has to reach all."""
    model = nn.Sequential(Mixture(24), Mixture(24)).double()
    structure = find_structure(model, torch.zeros(1, 2, 12, dtype=torch.float64))
    assert structure.unread == ()
    mixture = structure.mixtures[0]
    assert (mixture.kind, mixture.count, mixture.router) == ("list", 24, "0.gate")
    site = structure.site_of("0.gate")
    assert site is not None
    assert set(site.weights) == {"0.gate", *(f"0.experts.{i}.{n}" for i in range(24) for n in ("gate", "up"))}
    for i in range(24):
        down = structure.site_of(f"0.experts.{i}.down")
        assert down is not None
        assert down.fold == Fold("rows", f"0.experts.{i}.up", ("weight", "bias"), None, True)
        assert (f"0.experts.{i}.gate", f"0.experts.{i}.up") in structure.fused_groups
    x: Any = torch.randn(8, 9, 12, dtype=torch.float64)
    with torch.no_grad():
        before = model(x)
        assert apply_all(model, structure) == 2 * 25
        assert torch.allclose(model(x), before, rtol=1e-9)
