"""Tiny random models of every architecture that can be written as GGUF: for `llama_cpp.py`, and for tests."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch

from detent.data.builtin import sample_model_dir

_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
#: {name: (type, fields of the configuration)}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-bias": ("llama", {"attention_bias": True}),
    "llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128,
            }
        },
    ),
    "mistral": ("mistral", {"head_dim": 64, "sliding_window": None}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "smollm3": ("smollm3", {}),
    "granite": (
        "granite",
        {"embedding_multiplier": 2.0, "logits_scaling": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1},
    ),
    "arcee": ("arcee", {}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 64}),
    "qwen2_moe": ("qwen2_moe", {**_MOE, "shared_expert_intermediate_size": 96}),
    "qwen3_moe": ("qwen3_moe", {**_MOE, "head_dim": 64, "norm_topk_prob": True}),
    "seed_oss": ("seed_oss", {"head_dim": 32}),
    "glm4": ("glm4", {"head_dim": 32}),
    "phi": ("phi", {"num_key_value_heads": 4}),
    "phi_3": ("phi3", {"sliding_window": None}),  # not phi3: llama.cpp looks for certain tokens by that name
    "gemma": ("gemma", {"head_dim": 64}),
    "gemma2": ("gemma2", {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 32}),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 32, "num_hidden_layers": 6},
    ),
    "cohere": ("cohere", {"use_qk_norm": False}),
    "cohere2": ("cohere2", {"sliding_window": 32}),
    "gpt2": ("gpt2", {"n_positions": 512}),
    "gpt_neox": ("gpt_neox", {}),
    "bloom": ("bloom", {}),
    "gpt_bigcode": ("gpt_bigcode", {"n_positions": 512, "num_key_value_heads": 1}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "stablelm": ("stablelm", {}),
    "nemotron": ("nemotron", {}),
    "gpt_oss": (
        "gpt_oss",
        {
            "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32, "sliding_window": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {
            "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1,
            "first_k_dense_replace": 1, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16, "v_head_dim": 32, "num_key_value_heads": 4, "topk_method": "greedy", "n_group": 1,
            "topk_group": 1,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1,
            "first_k_dense_replace": 1, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16, "v_head_dim": 32, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1,
        },
    ),
}  # fmt: skip


def tiny(name: str, folder: Path, **sizes: int) -> Path:
    """A random model of an architecture, its matrices large enough for its logits to depend on all of them, with the
    tokenizer of the sample model. `sizes`: fields of the configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    common = {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    common |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    common |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    kind, more = MODELS[name]
    config = AutoConfig.for_model(kind, **common | more | sizes)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.5 / math.sqrt(parameter.shape[-1]))
        else:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    for file in sample_model_dir().glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder
