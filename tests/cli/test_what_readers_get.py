"""What transformers and other engines get of models that aren't plain Llamas: the simulated model, or a refusal."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.runner import Workplace, detent, logits, save_checkpoint, small
from detent.errors import DetentError
from detent.runs.load import load_quantized
from tiny_language_model import make_tokenizer

pytest.importorskip("compressed_tensors")

EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 64, "head_dim": 16},
    "phimoe": {"num_local_experts": 4},
}
IN_ONE_TENSOR: dict[str, dict[str, Any]] = {
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16},
    "granitemoe": {"num_local_experts": 4},
}
MLA: dict[str, Any] = {
    "head_dim": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 28, "qk_rope_head_dim": 4,
    "v_head_dim": 32, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LLAMA4 = {"num_local_experts": 4, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 2, "head_dim": 16}


def of(place: Workplace, folder: Path, model_type: str, values: dict[str, Any]) -> Workplace:
    return replace(place, model=save_checkpoint(folder / "model", small(model_type, **values)))


def in_transformers(folder: Path, kind: str = "AutoModelForCausalLM") -> Any:
    """The model as transformers loads it; every tensor has found its place."""
    import transformers

    model, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


def ignores(folder: Path, name: str) -> bool:
    """Whether an engine leaves the layer `name` in floating point: entries are names, or patterns from the start on."""
    config = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    return any(re.match(e[3:], name) if e.startswith("re:") else e == name for e in config["ignore"])


@pytest.mark.parametrize("model_type", MIXTURES)
def test_mixtures_with_scales_folded_into_what_experts_read(model_type: str, place: Workplace, tmp_path: Path) -> None:
    place = of(place, tmp_path, model_type, {**EXPERTS, **MIXTURES[model_type]})
    place.quantize("--group_size", 32, "--quant_algo", "awq", "--skip_evaluation")
    simulated = logits(load_quantized(place.out))
    assert torch.isfinite(simulated).all()
    assert torch.equal(logits(in_transformers(place.out)), simulated)


@pytest.mark.parametrize("model_type", IN_ONE_TENSOR)
def test_mixtures_that_transformers_reads_from_one_tensor_alone(
    model_type: str, place: Workplace, tmp_path: Path
) -> None:
    place = of(place, tmp_path, model_type, {**EXPERTS, **IN_ONE_TENSOR[model_type]})
    outcome = place.quantize("--group_size", 32, "--quant_algo", "awq", "--skip_evaluation")
    assert "transformers looks for all experts in one tensor" in outcome.err
    assert torch.isfinite(logits(load_quantized(place.out))).all()


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ("w_int8_per_channel_a_int8_per_tensor_sym", "transformers can't put experts in int8"),
        ("w_fp4_scale_fp8", "transformers can't put experts in e2m1"),
        ("w_fp8_a_fp8", "transformers quantizes the weights of experts alone"),
        ("w_mxfp4", ""),
    ],
)
def test_schemes_of_mixtures(scheme: str, said: str, place: Workplace, tmp_path: Path) -> None:
    place = replace(place, model=save_checkpoint(tmp_path / "m", small("mixtral", **EXPERTS), torch.bfloat16))
    outcome = place.quantize("--skip_evaluation", "--pre_quantization_optimization", "smoothquant", scheme=scheme)
    assert said in outcome.err
    if not said:
        from transformers import AutoModelForCausalLM

        read = AutoModelForCausalLM.from_pretrained(place.out, experts_implementation="eager").eval()
        assert torch.equal(logits(read), logits(load_quantized(place.out)))


def test_what_stays_is_told_under_the_names_that_engines_ask_for(place: Workplace, tmp_path: Path) -> None:
    place = of(place, tmp_path, "mixtral", {**EXPERTS, **MIXTURES["mixtral"]})
    place.quantize("--group_size", 32, "--skip_evaluation", "--exclude_layers", "*.gate", "*experts*", "lm_head")
    moe = "model.layers.1.block_sparse_moe"
    assert all(ignores(place.out, f"{moe}.{n}") for n in ("gate", "experts.0.w1", "experts.3.w2", "experts.0.w3"))
    assert ignores(place.out, "lm_head")
    assert not ignores(place.out, "model.layers.1.self_attn.q_proj")
    assert torch.equal(logits(in_transformers(place.out)), logits(load_quantized(place.out)))
    other = replace(place, out=tmp_path / "other")
    other = of(other, tmp_path / "b", "gpt_oss", {**EXPERTS, **IN_ONE_TENSOR["gpt_oss"]})
    other.quantize("--group_size", 32, "--skip_evaluation", "--exclude_layers", "*.router", "*experts*", "lm_head")
    assert all(ignores(other.out, f"model.layers.0.mlp.{n}") for n in ("router", "experts.0.gate_proj"))
    torch.testing.assert_close(logits(in_transformers(other.out)), logits(load_quantized(other.out)))


def test_exclusions_among_experts(place: Workplace, tmp_path: Path) -> None:
    """Routers and experts may be named among the exclusions, as in the model or in the file; a typing error may not."""
    place = of(place, tmp_path, "mixtral", {**EXPERTS, **MIXTURES["mixtral"]})
    for number, (pattern, left) in enumerate((("*.gate", 0), ("*experts*", 24), ("*.experts.*.w1", 8))):
        one = replace(place, out=tmp_path / str(number))
        more = ["--allow_unfused"] if left == 8 else []
        one.quantize("--group_size", 32, "--skip_evaluation", "--exclude_layers", pattern, "lm_head", *more)
        assert one.report["weights"]["quantized"] == 32 - left
    outcome = place.quantize("--exclude_layers", "*.block_sparse_moe.experts.3.w1", run=detent)
    assert outcome.code == 2
    assert "treat them alike" in outcome.err
    outcome = place.quantize("--group_size", 32, "--exclude_layers", "*.gates", run=detent)
    assert outcome.code == 2
    assert "matches no linear layer" in outcome.err


def test_a_part_of_the_experts_in_one_tensor_cannot_stay(place: Workplace, tmp_path: Path) -> None:
    place = of(place, tmp_path, "gpt_oss", {**EXPERTS, **IN_ONE_TENSOR["gpt_oss"]})
    options = ("--group_size", 32, "--exclude_layers", "*.router", "lm_head", "*.experts.3.up_proj", "--allow_unfused")
    outcome = place.quantize(*options, run=detent)
    assert outcome.code == 2
    assert "but the checkpoint holds both in model.layers.0.mlp.experts.gate_up_proj" in outcome.err


def test_a_tied_output_embedding_that_gptq_rounds(place: Workplace, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    place = of(place, tmp_path, "llama", {"tie_word_embeddings": True})
    place.quantize("--group_size", 32, "--skip_evaluation", "--quant_algo", "gptq", "--exclude_layers")
    read = in_transformers(place.out)
    assert torch.equal(logits(read), logits(load_quantized(place.out)))
    before = load_file(place.model / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(read.get_input_embeddings().weight, before)


def test_layers_that_the_model_class_leaves_out(place: Workplace, tmp_path: Path) -> None:
    """A layer for the prediction of several tokens is carried along, and named among what stays."""
    from safetensors.torch import load_file, save_file

    folder = save_checkpoint(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    extra = "model.layers.2.self_attn.q_proj.weight"
    save_file({**tensors, extra: torch.ones(64, 64)}, folder / "model.safetensors", metadata={"format": "pt"})
    place = replace(place, model=folder)
    place.quantize("--group_size", 32, "--skip_evaluation")
    assert ignores(place.out, extra.removesuffix(".weight"))
    assert torch.equal(load_file(place.out / "model.safetensors")[extra], torch.ones(64, 64))


def test_experts_that_transformers_takes_apart(place: Workplace, tmp_path: Path) -> None:
    place = of(place, tmp_path, "llama4_text", {**EXPERTS, **LLAMA4})
    place.quantize("--group_size", 32, "--skip_evaluation", "--model_export", "compressed-tensors")
    assert torch.equal(logits(in_transformers(place.out)), logits(load_quantized(place.out)))
    place = replace(place, out=tmp_path / "other")
    options = ("--group_size", 32, "--skip_evaluation", "--exclude_layers", "*experts*", "*.router", "lm_head")
    outcome = place.quantize(*options, "--model_export", "compressed-tensors", run=detent)
    assert outcome.code == 2
    assert "transformers expects each expert as separate layers" in outcome.err
    outcome = place.quantize(*options)
    assert "Detent's own layout" in outcome.err


def test_a_model_that_reads_images(place: Workplace, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = small().to_dict() | {"model_type": "llama"}
    sight = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    sight |= {"image_size": 32, "patch_size": 16, "model_type": "clip_vision_model"}
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model("llava", text_config=text, vision_config=sight, image_token_index=62)
    )
    model.save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    place = replace(place, model=tmp_path / "m")
    place.quantize("--group_size", 32, "--kv_cache_dtype", "fp8", "--skip_evaluation", "--quant_algo", "awq")
    assert place.report["weights"]["quantized"] == 14
    read = in_transformers(place.out, "AutoModelForImageTextToText")
    assert torch.equal(logits(read), logits(load_quantized(place.out)))
    assert ignores(place.out, "vision_tower.encoder.layers.0.mlp.fc1")
    # Exclusions by the names that the file has, which aren't those of the model's modules.
    patterns = ("vision_tower*", "*language_model.model.layers.0*", "lm_head", "multi_modal_projector")
    place = replace(place, out=tmp_path / "second")
    place.quantize("--group_size", 32, "--skip_evaluation", "--exclude_layers", *patterns)
    assert place.report["weights"]["quantized"] == 7


def _caches(model: Any) -> int:
    """In how many modules keys are quantized."""
    return sum(n.endswith("k_bmm_quantizer") and m.is_enabled for n, m in model.named_modules())


class TestKeysAndValues:
    def quantize(self, place: Workplace, folder: Path, model_type: str, values: dict[str, Any]) -> Any:
        place = of(place, folder, model_type, values)
        return place.quantize("--kv_cache_dtype", "fp8", "--skip_evaluation", scheme="w_fp8_a_fp8", run=detent)

    def test_a_reader_that_ignores_their_scales(self, place: Workplace, tmp_path: Path) -> None:
        outcome = self.quantize(place, tmp_path, "gpt_neox", {})
        assert outcome.code == 0
        assert "Detent's own layout" in outcome.err
        assert "would ignore the scales" in outcome.err

    def test_a_reader_that_would_stop(self, place: Workplace, tmp_path: Path) -> None:
        config = small("opt", ffn_dim=128, word_embed_proj_dim=64)
        del config.num_key_value_heads
        place = replace(place, model=save_checkpoint(tmp_path / "m", config))
        outcome = place.quantize("--kv_cache_dtype", "fp8", "--skip_evaluation", scheme="w_fp8_a_fp8")
        assert "asks the configuration for num_key_value_heads, which OPTConfig doesn't have" in outcome.err
        assert _caches(load_quantized(place.out)) == 2

    def test_attention_that_asks_how_much_is_cached(self, place: Workplace, tmp_path: Path) -> None:
        outcome = self.quantize(place, tmp_path, "llama4_text", {**EXPERTS, **LLAMA4})
        assert outcome.code == 0, outcome.err
        assert _caches(load_quantized(place.out)) == 2

    def test_cross_attention_with_what_is_not_text(self, place: Workplace, tmp_path: Path) -> None:
        """Its keys and values are made of an image, so they stay; the reader has no way to be told so."""
        from transformers import AutoConfig, AutoModelForImageTextToText

        text = small(num_hidden_layers=3).to_dict() | {"model_type": "mllama_text_model", "cross_attention_layers": [1]}
        sight = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_global_layers": 1}
        sight |= {"attention_heads": 2, "image_size": 28, "patch_size": 14, "max_num_tiles": 1, "vision_output_dim": 64}
        sight |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}
        torch.manual_seed(0)
        config = AutoConfig.for_model("mllama", text_config=text, vision_config=sight)
        AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "m")
        make_tokenizer().save_pretrained(tmp_path / "m")
        place = replace(place, model=tmp_path / "m")
        options = ("--kv_cache_dtype", "fp8", "--skip_evaluation")
        outcome = place.quantize(*options, scheme="w_fp8_a_fp8")
        assert "leaves out model.language_model.layers.1.cross_attn" in outcome.err
        assert "7 linear layers stay in floating point, such as" in outcome.err
        assert "text alone doesn't reach it" in outcome.err
        assert place.report["weights"]["quantized"] == 14
        assert _caches(load_quantized(place.out)) == 2

    def test_a_file_without_some_of_their_scales(self, place: Workplace, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        place.quantize("--kv_cache_dtype", "fp8", "--skip_evaluation", scheme="w_fp8_a_fp8")
        file = place.out / "model.safetensors"
        gone = ("layers.1.self_attn.k_scale", "layers.1.self_attn.v_scale")
        tensors = {name: tensor for name, tensor in load_file(file).items() if not name.endswith(gone)}
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(DetentError, match="no scales of keys and values for model.layers.1.self_attn"):
            load_quantized(place.out)

    def test_a_cache_of_latents(self, place: Workplace, tmp_path: Path) -> None:
        """What is cached is quantized, as compressed-tensors does it, under one scale: engines have no second one."""
        from safetensors.torch import load_file

        outcome = self.quantize(place, tmp_path, "deepseek_v3", {**MLA, "first_k_dense_replace": 2})
        assert outcome.code == 0, outcome.err
        assert place.report["notices"] == [] or "layout" not in " ".join(place.report["notices"])
        simulated = load_quantized(place.out)
        assert _caches(simulated) == 2
        torch.testing.assert_close(logits(in_transformers(place.out)), logits(simulated), rtol=1e-5, atol=1e-5)
        tensors = load_file(place.out / "model.safetensors")
        scales = [tensors[f"model.layers.1.self_attn.{side}_scale"] for side in "kv"]
        assert torch.equal(*scales)


@pytest.mark.parametrize("scheme", ["w_int4_per_group_sym", "w_int8_a_int8_per_tensor_sym"])
def test_linear_layers_with_a_forward_of_their_own(scheme: str, place: Workplace, tmp_path: Path) -> None:
    place = of(place, tmp_path, "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2})
    options = ("--group_size", 32) if "group" in scheme else ()
    outcome = place.quantize(*options, "--skip_evaluation", scheme=scheme)
    if options:
        assert "FalconLinear has a forward of its own" in outcome.err
        return
    simulated = logits(load_quantized(place.out))
    torch.testing.assert_close(logits(in_transformers(place.out)), simulated, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [("w_fp8_a_fp8",), ("w_int4_per_group_sym", "--quant_algo", "gptq")])
def test_a_layer_whose_weight_another_module_uses(options: tuple[str, ...], place: Workplace, tmp_path: Path) -> None:
    """Jamba multiplies with the weight of `dt_proj` itself, so nothing sees what enters that layer."""
    values = {"num_experts": 2, "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 2}
    values |= {"attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False}
    place = of(place, tmp_path, "jamba", {**EXPERTS, **values})
    scheme, *algorithm = options
    more = ("--group_size", 32) if algorithm else ()
    place.quantize(*algorithm, *more, "--skip_evaluation", scheme=scheme)
    assert ignores(place.out, "model.layers.0.mamba.dt_proj")
    if not algorithm:  # transformers leaves what experts are given unquantized
        return
    read, simulated = logits(in_transformers(place.out)), logits(load_quantized(place.out))
    assert (read - simulated).norm() < 0.02 * simulated.norm()


def test_layers_that_engines_fuse(place: Workplace) -> None:
    options = ("--skip_evaluation", "--group_size", 32, "--exclude_layers", "lm_head", "*.k_proj")
    outcome = place.quantize(*options, run=detent)
    assert outcome.code == 2
    assert "model.layers.0.self_attn.k_proj is left in floating point" in outcome.err
    place.quantize(*options, "--allow_unfused")


def test_rows_that_a_group_does_not_divide(place: Workplace, tmp_path: Path) -> None:
    place = of(place, tmp_path, "llama", {"intermediate_size": 160})
    options = ("--skip_evaluation", "--group_size", 64)
    outcome = place.quantize(*options, "--model_export", "compressed-tensors", run=detent)
    assert outcome.code == 2
    assert "A group size of 32 for this layer keeps the model loadable" in outcome.err
    place.quantize(*options, "--model_export", "compressed-tensors", "--group_size_per_layer", "*.down_proj", 32)
    assert torch.equal(logits(in_transformers(place.out)), logits(load_quantized(place.out)))


def test_too_large_for_float16(place: Workplace, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_checkpoint(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = 70000
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    options = ("--group_size", 32, "--skip_evaluation", "--data_type", "float16")
    outcome = replace(place, model=folder).quantize(*options, run=detent)
    assert outcome.code == 2
    assert "model.layers.1.input_layernorm.weight has a value too large for float16" in outcome.err
    assert not place.out.exists()


def test_a_weight_that_is_lost(place: Workplace, tmp_path: Path) -> None:
    """Under a scale that it shares with query and value, nothing of a tiny key matrix is left."""
    from safetensors.torch import load_file, save_file

    folder = save_checkpoint(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.weight"] *= 1e-8
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    outcome = replace(place, model=folder).quantize("--skip_evaluation", scheme="w_fp4_scale_fp8")
    assert (
        "WARNING: 1 of 14 weights are lost: model.layers.0.self_attn.k_proj has a relative error of 100%" in outcome.err
    )


def test_weights_that_transformers_initialises(place: Workplace, tmp_path: Path) -> None:
    """transformers fills in the weight of Mamba-2's `out_proj` before it loads it; a packed layer doesn't have one."""
    values = {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 16}
    place = of(place, tmp_path, "mamba2", values)
    outcome = place.quantize("--group_size", 32, "--skip_evaluation")
    assert "layers.0.mixer.out_proj packed: transformers fills in its weight" in outcome.err
    place = replace(place, out=tmp_path / "second")
    place.quantize("--skip_evaluation", scheme="w_fp8_a_fp8")
    read = logits(in_transformers(place.out))
    assert torch.allclose(read, logits(load_quantized(place.out)), rtol=1e-4, atol=1e-5)


def test_infinity_in_a_configuration(tmp_path: Path) -> None:
    from transformers import AutoConfig

    from detent.pretrained.loading import load_config

    AutoConfig.for_model("mamba2", time_step_limit=(0.0, float("inf"))).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**values, "quantization_config": {"quant_method": "detent"}}), "utf-8")
    config = load_config(tmp_path)
    assert tuple(config.time_step_limit) == (0.0, float("inf"))
    assert not hasattr(config, "quantization_config")


def test_code_of_its_own_is_read_back(place: Workplace, tmp_path: Path) -> None:
    """A model whose class comes along with the checkpoint: quantized, proved, and evaluated."""
    folder = save_checkpoint(tmp_path / "m")
    (folder / "own_model.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n",
        encoding="utf-8",
    )
    path = folder / "config.json"
    values = json.loads(path.read_text("utf-8")) | {"model_type": "own", "architectures": ["OwnModel"]}
    values["auto_map"] = {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel"}
    path.write_text(json.dumps(values), "utf-8")
    place = replace(place, model=folder)
    place.quantize("--group_size", 32, "--trust_remote_code")
    assert place.evaluate("--trust_remote_code")["perplexity"]["after"] == place.report["perplexity"]["after"]
