"""What stays in floating point by default is found by what it does, whatever it is called."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from detent.plan.defaults import stays_by_default
from detent.pretrained.loading import load_config, model_on_meta
from detent.structure import find_structure
from models.published import make, row


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


class Block(nn.Module):
    """A mixture whose parts have unusual names, beside an MLP that `volume` turns up and down."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.picker, self.volume = nn.RMSNorm(16), nn.Linear(16, 3), nn.Linear(16, 1)
        self.crowd, self.always = nn.ModuleList(Expert() for _ in range(3)), Expert()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        shares, chosen = self.picker(y).softmax(-1).topk(2, -1)
        total = self.always(y) * self.volume(y).sigmoid()
        for number, expert in enumerate(self.crowd):
            share = torch.where(chosen == number, shares, 0).sum(-1, keepdim=True)
            total = total + expert(y) * share
        return x + total


class Model(nn.Module):
    """Text alone doesn't reach `eyes`."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.eyes = nn.Embedding(30, 16), nn.Sequential(Expert(), nn.Linear(16, 16))
        self.stack, self.last, self.speak = nn.ModuleList(Block() for _ in range(2)), nn.RMSNorm(16), nn.Linear(16, 30)

    def forward(self, ids: torch.Tensor, image: torch.Tensor | None = None) -> torch.Tensor:
        x = self.words(ids)
        if image is not None:
            x = x + self.eyes(image)
        for block in self.stack:
            x = block(x)
        return self.speak(self.last(x))


def test_by_what_it_does() -> None:
    model = Model()
    reason = stays_by_default(model, find_structure(model, torch.randint(0, 30, (2, 5))))
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    kept = {name: why for name in linears if (why := reason(name))}
    assert kept == {
        "eyes.0.up": "outside of the language model, kept by default",
        "eyes.0.down": "outside of the language model, kept by default",
        "eyes.1": "outside of the language model, kept by default",
        "stack.0.picker": "router or gate, kept by default",
        "stack.0.volume": "router or gate, kept by default",
        "stack.1.picker": "router or gate, kept by default",
        "stack.1.volume": "router or gate, kept by default",
        "speak": "output embedding, kept by default",
    }


def test_an_output_layer_that_the_class_does_not_name(tmp_path: Path) -> None:
    folder = make(row("THUDM/chatglm3-6b"), tmp_path / "m")
    model = model_on_meta(load_config(folder, trust_remote_code=True), trust_remote_code=True)
    assert model.get_output_embeddings() is None
    reason = stays_by_default(model, find_structure(model))
    assert reason("transformer.output_layer") == "output embedding, kept by default"


def test_towers_of_a_model_that_hears(tmp_path: Path) -> None:
    """Loaded by the class that its configuration names; convolutions and norms of the tower are outside as well."""
    folder = make(row("Qwen/Qwen2-Audio-7B"), tmp_path / "m")
    model = model_on_meta(load_config(folder))
    assert type(model).__name__ == "Qwen2AudioForConditionalGeneration"
    reason = stays_by_default(model, find_structure(model))
    outside = [
        name for name, module in model.named_modules() if list(module.parameters(recurse=False)) and reason(name)
    ]
    tower = ("model.audio_tower.", "model.multi_modal_projector.")
    assert outside
    assert all(name.startswith(tower) or name == "lm_head" for name in outside)
    assert "model.audio_tower.conv1" in outside
