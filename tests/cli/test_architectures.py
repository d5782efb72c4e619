"""Models other than Llama: quantized and read back the same, or one clear error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cli.runner import Workplace, detent, save_checkpoint, small
from detent.runs.load import load_quantized

MODELS: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8},
    "gpt_neox": {},
    "phi3": {},
    "gemma2": {"head_dim": 16},
    "qwen3": {"head_dim": 16},
    "cohere": {},
    "bloom": {"n_layer": 2, "n_head": 4},
}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gpt2": ({"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}, "Conv1D"),
    "falcon": ({"new_decoder_architecture": True, "num_kv_heads": 2}, "FalconLinear"),
}


def with_model(place: Workplace, folder: Path, model_type: str, values: dict[str, Any]) -> Workplace:
    return replace(place, model=save_checkpoint(folder / "model", small(model_type, **values)))


@pytest.mark.parametrize("model_type", MODELS)
def test_read_back_the_same(model_type: str, place: Workplace, tmp_path: Path) -> None:
    place = with_model(place, tmp_path, model_type, MODELS[model_type])
    outcome = place.quantize("--group_size", 32)
    assert outcome.err == ""
    assert place.report["weights"]["quantized"] >= 8
    assert place.evaluate()["perplexity"]["after"] == place.report["perplexity"]["after"]


@pytest.mark.parametrize("model_type", MIXTURES)
def test_merged_experts_stay_and_the_user_is_told(model_type: str, place: Workplace, tmp_path: Path) -> None:
    place = with_model(place, tmp_path, model_type, MIXTURES[model_type])
    outcome = place.quantize()
    assert "% of the parameters" in outcome.err
    assert "experts" in outcome.err
    assert place.report["notices"][0] in outcome.err
    reasons = place.report["weights"]["kept_reasons"].items()
    assert all("experts" in reason for name, reason in reasons if ".experts." in name)
    assert place.evaluate()["perplexity"]["after"] == place.report["perplexity"]["after"]


@pytest.mark.parametrize("model_type", REFUSED)
def test_nothing_to_quantize(model_type: str, place: Workplace, tmp_path: Path) -> None:
    values, word = REFUSED[model_type]
    outcome = with_model(place, tmp_path, model_type, values).quantize(run=detent)
    assert outcome.code == 2
    assert len(outcome.err.strip().splitlines()) == 1
    assert word in outcome.err


@pytest.mark.parametrize("model_type", ["gptj", "bloom"])
@pytest.mark.parametrize("kv_cache", ["fp8", "mxfp4"])
def test_key_value_cache_of_attention_written_out(
    model_type: str, kv_cache: str, place: Workplace, tmp_path: Path
) -> None:
    place = with_model(place, tmp_path, model_type, MODELS[model_type])
    outcome = place.quantize("--group_size", 32, "--kv_cache_dtype", kv_cache)
    assert "Detent's own layout" in outcome.err
    assert place.evaluate()["perplexity"]["after"] == place.report["perplexity"]["after"]
    on: list[Any] = [m for n, m in load_quantized(place.out).named_modules() if n.endswith("bmm_quantizer")]
    assert sum(quantizer.is_enabled for quantizer in on) == 4


def test_key_value_cache_out_of_reach(place: Workplace, tmp_path: Path) -> None:
    place = with_model(place, tmp_path, "mamba", {"state_size": 4, "time_step_rank": 4})
    outcome = place.quantize("--kv_cache_dtype", "fp8", run=detent)
    assert outcome.code == 2
    assert "kv_cache_dtype: MambaForCausalLM" in outcome.err
