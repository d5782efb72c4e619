"""`detent quantize` on quantized checkpoints, as on the float model that they stand for, and on broken ones."""

from __future__ import annotations

import json
import shutil
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
from detent.runs.stream import LayerStream

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
    outcomes = [
        succeed("quantize", "--model_dir", folder, "--output_dir", tmp_path / out, *FLAGS)
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


FLAGS = ["--quant_scheme", "w_int4_per_group_sym", "--group_size", 16, "--skip_evaluation", "--device", "cpu"]
LAST = "model.layers.3.input_layernorm.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("original") / "m", small(num_hidden_layers=4))


@pytest.fixture(scope="module")
def written(original: Path) -> Path:
    succeed("quantize", "--model_dir", original, "--output_dir", original.parent / "out", *FLAGS)
    return original.parent / "out"


class TestSourcesThatBreak:
    """One message, nothing left behind, and the old output still there."""

    @pytest.fixture
    def tensors(self, original: Path) -> dict[str, Tensor]:
        return load_file(original / "model.safetensors")

    def sharded(self, folder: Path, tensors: dict[str, Tensor], original: Path, **config: Any) -> Path:
        return save_shards(folder, tensors, {**Source(original).config, "dtype": "float32", **config}, 3)

    def refused(self, folder: Path, tmp_path: Path, *words: str) -> None:
        """`tmp_path` has an output in it that Detent wrote from what was then whole."""
        target = tmp_path / "out"
        kept, beside = contents(target), sorted(path.name for path in tmp_path.iterdir())
        outcome = detent("quantize", "--model_dir", folder, "--output_dir", target, "--overwrite", *FLAGS)
        assert outcome.code == 2, outcome.err
        assert sum(line.startswith("Error:") for line in outcome.err.splitlines()) == 1, outcome.err
        assert all(word in outcome.err for word in words), outcome.err
        assert contents(target) == kept
        assert sorted(path.name for path in tmp_path.iterdir()) == beside

    @pytest.fixture
    def old(self, written: Path, tmp_path: Path) -> None:
        shutil.copytree(written, tmp_path / "out")

    @pytest.mark.usefixtures("old")
    @pytest.mark.parametrize(
        ("name", "value", "words"),
        [
            (LAST, torch.ones(63), ["(63,)", "(64,)"]),
            (LAST, torch.ones(64, dtype=torch.int32), ["int32", "not as floating-point"]),
            ("model.layers.3.mlp.up_proj.weight", torch.ones(64, 128), ["(64, 128)", "(128, 64)"]),
            ("model.layers.3.mlp.up_proj.weight", torch.ones(128, 64, dtype=torch.bool), ["bool"]),
            ("model.embed_tokens.weight", torch.ones(3, 64), ["(3, 64)", "(63, 64)"]),
            ("model.layers.3.mlp.up_proj.weight", torch.full((128, 64), torch.nan), ["NaN"]),
            (LAST, torch.full((64,), torch.inf), ["NaN or infinity"]),
        ],
    )
    def test_a_tensor_that_cannot_be_what_it_is_for(
        self, name: str, value: Tensor, words: list[str], tensors: dict[str, Tensor], original: Path, tmp_path: Path
    ) -> None:
        folder = self.sharded(tmp_path / "m", tensors | {name: value}, original)
        self.refused(folder, tmp_path, name.removesuffix(".weight"), *words)

    @pytest.mark.usefixtures("old")
    def test_a_tensor_that_is_missing(self, tensors: dict[str, Tensor], original: Path, tmp_path: Path) -> None:
        del tensors[LAST]
        self.refused(self.sharded(tmp_path / "m", tensors, original), tmp_path, "lacks 1 of the weights", LAST)

    @pytest.mark.usefixtures("old")
    def test_a_shard_that_disappears_midway(
        self, tensors: dict[str, Tensor], original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = self.sharded(tmp_path / "m", tensors, original)
        shard, plain, asked = folder / "model-00002-of-00003.safetensors", LayerStream.layer, list[str]()

        def layer(self: LayerStream, name: str, **options: Any) -> Any:
            asked.append(name)
            if len(asked) == 9:
                shard.unlink()
                self._source.close()  # files are opened again when they are needed
            return plain(self, name, **options)

        monkeypatch.setattr(LayerStream, "layer", layer)
        self.refused(folder, tmp_path, shard.name)
        assert len(asked) >= 9

    @pytest.mark.usefixtures("old")
    @pytest.mark.parametrize("change", ["another shard", "more", "fewer", "missing shard"])
    def test_an_index_that_disagrees_with_its_shards(
        self, change: str, tensors: dict[str, Tensor], original: Path, tmp_path: Path
    ) -> None:
        folder = self.sharded(tmp_path / "m", tensors, original)
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        names = index["weight_map"]
        if change == "another shard":
            names[LAST] = next(file for file in names.values() if file != names[LAST])
        elif change == "more":
            names["model.layers.4.input_layernorm.weight"] = names[LAST]
        elif change == "fewer":
            del names[LAST]
        else:
            (folder / names[LAST]).unlink()
        path.write_text(json.dumps(index))
        word = {"more": "model.layers.4", "missing shard": names.get(LAST, "")}.get(change, LAST)
        self.refused(folder, tmp_path, word, "ownload")

    @pytest.mark.usefixtures("old")
    def test_two_tensors_of_one_name(self, tensors: dict[str, Tensor], original: Path, tmp_path: Path) -> None:
        folder = self.sharded(tmp_path / "m", tensors, original)
        here = next(f for f in sorted(folder.glob("*.safetensors")) if LAST not in load_file(f))
        save_file(load_file(here) | {LAST: torch.ones(64)}, here)
        self.refused(folder, tmp_path, LAST, here.name, "both")

    def test_a_scale_that_is_not_a_number(self, tmp_path: Path) -> None:
        folder, floats = quantized(tmp_path / "m", "fp8 per tensor")
        succeed("quantize", "--model_dir", floats, "--output_dir", tmp_path / "out", *FLAGS)
        file = next(f for f in sorted(folder.glob("*.safetensors")) if any("weight_scale" in n for n in load_file(f)))
        tensors = load_file(file)
        name = next(n for n in tensors if n.endswith("weight_scale"))
        save_file(tensors | {name: torch.tensor(torch.nan)}, file)
        self.refused(folder, tmp_path, "scales from nan", name.removesuffix("_scale"))
