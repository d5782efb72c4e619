"""What is refused and why, on modules made for it; overrides; and that a model is left as it was."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import detent
from detent.errors import DetentError
from detent.structure import Fold, Site, Structure, find_structure
from structure.by_hand import apply_all, apply_fold, random_scale
from structure.zoo import inputs, make


class Block(nn.Module):
    """norm -> up -> act -> down, with a way to change what happens between."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.relu, residual: str = "input") -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(12), nn.Linear(12, 20), nn.Linear(20, 12)
        self.between, self.residual = between, residual

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        y: Tensor = self.down(self.between(self.up(normed)))
        return y + (normed if self.residual == "norm" else x)


def site(structure: Structure, name: str) -> Site:
    return next(s for s in structure.sites if s.name == name)


def of(*blocks: nn.Module) -> Structure:
    return find_structure(nn.Sequential(*blocks), torch.zeros(3, 5, 12))


def test_a_plain_block() -> None:
    structure = of(Block(), Block())
    assert structure.blocks == ("0", "1")
    assert site(structure, "1.up").fold == Fold("norm", "1.norm", ("weight",), None, True)
    assert site(structure, "1.down").fold == Fold("rows", "1.up", ("weight", "bias"), None, True)
    assert site(structure, "1.down").block == "1"


def test_a_norm_that_feeds_the_residual() -> None:
    structure = of(Block(residual="norm"), Block())
    assert site(structure, "0.up").fold is None
    assert site(structure, "0.up").reason == "0.norm also feeds 1.norm with no weight in between and the model's output"
    assert site(structure, "1.up").fold is not None


@pytest.mark.parametrize(
    "between",
    [nn.GELU(), torch.sigmoid, torch.square, nn.ReLU6(), lambda x: x.clamp(-9, 9), lambda x: x + 1, nn.Softmax(-1)],
)
def test_what_lies_between_is_not_linear(between: Callable[[Tensor], Tensor]) -> None:
    found = site(of(Block(between), Block(between)), "0.down")
    assert found.fold is None
    assert "0.up" in found.reason


@pytest.mark.parametrize(
    "between", [nn.LeakyReLU(), nn.PReLU(), lambda x: x * 3, lambda x: x.view(3, 5, 4, 5).flatten(2)]
)
def test_what_lies_between_keeps_scales(between: Callable[[Tensor], Tensor]) -> None:
    assert site(of(Block(between)), "0.down").fold is not None


def test_any_order_of_rows_is_recognised() -> None:
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    fold = site(of(Block(lambda x: x[..., order])), "0.down").fold
    assert fold is not None
    assert fold.channels == tuple(order.tolist())


def test_a_wrong_fold_changes_the_function() -> None:
    """The oracle of test_architectures tells right from wrong, and so does the proof."""
    model = nn.Sequential(Block()).double()
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    right = site(find_structure(model, x), "0.down")
    assert right.fold is not None
    scale = random_scale(right, right.fold, 0)
    wrong = Fold("rows", "0.up", ("weight", "bias"), tuple((i + 1) % 20 for i in range(20)), True)
    for fold, same in ((right.fold, True), (wrong, False)):
        changed = copy.deepcopy(model)
        apply_fold(changed, right, fold, scale)
        assert torch.allclose(changed(x), model(x), rtol=1e-9) == same
    table = {"sites": {"0.down": {"kind": "rows", "module": "0.up", "channels": list(wrong.channels or ())}}}
    with pytest.raises(DetentError, match=r"the fold for 0\.down is refused: scaling rows of 0\.up changes 0\.down"):
        find_structure(model, x, overrides=table)


