"""Tiny random models of many architectures of transformers, two blocks each."""

from __future__ import annotations

from typing import Any

import torch

#: What most configurations call the same. Every width differs from every other, so that a mix-up shows.
_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64, "n_inner": 56}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_MLA = {
    "head_dim": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "num_key_value_heads": 6,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}

#: Decoders by model type, with what their configurations need beyond `_COMMON`.
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi": {},
    "phi3": {},
    "gptj": {**_GPT2, "rotary_dim": 4},
    "gpt_neo": {"num_layers": 2, "num_heads": 6, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {},
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "opt": {"ffn_dim": 56, "word_embed_proj_dim": 48},
    "bloom": {"n_layer": 2, "n_head": 6},
    "falcon": {"head_dim": None, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 56},
    "mpt": {"d_model": 48, "n_heads": 6, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 2},
    "stablelm": {},
    "cohere": {},
    "cohere2": {},
    "olmo": {},
    "olmo2": {},
    "starcoder2": {},
    "granite": {"residual_multiplier": 0.3},
    "glm": {},
    "glm4": {},
    "nemotron": {},
    "smollm3": {},
    "helium": {},
    "ernie4_5": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 40},
    "qwen3_moe": _MOE,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 40, "interleave_moe_layer_step": 2},
    "dbrx": {
        "d_model": 48,
        "n_heads": 6,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 56, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "granitemoeshared": {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 40},
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8, "num_key_value_heads": 2},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 0},
    "glm4_moe": {**_MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 4},
    "mamba": {"state_size": 4},
    "codegen": {**_GPT2, "hidden_size": 64, "n_embd": 64, "n_head": 8, "num_attention_heads": 8, "rotary_dim": 4},
    "biogpt": {},
    "persimmon": {},
}


_SEQUENCES = {"d_model": 48, "encoder_ffn_dim": 56, "decoder_ffn_dim": 56, "encoder_layers": 2, "decoder_layers": 2}
_SEQUENCES |= {"encoder_attention_heads": 6, "decoder_attention_heads": 6}
_IMAGES = {"vocab_size": None, "image_size": 32, "patch_size": 8}

#: Encoders and encoder-decoders: the class to make, and values.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("AutoModelForMaskedLM", {}),
    "roberta": ("AutoModelForMaskedLM", {}),
    "distilbert": ("AutoModelForMaskedLM", {"dim": 48, "hidden_dim": 56, "n_layers": 2, "n_heads": 6}),
    "modernbert": ("AutoModelForMaskedLM", {"cls_token_id": 1, "sep_token_id": 2}),
    "t5": ("AutoModelForSeq2SeqLM", {"d_model": 48, "d_kv": 8, "d_ff": 56, "num_layers": 2, "num_heads": 6}),
    "bart": ("AutoModelForSeq2SeqLM", _SEQUENCES),
    "vit": ("AutoModelForImageClassification", _IMAGES),
    "dinov2": ("AutoModelForImageClassification", _IMAGES),
}


def make(model_type: str, *, seed: int = 0, device: str = "cpu", **values: Any) -> Any:
    """A model with random weights, norms, biases and gates included, in float64 and evaluation mode."""
    import transformers

    kind, others = OTHERS.get(model_type, ("AutoModelForCausalLM", DECODERS.get(model_type, {})))
    keys = {k: v for k, v in {**_COMMON, **others, **values}.items() if v is not None}
    if model_type in OTHERS:
        keys = {k: v for k, v in keys.items() if k not in ("num_key_value_heads", "head_dim")}
    config = transformers.AutoConfig.for_model(model_type, **keys)
    torch.manual_seed(seed)
    with torch.device(device):
        model = getattr(transformers, kind).from_config(config, attn_implementation="eager").double().eval()
    if getattr(config, "_experts_implementation", None) is not None:
        config._experts_implementation = "eager"  # the others refuse float64
    if device == "cpu":
        with torch.no_grad():
            for parameter in model.parameters():
                spread = 0.3 if parameter.dim() > 1 else 0.2
                centre = 1.0 if parameter.dim() == 1 and float(parameter.mean()) > 0.5 else 0.0
                parameter.copy_(torch.randn_like(parameter) * spread + centre)
    return model


def inputs(model: Any) -> dict[str, torch.Tensor]:
    """Some inputs that discovery doesn't use."""
    generator = torch.Generator().manual_seed(11)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)}
    ids = torch.randint(3, 90, (2, 7), generator=generator)
    values = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        values["decoder_input_ids"] = ids.flip(1)
    return values
