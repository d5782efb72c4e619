"""Names in files and in models: against what transformers itself reads and writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from detent.errors import DetentError
from detent.nn.experts_layout import take_experts_apart
from detent.pretrained import names as pretrained_names
from detent.pretrained.names import CheckpointNames
from structure import zoo

MODELS = ["llama", "gpt_neox", "mixtral", "qwen2_moe", "granitemoe", "phimoe", "deepseek_v3", "gpt_oss", "dbrx"]


def saved(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """What transformers writes of a model."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("model_type", MODELS)
def test_there_and_back(model_type: str, tmp_path: Path) -> None:
    model = zoo.make(model_type).float()
    tensors = saved(model, tmp_path)
    names = CheckpointNames(model, tensors)
    assert sorted(name for group in names.groups for name in group.tensors) == sorted(tensors)
    parameters = dict(model.named_parameters())
    assert all(names.of_parameter(name) is not None for name in parameters)
    written = names.to_file(parameters)
    assert written.keys() <= tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in written)


def test_a_scaled_expert_is_what_transformers_loads(tmp_path: Path) -> None:
    """One merged parameter is changed: written under the names of single experts, transformers reads it back merged."""
    from transformers import AutoModelForCausalLM

    model = zoo.make("mixtral").float()
    tensors = saved(model, tmp_path / "a")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    scaled = model.get_parameter(name).detach() * torch.linspace(0.5, 2, 48)
    changed = CheckpointNames(model, tensors).to_file({name: scaled})
    assert {key.rpartition(".experts.")[2] for key in changed} == {f"{e}.w{w}.weight" for e in range(4) for w in (1, 3)}
    model.config.save_pretrained(tmp_path / "b")
    save_file({**tensors, **{k: v.contiguous() for k, v in changed.items()}}, tmp_path / "b" / "model.safetensors")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert torch.equal(read.get_parameter(name), scaled)


def test_names_that_differ(tmp_path: Path) -> None:
    model = zoo.make("gpt_neox").float()
    names = CheckpointNames(model, saved(model, tmp_path))
    assert names.layer("lm_head") == "embed_out"
    assert names.parameter("embed_out.weight") == "lm_head.weight"
    assert names.container("gpt_neox.layers.0.attention") == "gpt_neox.layers.0.attention"


def test_a_file_without_the_prefix(tmp_path: Path) -> None:
    """Saved from the base model: transformers adds the prefix."""
    model = zoo.make("llama").float()
    names = CheckpointNames(model, saved(model.model, tmp_path))
    assert names.layer("model.layers.0.mlp.up_proj") == "layers.0.mlp.up_proj"
    assert names.container("model.layers.0.self_attn") == "layers.0.self_attn"


def test_what_the_model_has_no_place_for() -> None:
    model = zoo.make("llama", device="meta")
    names = CheckpointNames(model, [*model.state_dict(), "model.mtp.0.proj.weight"])
    assert names.of_tensor("model.mtp.0.proj.weight").parameters == ()


def test_two_claims() -> None:
    model = zoo.make("gpt_neox", device="meta")
    with pytest.raises(DetentError, match=r"embed_out\.weight and lm_head\.weight both map"):
        CheckpointNames(model, [*model.state_dict(), "embed_out.weight"])


# ---- experts, one by one -----------------------------------------------------------------------------------------


def check_experts(model: Any, tensors: dict[str, torch.Tensor]) -> CheckpointNames:
    """What names say of a file is what transformers' model holds when it has loaded it."""
    names = CheckpointNames(model, tensors)
    fused = {name: p.detach().clone() for name, p in model.named_parameters() if ".experts." in name}
    take_experts_apart(model)
    apart = {name: p for name, p in model.named_parameters() if ".experts." in name}
    assert apart.keys() == names._pieces.keys()
    for name, parameter in apart.items():
        assert torch.equal(names.to_model(name, tensors.__getitem__)[name], parameter)
    changed = names.to_file({name: p.detach() + 1 for name, p in apart.items()})
    assert all(torch.equal(value, tensors[name] + 1) for name, value in changed.items())
    assert fused.keys() <= names._fused.keys()
    return names


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "granitemoe", "deepseek_v3", "gpt_oss", "dbrx"])
def test_experts_are_found_in_the_file(model_type: str, tmp_path: Path) -> None:
    model = zoo.make(model_type).float()
    names = check_experts(model, saved(model, tmp_path))
    layers = [names.layer(name) for name in sorted(names.experts)]
    expected = {
        "mixtral": "model.layers.0.block_sparse_moe.experts.0.w2",
        "granitemoe": "model.layers.0.block_sparse_moe.experts.0.down_proj",
        "deepseek_v3": "model.layers.1.mlp.experts.0.down_proj",
        "dbrx": "transformer.blocks.0.ffn.experts.mlp.0.down_proj",
    }
    assert layers[0] == expected.get(model_type, "model.layers.0.mlp.experts.0.down_proj")
    assert len(set(layers)) == len(layers)


def test_experts_that_transformers_transposes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3-VL-MoE's rule, which looks at shapes, on a file that holds them as [inputs, outputs]."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    monkeypatch.setattr(pretrained_names, "_rules", lambda _: ([], get_checkpoint_conversion_mapping("qwen3_vl_moe")))
    model = zoo.make("qwen3_moe", moe_intermediate_size=20).float()  # 24 would make a square, which it leaves alone
    tensors = {n: p.detach().mT.contiguous() if ".experts." in n else p.detach() for n, p in model.named_parameters()}
    names = check_experts(model, tensors)
    assert all(piece.part.turned for n in names.experts if (piece := names.piece(f"{n}.weight")))


def test_experts_written_one_by_one_for_a_model_that_has_them_in_one_tensor() -> None:
    model = zoo.make("gpt_oss").float()
    whole = {n: p.detach() for n, p in model.named_parameters()}
    names = CheckpointNames(model, whole)
    weights = {n: names.to_model(n, whole.__getitem__)[n] for n in names._pieces if n.endswith("weight")}
    file = {n: value for n, value in whole.items() if "experts.gate_up_proj" not in n and "experts.down_proj" not in n}
    again = CheckpointNames(model, [*file, *weights])
    assert all(torch.equal(again.to_model(n, (file | weights).__getitem__)[n], value) for n, value in weights.items())