class Branches(nn.Module):
    """Two readers of one projection, and a weight used twice."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.make, self.a, self.b = nn.Linear(12, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        if shared:
            self.b.weight = self.a.weight
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        y = self.make(x)
        return self.a(y) + self.b(y.tanh() if self.shared else y.clone())


def test_copies_are_the_same_activation() -> None:
    structure = find_structure(Branches(shared=False), torch.zeros(3, 12))
    assert site(structure, "a").weights == ("a", "b")
    assert site(structure, "a").fold == Fold("rows", "make", ("weight", "bias"), None, True)


def test_a_tied_weight_with_two_inputs() -> None:
    structure = find_structure(Branches(shared=True), torch.zeros(3, 12))
    assert site(structure, "a").weights == ("a", "b")
    assert site(structure, "a").fold is None


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
        self.q_norm = nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_norm(self.q(x)), self.k(x), self.v(x)
        y: Tensor = self.o(torch.softmax(q @ k.transpose(-1, -2), -1) @ v)
        return y


def test_attention_written_out() -> None:
    structure = find_structure(Attention(), torch.zeros(3, 5, 12))
    assert (structure.keys, structure.values) == (("k",), ("v",))
    assert site(structure, "o").fold == Fold("rows", "v", ("weight", "bias"), None, True)


def test_pytorch_encoder() -> None:
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(12, 3, 20, norm_first=True, batch_first=True), 2, enable_nested_tensor=False
    )
    model = encoder.double().eval()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    structure = find_structure(model, x)
    assert structure.blocks == ("layers.0", "layers.1")
    fold = site(structure, "layers.1.self_attn.out_proj").fold
    assert fold == Fold("rows", "layers.1.self_attn", ("in_proj_weight", "in_proj_bias"), tuple(range(24, 36)), True)
    with torch.no_grad():
        before = model(x)
        assert apply_all(model, structure) == 8
        assert torch.allclose(model(x), before, rtol=1e-9)


def test_convolutions() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.MaxPool2d(2)),
        *(nn.Conv2d(12, 12, 3, groups=3), nn.LeakyReLU(), nn.Conv2d(12, 6, 1), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(24, 5)),
    )
    model = model.double().eval()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    structure = find_structure(model, x)
    assert structure.blocks == ()
    assert "no chain of repeated blocks" in structure.notes[0]
    folds = {s.name: s.fold for s in structure.sites}
    assert folds["3"] == Fold("norm", "1", ("weight", "bias"), None, True)
    assert folds["5"] == Fold("rows", "3", ("weight", "bias"), None, True)
    assert folds["10"] == Fold("rows", "7", ("weight", "bias"), tuple(i // 4 for i in range(24)), True)
    with torch.no_grad():
        before = model(x)
        assert apply_all(model, structure) == 4
        assert torch.allclose(model(x), before, rtol=1e-9)


def test_fused_experts_have_a_scale_each() -> None:
    model = make("mixtral")
    found = site(find_structure(model), "model.layers.0.mlp.experts.down_proj")
    assert found.fold is not None
    assert found.experts == 4
    assert found.fold.axis == -2
    assert found.fold.channels == tuple(range(56, 112))


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x).relu())
        return y


class Mixture(nn.Module):
    """Experts in a list, the tokens gathered for each."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate = nn.RMSNorm(12), nn.Linear(12, 3, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(0, 1)
        weights, chosen = self.gate(tokens).softmax(-1).topk(2)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows, slot = (chosen == index).nonzero(as_tuple=True)
            out = out.index_add(0, rows, expert(tokens[rows]) * weights[rows, slot, None])
        return x + out.view_as(x)


