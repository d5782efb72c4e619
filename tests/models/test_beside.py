"""Weights that the model class has no place for: carried over, named, listed; quantized on demand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import detent
from cli.runner import succeed
from detent.checkpoints import open_quantized
from detent.errors import DetentError
from detent.formats import decode
from detent.pretrained.facts import is_beside
from models.published import make, row
from models.table import save_text

GLM = "zai-org/GLM-4.5(-Air)"


@pytest.fixture
def glm(tmp_path: Path) -> Path:
    """Its layer behind the last block has the attention weights of the block before."""
    folder = make(row(GLM), tmp_path / "m", torch.float32)
    tensors = load_file(folder / "model.safetensors")
    for side in "qkvo":
        tensors[f"model.layers.2.self_attn.{side}_proj.weight"] = tensors[
            f"model.layers.1.self_attn.{side}_proj.weight"
        ].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def quantize(folder: Path, scheme: str, **options: Any) -> Any:
    algorithms = detent.AlgorithmOptions(**options.pop("algorithms", {}))
    return detent.quantize_checkpoint(
        detent.ModelOptions(str(folder)),
        detent.SchemeOptions(scheme, **options),
        folder.parent / "out",
        algorithms=algorithms,
        calibration=detent.CalibrationOptions(str(save_text(folder.parent / "text.json")), 32, 4),
        evaluation=detent.EvaluationOptions(skip=True),
        overwrite=True,
    )


def ignored(folder: Path) -> list[str]:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return config["quantization_config"]["ignore"]


def test_carried_over_and_named(glm: Path) -> None:
    report = quantize(glm, "w_int4_per_group_sym", group_size=32)
    before, after = load_file(glm / "model.safetensors"), load_file(glm.parent / "out" / "model.safetensors")
    beside = [name for name in before if name.startswith("model.layers.2.")]
    assert len(beside) == 24
    assert all(torch.equal(before[name], after[name]) for name in beside)
    assert {"model.layers.2.eh_proj", "model.layers.2.self_attn.q_proj"} <= set(ignored(glm.parent / "out"))
    assert any("has no place for 20 matrices" in notice for notice in report.notices)
    assert not any("of the parameters in matrices" in notice for notice in report.notices)


@pytest.mark.parametrize("scheme", ["w_int4_per_group_sym", "w_fp4_scale_fp8"])
def test_quantized_like_their_twins(scheme: str, glm: Path) -> None:
    """Equal weights get equal codes and scales, the scale of scales that query, key and value share included."""
    options = {"group_size": 32} if "int4" in scheme else {}
    report = quantize(glm, scheme, quantize_mtp=True, **options)
    checkpoint = open_quantized(glm.parent / "out")
    for side in "qkvo":
        twin, ours = (checkpoint.layer(f"model.layers.{n}.self_attn.{side}_proj").weight for n in (1, 2))
        assert twin is not None
        assert ours is not None
        assert torch.equal(decode(ours), decode(twin))
    kept = {"model.layers.2.eh_proj", "model.layers.2.shared_head.head", "model.layers.2.mlp.gate"}
    assert kept <= set(ignored(glm.parent / "out"))
    assert "model.layers.2.self_attn.q_proj" not in ignored(glm.parent / "out")
    assert any("quantized like those in its blocks" in notice for notice in report.notices)
    names = [layer.name for layer in report.layers]
    assert report.weights.quantized == len(names) == len(set(names))


def test_the_command_line(glm: Path) -> None:
    arguments = ["--model_dir", glm, "--output_dir", glm.parent / "out", "--skip_evaluation", "--device", "cpu"]
    succeed("quantize", *arguments, "--quant_scheme", "w_mxfp4", "--quantize_mtp")
    assert "model.layers.2.self_attn.o_proj" in open_quantized(glm.parent / "out").formats.layers


def test_refusals(glm: Path, tmp_path: Path) -> None:
    with pytest.raises(DetentError, match="activations of model.layers.2.* can't be calibrated"):
        quantize(glm, "w_fp8_a_fp8", quantize_mtp=True)
    llama = make(row("meta-llama/Llama-2-*-hf"), tmp_path / "llama")
    with pytest.raises(DetentError, match="no layers beside LlamaForCausalLM"):
        quantize(llama, "w_mxfp4", quantize_mtp=True)


def test_the_stream_that_they_read_is_not_rotated(glm: Path) -> None:
    report = quantize(glm, "w_uint4_a_uint4_per_channel", algorithms={"before": ("rotation",)})
    assert any(n.startswith("rotation: R1: not done (weights beside the model") for n in report.notices)
    before, after = load_file(glm / "model.safetensors"), load_file(glm.parent / "out" / "model.safetensors")
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    settings = glm.parent / "rotation.json"
    settings.write_text(json.dumps({"name": "rotation", "r1": True}), "utf-8")
    with pytest.raises(DetentError, match="R1 would turn the residual stream, which model.layers.2"):
        quantize(glm, "w_mxfp4", algorithms={"before": ("rotation",), "before_file": str(settings)})


def test_beside_a_model() -> None:
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])
    assert is_beside(model, "model.layers.1.0")
    assert is_beside(model, "mtp.fc")
    assert not is_beside(model, "model.layers.0.1")
    assert not is_beside(model, "model.layers.0.0")
    assert not is_beside(model, "model.head")
