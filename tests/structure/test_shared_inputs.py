from __future__ import annotations

import contextlib

import torch
from torch import nn

from detent.structure import linears_sharing_input
from tiny_language_model import make_model


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down, self.unused = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(self.gate(x) * self.up(x))
        return result


def test_groups_are_found_within_a_parent() -> None:
    model = nn.Sequential(Block(), Block())
    groups = linears_sharing_input(model, lambda m: m(torch.ones(1, 4)))
    assert groups == [["0.gate", "0.up"], ["1.gate", "1.up"]]


def test_equal_tensors_are_not_the_same_tensor() -> None:
    class Copies(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.gate(x) + self.up(x.clone())
            return result

    assert linears_sharing_input(Copies(), lambda m: m(torch.ones(1, 4))) == []


def test_hooks_are_gone_even_after_a_failure() -> None:
    model = Block()

    def fail(_: nn.Module) -> None:
        raise ValueError("stop")

    for run in (lambda m: m(torch.ones(1, 4)), fail):
        with contextlib.suppress(ValueError):
            linears_sharing_input(model, run)
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_llama() -> None:
    model = make_model()
    groups = linears_sharing_input(model, lambda m: m(input_ids=torch.ones(1, 2, dtype=torch.long)))
    attention = [f"model.layers.0.self_attn.{n}_proj" for n in "qkv"]
    assert groups[:2] == [attention, ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]]
    assert len(groups) == 4
