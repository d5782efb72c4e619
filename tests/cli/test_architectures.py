"""Models other than Llama: quantized and read back the same, or one clear error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

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
OWN_LINEAR: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
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
def test_experts_are_quantized_one_by_one(model_type: str, place: Workplace, tmp_path: Path) -> None:
    place = with_model(place, tmp_path, model_type, MIXTURES[model_type])
    outcome = place.quantize("--group_size", 32)
    assert outcome.err == ""
    assert place.report["weights"]["quantized"] == 2 * (4 + 4 * 3)
    assert not any(".experts." in name for name in place.report["weights"]["kept_reasons"])
    assert place.evaluate()["perplexity"]["after"] == place.report["perplexity"]["after"]


GROUPS = ("w_int4_per_group_sym", "--group_size", "32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", OWN_LINEAR)
@pytest.mark.parametrize(
    "options",
    [
        GROUPS,
        (*GROUPS, "--quant_algo", "awq"),
        (*GROUPS, "--quant_algo", "gptq"),
        ("w_int8_a_int8_per_tensor_sym", "--pre_quantization_optimization", "smoothquant"),
        ("w_fp8_a_fp8", "--kv_cache_dtype", "fp8"),
        ("w_fp4_a_fp4_scale_fp8", "--quant_algo", "svdquant"),
    ],
)
def test_linear_layers_of_their_own(
    options: tuple[str, ...], model_type: str, dtype: torch.dtype, place: Workplace, tmp_path: Path
) -> None:
    """GPT-2's Conv1D, [in, out], and Falcon's subclass of nn.Linear: the run itself compares the logits read back."""
    folder = save_checkpoint(tmp_path / "m", small(model_type, **OWN_LINEAR[model_type]), dtype)
    place = replace(place, model=folder)
    scheme, *more = options
    outcome = place.quantize(*more, scheme=scheme)
    assert place.report["weights"]["quantized"] == 8
    assert place.evaluate()["perplexity"]["after"] == place.report["perplexity"]["after"]
    if model_type == "gpt2":
        assert "Detent's own layout" in outcome.err
        assert "only Linear and Embedding ones" in outcome.err or "GPT2Attention" in outcome.err


def test_gpt2_is_stored_as_rows_of_outputs(place: Workplace, tmp_path: Path) -> None:
    """The codes of GPT-2's [in, out] weights against the nearest ones worked out in float64."""
    from detent.checkpoints.quantized import open_quantized
    from detent.formats import decode

    place = with_model(place, tmp_path, "gpt2", OWN_LINEAR["gpt2"])
    place.quantize(*GROUPS[1:], "--skip_evaluation")
    record = open_quantized(place.out).layer("transformer.h.0.attn.c_attn")
    assert (record.shape, record.kind) == ((192, 64), "Conv1D")
    weight = load_file(place.model / "model.safetensors")["transformer.h.0.attn.c_attn.weight"].t().double()
    groups = weight.unflatten(1, (2, 32))
    scale = (groups.abs().amax(-1, keepdim=True) / 7.5).float().double()
    nearest = (groups / scale).round().clamp(-8, 7) * scale
    assert record.weight is not None
    torch.testing.assert_close(decode(record.weight).double(), nearest.flatten(1), rtol=1e-6, atol=0)


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
