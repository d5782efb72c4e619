"""Two blocks of each kind stand for all: the same structure as when every block is run, at a cost without depth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from detent.structure import Fold, Structure, discovery, find_structure
from detent.structure.probe import Probe
from structure.zoo import DECODERS, make


class Whole(discovery.Skeleton):
    """A skeleton that leaves nothing out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.keep()


def run_whole(model: nn.Module, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> Structure:
    with monkeypatch.context() as patch:
        patch.setattr(discovery, "Skeleton", Whole)
        return find_structure(model, inputs)


def leaves(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> tuple[int, Structure]:
    """How often a probe drew numbers, and what it found."""
    drawn = 0
    original = Probe._leaf

    def count(self: Probe, *args: Any) -> Tensor:
        nonlocal drawn
        drawn += 1
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Probe, "_leaf", count)
        structure = find_structure(model)
    return drawn, structure


@pytest.mark.parametrize(
    ("model_type", "values"),
    [
        ("llama", {}),
        ("gemma3_text", {"num_hidden_layers": 7}),
        ("olmo2", {}),
        ("mixtral", {}),
        ("deepseek_v3", {}),
        ("llama4_text", {}),
        ("bert", {}),
        ("t5", {"num_layers": 5, "num_decoder_layers": 6}),
    ],
)
def test_the_same_as_when_every_block_is_run(
    model_type: str, values: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(model_type, device="meta", **({"num_hidden_layers": 6} | values if model_type != "t5" else values))
    structure = find_structure(model)
    assert len(structure.blocks) >= 6
    assert structure == run_whole(model, None, monkeypatch)


def test_llama_405b_costs_what_three_blocks_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published shape, with a narrow vocabulary: cost is counted in drawn tensors, and the fold known by hand."""

    def llama(layers: int) -> Any:
        config = transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=16384,
            intermediate_size=53248,
            num_hidden_layers=layers,
            num_attention_heads=128,
            num_key_value_heads=8,
        )
        with torch.device("meta"):
            return transformers.LlamaForCausalLM(config)

    cost, structure = leaves(llama(126), monkeypatch)
    assert cost == leaves(llama(3), monkeypatch)[0]
    assert structure.blocks == tuple(f"model.layers.{i}" for i in range(126))
    assert len(structure.sites) == 4 * 126 + 1
    attention = "model.layers.60.self_attn."
    site = structure.site_of(f"{attention}o_proj")
    assert site is not None
    channels = tuple(head // 16 * 128 + i for head in range(128) for i in range(128))
    assert site.fold == Fold("rows", f"{attention}v_proj", ("weight",), channels, True)
    assert structure.stream is not None
    assert structure.stream.rotatable
    assert len(structure.stream.writers) == 2 * 126
    assert len(structure.stream.norms) == 2 * 126 + 1


class Block(nn.Module):
    def __init__(self, linear: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(12), nn.Linear(12, 20), nn.Linear(20, 12)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.norm(x))
        out: Tensor = self.down(y.relu() if self.linear else y.sigmoid())
        return x + out


def test_an_attribute_makes_a_kind() -> None:
    model = nn.Sequential(*(Block(linear=i != 3) for i in range(6)))
    structure = find_structure(model, torch.zeros(3, 5, 12))
    assert [structure.site_of(f"{i}.down").fold is None for i in range(6)] == [i == 3 for i in range(6)]  # type: ignore[union-attr]


def test_blocks_that_share_a_weight_are_no_stand_ins() -> None:
    model = nn.Sequential(*(Block(linear=True) for _ in range(6)))
    model[2].up.weight = model[3].up.weight  # type: ignore[union-attr]
    structure = find_structure(model, torch.zeros(3, 5, 12))
    assert structure.site_of("2.up") == structure.site_of("3.up")
    assert structure.site_of("2.up").fold is None  # type: ignore[union-attr]
    assert structure.site_of("4.up").fold is not None  # type: ignore[union-attr]


def test_first_and_last_that_disagree_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a residual the first block reads the inputs, the others what the block before made."""

    class Plain(Block):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down(self.up(x).relu())
            return y

    model, x = nn.Sequential(*(Plain(linear=True) for _ in range(5))), torch.zeros(3, 5, 12)
    structure = find_structure(model, x)
    assert structure == run_whole(model, x, monkeypatch)
    assert structure.site_of("2.up").fold == Fold("rows", "1.down", ("weight", "bias"), None, True)  # type: ignore[union-attr]


# ---- what is a chain ------------------------------------------------------------------------------------------------


def test_encoder_and_decoder_are_two_chains() -> None:
    structure = find_structure(make("bart", device="meta"))
    assert structure.chains == tuple(
        tuple(f"model.{part}.layers.{i}" for i in range(2)) for part in ("encoder", "decoder")
    )
    assert structure.blocks == (*structure.chains[0], *structure.chains[1])


def test_experts_of_one_block_are_no_chain() -> None:
    structure = find_structure(make("mixtral", device="meta", num_hidden_layers=1))
    assert structure.chains == (("model.layers.0",),)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(*(nn.Linear(12, 12) for _ in range(4))),
        nn.Sequential(*(nn.Linear(12 - i, 11 - i) for i in range(4))),
        nn.Sequential(*(nn.Sequential(nn.Linear(12 - i, 11 - i), nn.ReLU()) for i in range(4))),
    ],
)
def test_plain_layers_and_pyramids_are_no_blocks(model: nn.Module) -> None:
    assert find_structure(model, torch.zeros(3, 12)).chains == ()


def test_the_stages_of_a_pyramid_hold_chains() -> None:
    """A residual network's stages change the shape, and so does the first layer of each; the others are chains."""
    config = transformers.ResNetConfig(
        depths=[3, 2, 4, 1], hidden_sizes=[8, 12, 16, 20], embedding_size=8, layer_type="basic"
    )
    with torch.device("meta"):
        model = transformers.ResNetModel(config)
    structure = find_structure(model, {"pixel_values": torch.zeros(1, 3, 64, 64, device="meta")})
    stages = {
        tuple(f"encoder.stages.0.layers.{i}" for i in range(3)),
        tuple(f"encoder.stages.2.layers.{i}" for i in range(1, 4)),
    }
    assert stages <= set(structure.chains)
    assert not any("encoder.stages.0" in chain for chain in structure.chains)


def test_the_zoo_has_chains_of_equal_blocks() -> None:
    for model_type in ("gpt2", "falcon", "mamba", "dbrx"):
        assert model_type in DECODERS
        assert [len(chain) for chain in find_structure(make(model_type, device="meta")).chains] == [2]
