"""Runs that end in the layout of another tool: written, read back, evaluated, reloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.runner import Workplace, detent, logits, save_checkpoint, small, succeed
from detent.runs.load import load_quantized
from tiny_language_model import VOCABULARY

CASES = {
    "quark": ("w_int4_per_group_sym", "--custom_mode quark --group_size 32", "quark"),
    "quark_order": (
        "w_uint4_per_group_asym",
        "--model_export quark_format --pack_method order --group_size 32",
        "quark",
    ),
    "quark_two_stages": ("int4_fp8", "--custom_mode quark --kv_cache_dtype fp8", "quark"),
    "quark_nvfp4": ("nvfp4", "--custom_mode quark", "quark"),
    "fp8_static": ("w_fp8_a_fp8", "--custom_mode fp8 --kv_cache_dtype fp8", "fp8"),
    "fp8_dynamic": ("w_fp8_per_tensor_a_fp8_per_tensor_dynamic", "--custom_mode fp8", "fp8"),
    "fp8_blocks": ("w_fp8_per_block_a_fp8_per_group", "--custom_mode fp8 --group_size 32", "fp8"),
    "mxfp8": ("w_mxfp8_a_mxfp8", "--custom_mode fp8", "mxfp8"),
    "modelopt_fp8": ("w_fp8_a_fp8", "--model_export modelopt --kv_cache_dtype fp8", "modelopt"),
    "modelopt_nvfp4": ("nvfp4", "--model_export modelopt", "modelopt"),
    "modelopt_int4": ("w_int4_per_group_sym", "--model_export modelopt --group_size 64", "modelopt"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_into_another_layout(case: str, place: Workplace) -> None:
    scheme, flags, method = CASES[case]
    place.quantize(*flags.split(), scheme=scheme)  # its own check compares logits, and the file with what was simulated
    config = json.loads((place.out / "config.json").read_text("utf-8"))
    assert config["quantization_config"]["quant_method"] == method
    found = place.evaluate()["perplexity"]["after"]
    assert found == pytest.approx(place.report["perplexity"]["after"], rel=1e-6)


@pytest.mark.slow
def test_a_run_on_experts_into_the_layout_of_quark(place: Workplace, tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "m", small("mixtral", num_local_experts=4), torch.bfloat16)
    mixture = Workplace(model, place.calibration, place.evaluation, place.out)
    mixture.quantize("--custom_mode", "quark", "--group_size", 32)
    excluded = json.loads((place.out / "config.json").read_text("utf-8"))["quantization_config"]["exclude"]
    assert "model.layers.0.block_sparse_moe.gate" in excluded
    assert mixture.evaluate()["perplexity"]["after"] == pytest.approx(mixture.report["perplexity"]["after"], rel=1e-6)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import GptOssConfig

    config = GptOssConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
        initializer_range=0.3, pad_token_id=0, sliding_window=32,
    )  # fmt: skip
    return save_checkpoint(tmp_path_factory.mktemp("gpt_oss") / "m", config, torch.bfloat16)


@pytest.mark.slow
def test_gpt_oss_in_the_hands_of_transformers(gpt_oss: Path, place: Workplace) -> None:
    from transformers import AutoModelForCausalLM

    run = Workplace(gpt_oss, place.calibration, place.evaluation, place.out)
    mxfp4: list[Any] = ["--model_export", "mxfp4", "--exclude_layers", "*self_attn*", "*router*", "lm_head"]
    run.quantize(*mxfp4, scheme="w_mxfp4")
    ours, theirs = load_quantized(place.out), AutoModelForCausalLM.from_pretrained(place.out, dtype=torch.bfloat16)
    assert torch.equal(logits(ours), logits(theirs))
    # The file is a source like any other: once more quantized by the same rule, it stays what it is.
    again = Workplace(place.out, place.calibration, place.evaluation, place.out.with_name("again"))
    again.quantize(*mxfp4, scheme="w_mxfp4")
    assert torch.equal(logits(load_quantized(again.out)), logits(ours))


@pytest.mark.slow
def test_experts_that_no_reader_of_mxfp4_looks_for(place: Workplace, tmp_path: Path) -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
    model = save_checkpoint(tmp_path / "m", small("qwen3_moe", **sizes), torch.bfloat16)
    run = Workplace(model, place.calibration, place.evaluation, place.out)
    exclude = ["--exclude_layers", "*self_attn*", "*gate", "lm_head"]
    refused = run.quantize("--model_export", "mxfp4", *exclude, scheme="w_mxfp4", run=detent)
    assert refused.code == 2
    assert "don't look for any in a Qwen3MoeForCausalLM; the layout compressed-tensors holds the model" in refused.err


def test_what_is_refused_before_anything_runs(place: Workplace) -> None:
    for scheme, flags, words in (
        ("w_mx6", "--custom_mode quark", "MXFP4 and MXFP6 alone; the layout detent holds the model"),
        ("w_fp8_a_fp8", "--model_export mxfp4", "experts alone in MXFP4"),
        ("w_int4_per_group_sym", "--custom_mode fp8", "fp8 does not hold model.layers.0.self_attn.q_proj"),
        ("w_fp8_a_fp8", "--custom_mode fp8 --model_export modelopt", "custom_mode is a choice within hf_format"),
        ("w_fp8_per_block_a_fp8_per_block", "--custom_mode fp8", "per_block: square blocks share a scale in weights"),
        ("w_int4_per_block_sym", "", "per_block: square blocks"),
    ):
        refused = place.quantize(*flags.split(), scheme=scheme, run=detent)
        assert refused.code == 2
        assert words in refused.err, refused.err
        assert not place.out.exists()


@pytest.mark.slow
def test_reloading_as_the_guide_says(place: Workplace) -> None:
    place.quantize("--custom_mode", "quark", "--group_size", 32)
    reload = ["quantize", "--model_dir", place.model, "--import_model_dir", place.out, "--model_reload"]
    more = ["--import_file_format", "quark_format", "--eval_dataset", place.evaluation, "--num_eval_data", 1]
    outcome = succeed(*reload, *more, "--device", "cpu")
    assert f"{place.report['perplexity']['after']:.2f}" in outcome.out.replace(",", "")