def test_experts_in_a_list() -> None:
    model = nn.Sequential(Mixture(), Mixture()).double()
    x = torch.randn(4, 6, 12, dtype=torch.float64)
    structure = find_structure(model, x)
    assert structure.routers == ("0.gate", "1.gate")
    assert structure.experts == tuple(f"{i}.experts.{j}" for i in range(2) for j in range(3))
    found = site(structure, "1.gate")
    assert found.weights == ("1.gate", *(f"1.experts.{j}.up" for j in range(3)))
    assert found.routed == found.weights[1:]
    assert found.router
    assert found.fold == Fold("norm", "1.norm", ("weight",), None, True)
    assert site(structure, "1.experts.2.down").fold == Fold("rows", "1.experts.2.up", ("weight", "bias"), None, True)
    with torch.no_grad():
        before = model(x)
        assert apply_all(model, structure) == 8
        assert torch.allclose(model(x), before, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_shows_the_same(dtype: torch.dtype) -> None:
    model = make("gemma")
    assert find_structure(model.to(dtype)) == find_structure(make("gemma"))


def test_a_quantized_model_shows_the_same() -> None:
    model = make("llama").float()
    before = find_structure(model)
    ids = inputs(model)["input_ids"]
    quantized = detent.quantize(model, detent.INT8_DEFAULT_CFG, lambda m: m(input_ids=ids))
    expected = quantized(input_ids=ids).logits
    assert find_structure(quantized) == before
    assert torch.equal(quantized(input_ids=ids).logits, expected)


def test_the_model_is_left_as_it_was() -> None:
    model = make("llama").float().train()
    model.model.norm.eval()
    model.config._attn_implementation = "flex_attention"
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]

    def fail(m: nn.Module) -> None:
        m(input_ids=torch.ones(1, 2, dtype=torch.long))
        raise ValueError("stop")

    with pytest.raises(DetentError, match="stop"):
        find_structure(model, fail)
    find_structure(model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "flex_attention"
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_inputs_in_every_form() -> None:
    model, x = nn.Sequential(Block()), torch.zeros(3, 5, 12)
    expected = find_structure(model, x)
    for given in ((x,), {"input": x}, lambda m: m(x)):
        assert find_structure(model, given) == expected
    for wrong, message in (
        (None, "nothing says what inputs it takes"),
        (3, "example inputs are a tensor"),
        ((x, x), "can't be run to find its structure"),
    ):
        with pytest.raises(DetentError, match=message):
            find_structure(model, wrong)


def test_overrides(tmp_path: Path) -> None:
    model, x = nn.Sequential(Block(), Block()), torch.zeros(3, 5, 12)
    table: dict[str, Any] = {
        "sites": {"*.up": None, "1.down": {"kind": "rows", "module": "{block}.up"}},
        "blocks": ["1"],
    }
    (tmp_path / "table.json").write_text(json.dumps(table), encoding="utf-8")
    for given in (table, tmp_path / "table.json"):
        structure = find_structure(model, x, overrides=given)
        assert structure.blocks == ("1",)
        assert site(structure, "0.up").fold is None
        assert site(structure, "0.up").reason == "switched off by the override '*.up'"
        assert site(structure, "1.down").fold == Fold("rows", "1.up", ("weight", "bias"), None, True)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"sites": {"*.nothing": None}}, "matches no site; sites are called, for instance, 0.up"),
        ({"blocks": ["layers.*"]}, "matches no module"),
        ({"rows": {}}, "rows: Extra inputs are not permitted"),
        ({"sites": {"0.up": {"kind": "row", "module": "0.norm"}}}, "kind"),
        ({"sites": {"0.up": {"kind": "offset_norm", "module": "0.norm"}}}, "is of kind 'norm', not 'offset_norm'"),
        ({"sites": {"0.up": {"kind": "norm", "module": "0.nor"}}}, "no module '0.nor'"),
        ({"sites": {"0.up": {"kind": "norm", "module": "0.norm", "channels": [0, 1]}}}, "the site has 12 channels"),
        ({"sites": {"1.up": {"kind": "rows", "module": "0.down"}}}, "refused: scaling rows of 0.down changes"),
        ("no/such/file.json", "there is no such file"),
    ],
)
def test_overrides_that_cannot_be(table: Any, message: str) -> None:
    with pytest.raises(DetentError) as error:
        find_structure(nn.Sequential(Block(), Block()), torch.zeros(3, 5, 12), overrides=table)
    assert message in str(error.value)
