"""`detent quantize` on checkpoints that are quantized: as on the float model that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints import quantized_by_hand as by_hand
from checkpoints.quantized_by_hand import Stored, save_shards
from cli.runner import Workplace, contents, detent, save_checkpoint, small, succeed
from detent.checkpoints import Source, open_source

DEEPSEEK = {
    "moe_intermediate_size": 48,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_shared_experts": 1,
    "num_key_value_heads": 4,
}
GPT_OSS = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "layer_types": ["sliding_attention", "full_attention"],
}


def ct(kind: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


#: {kind: (architecture, its configuration, how a weight is stored, quantization_config)}
KINDS: dict[str, tuple[str, dict[str, Any], Callable[[str, Tensor], Stored], dict[str, Any]]] = {
    "deepseek, fp8 blocks": (
        "deepseek_v3",
        DEEPSEEK,
        lambda name, w: by_hand.fp8_blocks(name, w, (32, 32)),
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]},
    ),
    "gpt-oss, mxfp4": ("gpt_oss", GPT_OSS, by_hand.gpt_oss, {"quant_method": "mxfp4"}),
    "fp8 per row": (
        "llama",
        {},
        lambda name, w: by_hand.fp8(name, w, "row"),
        ct("float-quantized", num_bits=8, type="float", strategy="channel"),
    ),
    "fp8 per tensor": (
        "llama",
        {},
        lambda name, w: by_hand.fp8(name, w, "tensor"),
        {"quant_method": "modelopt", "quant_algo": "FP8"},
    ),
    "int4": (
        "llama",
        {},
        lambda name, w: by_hand.int4_packed(name, w, 32, zero=True),
        ct("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=False),
    ),
    "nvfp4": ("llama", {}, by_hand.nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
}


def quantized(folder: Path, kind: str) -> tuple[Path, Path]:
    """(a quantized checkpoint in three shards, the float checkpoint that it stands for)."""
    model_type, values, store, quantization = KINDS[kind]
    original = Source(save_checkpoint(folder / "original", small(model_type, **values)))
    torch.manual_seed(1)
    stored: dict[str, Tensor] = {}
    decoded: dict[str, Tensor] = {}
    for name in original:
        tensor = original.tensor(name)
        fused = model_type == "gpt_oss"
        if name.endswith("_proj") if fused else name.endswith("_proj.weight") and "kv_a" not in name:
            own, value = store(name, tensor)
            stored |= own
            decoded[name] = value.float()
        else:
            stored[name] = decoded[name] = tensor
    config = {**original.config, "dtype": "float32"}
    save_shards(folder / "float", decoded, config, 3)
    save_shards(folder / "quantized", stored, {**config, "quantization_config": quantization}, 3)
    for target in ("float", "quantized"):
        for file in original.path.glob("token*"):
            (folder / target / file.name).write_bytes(file.read_bytes())
    return folder / "quantized", folder / "float"


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] if "," in k else []) for k in KINDS])
def test_the_result_is_that_of_the_float_model(kind: str, tmp_path: Path) -> None:
    codes, floats = quantized(tmp_path, kind)
    scheme = ["--quant_scheme", "w_int4_per_group_sym", "--group_size", 16, "--skip_evaluation", "--device", "cpu"]
    outcomes = [
        succeed("quantize", "--model_dir", folder, "--output_dir", tmp_path / out, *scheme)
        for folder, out in ((codes, "a"), (floats, "b"))
    ]
    assert "the source is quantized" in outcomes[0].out + outcomes[0].err
    a, b = (load_file(tmp_path / out / "model.safetensors") for out in ("a", "b"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    configs = [json.loads((tmp_path / out / "config.json").read_text()) for out in ("a", "b")]
    for config in configs:
        config["quantization_config"]["ignore"].sort()  # in the order of the files, which differs
        config["quantization_config"]["config_groups"]["group_0"]["targets"].sort()
    assert configs[0] == configs[1]
    assert configs[0]["quantization_config"]["quant_method"] == "compressed-tensors"
    report = json.loads((tmp_path / "a" / "detent_report.json").read_text())
    assert report["size_bytes"]["before"] == Source(floats).nbytes


@pytest.mark.slow
def test_with_data_and_evaluation(tmp_path: Path, place: Workplace) -> None:
    codes, floats = quantized(tmp_path, "nvfp4")
    done = []
    for folder, out in ((codes, "a"), (floats, "b")):
        here = replace(place, model=folder, out=tmp_path / out)
        here.quantize("--quant_algo", "gptq", "--group_size", 32)
        done.append(here.report["perplexity"])
    assert done[0] == done[1]
    a, b = (load_file(tmp_path / out / "model.safetensors") for out in ("a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_the_plan_shows_the_float_model(tmp_path: Path) -> None:
    codes, floats = quantized(tmp_path, "gpt-oss, mxfp4")
    assert {name: info.shape for name, info in open_source(codes).tensors.items()} == {
        name: info.shape for name, info in Source(floats).tensors.items()
    }


class TestSourcesThatBreak:
    """One message, nothing left behind, and the old output still there."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return quantized(tmp_path / "m", "fp8 per tensor")[0]

    def refused(self, folder: Path, out: Path, *words: str) -> None:
        out.mkdir()
        (out / "mine.txt").write_text("kept")
        kept, beside = contents(out), sorted(path.name for path in out.parent.iterdir())
        target = out / "new"
        flags = ["--quant_scheme", "w_int4_per_group_sym", "--group_size", 16, "--skip_evaluation", "--device", "cpu"]
        outcome = detent("quantize", "--model_dir", folder, "--output_dir", target, *flags)
        assert outcome.code == 2
        assert sum(line.startswith("Error:") for line in outcome.err.splitlines()) == 1, outcome.err
        assert all(word in outcome.err for word in words), outcome.err
        assert contents(out) == kept
        assert sorted(path.name for path in out.parent.iterdir()) == beside

    def test_a_scale_that_is_not_a_number(self, folder: Path, tmp_path: Path) -> None:
        file = next(f for f in sorted(folder.glob("*.safetensors")) if any("weight_scale" in n for n in load_file(f)))
        tensors = load_file(file)
        name = next(n for n in tensors if n.endswith("weight_scale"))
        save_file(tensors | {name: torch.tensor(torch.nan)}, file)
        self.refused(folder, tmp_path / "out", "scales from nan", name.removesuffix("_scale"))
