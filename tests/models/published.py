"""Tiny random models of published architectures: the real configuration class, a tokenizer in the real format, and the
published checkpoint's tensor names, whose every quirk is kept.

`make(row, folder)` writes one as a checkpoint of a few hundred kilobytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from models.text_formats import VOCABULARY, save_bytes, save_pieces, tiktoken_file, word_list

REMOTE = Path(__file__).parent / "remote"

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 64,
}
_SIGHT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
_SIGHT |= {"image_size": 28, "patch_size": 14}
_COHERE = {"logit_scale": 0.25, "use_qk_norm": False, "layer_norm_eps": 1e-5}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass(frozen=True)
class Row:
    """A published model.

    Attributes:
        name: under which it is published, or the family's.
        model_type: of its configuration; for code that comes with a checkpoint, the folder of the stand-in.
        values: of its configuration.
        promised: the columns that the guide promises.
        tensors: some of the published tensor names, or their ends.
        tokenizer: saves one in the format of the published one.
        parts: {field: values} of configurations inside, such as ``text_config``.
        extra: {tensor: shape} of what the checkpoint has and the model class doesn't own.
        renamed: {start of a tensor's name as transformers saves it: as it is published}.
        remote: whether the model's code comes with the checkpoint.
        dense: no mixture of experts, so that all algorithms are asked for.
    """

    name: str
    model_type: str
    values: dict[str, Any] = field(default_factory=dict)
    promised: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    tokenizer: Callable[[Path], None] = save_bytes
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    extra: dict[str, tuple[int, ...]] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    remote: bool = False
    dense: bool = True


ALL = ("FP8", "INT4", "INT8", "MX", "AWQ", "GPTQ", "SmoothQuant", "Rotation")
_NO_ROTATION = ALL[:-1]
_INTEGERS = ("FP8", "INT4", "INT8")
_RTN = ("FP8", "INT4")
_DENSE = ("FP8", "INT4", "AWQ", "GPTQ")


def _bytes(kind: str, *special: str) -> Callable[[Path], None]:
    return lambda folder: save_bytes(folder, kind, special or ("<|endoftext|>",))


def _pieces(kind: str = "LlamaTokenizer") -> Callable[[Path], None]:
    return lambda folder: save_pieces(folder, kind)


def _mtp(layer: str, *, experts: int, attention: bool = False) -> dict[str, tuple[int, ...]]:
    """A layer that predicts several tokens, behind the last block, as DeepSeek-V3 and GLM-4.5 have it."""
    shapes: dict[str, tuple[int, ...]] = {
        "eh_proj.weight": (64, 128),
        "enorm.weight": (64,),
        "hnorm.weight": (64,),
        "shared_head.norm.weight": (64,),
        "shared_head.head.weight": (VOCABULARY, 64),
        "embed_tokens.weight": (VOCABULARY, 64),
        "input_layernorm.weight": (64,),
        "self_attn.o_proj.weight": (64, 64),
        **(dict.fromkeys((f"self_attn.{name}_proj.weight" for name in "kv"), (32, 64)) if attention else {}),
        **({"self_attn.q_proj.weight": (64, 64)} if attention else {}),
        "mlp.gate.weight": (experts, 64),
    }
    for expert in range(experts):
        shapes |= {f"mlp.experts.{expert}.{name}_proj.weight": (32, 64) for name in ("gate", "up")}
        shapes |= {f"mlp.experts.{expert}.down_proj.weight": (64, 32)}
    return {f"{layer}.{name}": shape for name, shape in shapes.items()}


_QKVO = tuple(f"self_attn.{name}_proj.weight" for name in "qkvo")

#: The rows of the guide's table, in its order.
GUIDE: list[Row] = [
    Row("meta-llama/Llama-2-*-hf", "llama", {"num_key_value_heads": 4}, ALL, _QKVO, _pieces()),
    Row(
        "meta-llama/Llama-3-*B(-Instruct)",
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        ALL,
    ),
    Row("meta-llama/Llama-3.1-*B(-Instruct)", "llama", {"rope_parameters": _LLAMA3_ROPE}, ALL),
    Row(
        "meta-llama/Llama-3.2-*B(-Instruct)",
        "llama",
        {"rope_parameters": {**_LLAMA3_ROPE, "factor": 32.0}, "tie_word_embeddings": True},
        ALL,
    ),
    Row(
        "meta-llama/Llama-3.2-*B-Vision(-Instruct)",
        "mllama",
        {"image_token_index": 511},
        _INTEGERS,
        ("language_model.model.layers.1.cross_attn.q_proj.weight", "vision_model.patch_embedding.weight"),
        parts={
            "text_config": {
                **_COMMON,
                "num_hidden_layers": 4,
                "cross_attention_layers": [1],
                "rope_parameters": _LLAMA3_ROPE,
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
                "max_num_tiles": 1,
                "vision_output_dim": 96,
                "intermediate_layers_indices": [0, 1],
                "supported_aspect_ratios": [[1, 1]],
            },
        },
    ),
    Row(
        "facebook/opt-*",
        "opt",
        {"ffn_dim": 256, "word_embed_proj_dim": 64, "num_key_value_heads": None},
        _NO_ROTATION,
        ("model.decoder.layers.0.self_attn.out_proj.bias", "model.decoder.layers.0.fc1.weight"),
        _bytes("GPT2Tokenizer", "</s>"),
    ),
    Row(
        "EleutherAI/gpt-j-6b",
        "gptj",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 8},
        _NO_ROTATION,
        ("transformer.h.0.attn.out_proj.weight", "transformer.h.0.mlp.fc_in.bias", "lm_head.bias"),
        _bytes("GPT2Tokenizer"),
    ),
    Row(
        "THUDM/chatglm3-6b",
        "chatglm",
        {},
        _NO_ROTATION,
        (
            "transformer.encoder.layers.0.self_attention.query_key_value.bias",
            "transformer.encoder.layers.0.mlp.dense_h_to_4h.weight",
            "transformer.output_layer.weight",
            "transformer.rotary_pos_emb.inv_freq",
        ),
        remote=True,
    ),
    Row(
        "Qwen/Qwen-*",
        "qwen",
        {},
        _NO_ROTATION,
        ("transformer.h.0.attn.c_attn.bias", "transformer.h.0.mlp.w2.weight", "lm_head.weight"),
        remote=True,
    ),
    Row(
        "Qwen/Qwen1.5-*", "qwen2", {"num_key_value_heads": 4}, _NO_ROTATION, ("self_attn.q_proj.bias", "lm_head.weight")
    ),
    Row(
        "Qwen/Qwen1.5-MoE-A2.7B",
        "qwen2_moe",
        {**_EXPERTS, "shared_expert_intermediate_size": 64, "num_key_value_heads": 4},
        _NO_ROTATION,
        ("mlp.experts.3.down_proj.weight", "mlp.shared_expert.up_proj.weight", "mlp.shared_expert_gate.weight"),
        dense=False,
    ),
    Row("Qwen/Qwen2-*", "qwen2", {"tie_word_embeddings": True}, _NO_ROTATION, ("self_attn.k_proj.bias",)),
    Row(
        "microsoft/phi-2",
        "phi",
        {"partial_rotary_factor": 0.4, "num_key_value_heads": 4, "hidden_act": "gelu_new", "head_dim": None},
        _NO_ROTATION,
        ("self_attn.dense.bias", "mlp.fc1.bias", "lm_head.bias"),
        _bytes("GPT2Tokenizer"),
    ),
    Row(
        "microsoft/Phi-3-mini-*k-instruct",
        "phi3",
        {"num_key_value_heads": 4, "sliding_window": 64},
        _NO_ROTATION,
        ("self_attn.qkv_proj.weight", "mlp.gate_up_proj.weight"),
        _pieces(),
    ),
    Row(
        "microsoft/Phi-3.5-mini-instruct",
        "phi3",
        {"num_key_value_heads": 4, "rope_parameters": _LONG_ROPE, "original_max_position_embeddings": 64},
        _NO_ROTATION,
        ("self_attn.qkv_proj.weight",),
        _pieces(),
    ),
    Row("mistralai/Mistral-7B-v0.1", "mistral", {"sliding_window": 32}, _NO_ROTATION, _QKVO, _pieces()),
    Row(
        "mistralai/Mixtral-8x7B-v0.1",
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        _INTEGERS,
        ("block_sparse_moe.gate.weight", "block_sparse_moe.experts.3.w2.weight"),
        _pieces(),
        dense=False,
    ),
    Row(
        "hpcai-tech/grok-1",
        "grok",
        {},
        (*_INTEGERS, "AWQ", "GPTQ"),
        ("model.layers.0.moe_block.experts.3.linear_v.weight", "model.layers.0.pre_attn_norm.scale"),
        _pieces(),
        remote=True,
        dense=False,
    ),
    Row(
        "CohereForAI/c4ai-command-r-plus-08-2024",
        "cohere",
        {**_COHERE, "use_qk_norm": True},
        ("FP8",),
        (),
        _bytes("CohereTokenizer"),
    ),
    Row("CohereForAI/c4ai-command-r-08-2024", "cohere", _COHERE, ("FP8",), (), _bytes("CohereTokenizer")),
    Row(
        "CohereForAI/c4ai-command-r-plus",
        "cohere",
        {**_COHERE, "use_qk_norm": True, "num_attention_heads": 8},
        ("FP8",),
        ("self_attn.q_norm.weight",),
        _bytes("CohereTokenizer"),
    ),
    Row(
        "CohereForAI/c4ai-command-r-v01",
        "cohere",
        {**_COHERE, "num_key_value_heads": 4},
        ("FP8",),
        (),
        _bytes("CohereTokenizer"),
    ),
    Row(
        "databricks/dbrx-instruct",
        "dbrx",
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 128,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 5e5},
            "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        },
        ("FP8",),
        (
            "transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight",
            "transformer.blocks.0.ffn.experts.mlp.v1",
            "transformer.blocks.0.ffn.router.layer.weight",
        ),
        _bytes("GPT2Tokenizer"),
        dense=False,
    ),
    Row(
        "deepseek-ai/deepseek-moe-16b-chat",
        "deepseek",
        {},
        ("FP8",),
        ("model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.1.mlp.gate.weight"),
        _pieces(),
        remote=True,
        dense=False,
    ),
]

_MLA = {
    "head_dim": 8,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
_LINEAR = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_QWEN3_NEXT_MTP: dict[str, tuple[int, ...]] = {
    "mtp.fc.weight": (64, 128),
    "mtp.norm.weight": (64,),
    "mtp.pre_fc_norm_hidden.weight": (64,),
    "mtp.layers.0.self_attn.o_proj.weight": (64, 128),
    "mtp.layers.0.mlp.gate.weight": (4, 64),
    "mtp.layers.0.mlp.experts.0.down_proj.weight": (64, 32),
    "mtp.layers.0.mlp.shared_expert_gate.weight": (1, 64),
}

#: What people use besides.
TODAY: list[Row] = [
    Row(
        "meta-llama/Llama-4-Scout/Maverick",
        "llama4",
        {},
        _RTN,
        ("language_model.model.layers.1.feed_forward.experts.gate_up_proj", "vision_model.class_embedding"),
        parts={
            "text_config": {
                **_COMMON,
                "head_dim": 16,
                "intermediate_size": 64,
                "intermediate_size_mlp": 96,
                "num_hidden_layers": 4,
                "num_local_experts": 4,
                "interleave_moe_layer_step": 2,
                "attention_chunk_size": 64,
            },
            "vision_config": {
                **_SIGHT,
                "intermediate_size": 128,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            },
        },
        dense=False,
    ),
    Row("Qwen/Qwen2.5-*", "qwen2", {}, _DENSE, ("self_attn.q_proj.bias",)),
    Row("Qwen/Qwen3-*", "qwen3", {"head_dim": 32, "tie_word_embeddings": True}, _DENSE, ("self_attn.q_norm.weight",)),
    Row(
        "Qwen/Qwen3-*-A*B",
        "qwen3_moe",
        {**_EXPERTS, "head_dim": 32},
        _RTN,
        ("mlp.experts.3.up_proj.weight",),
        dense=False,
    ),
    Row(
        "Qwen/Qwen3-Next-80B-A3B",
        "qwen3_next",
        {
            **_EXPERTS,
            **_LINEAR,
            "head_dim": 32,
            "num_hidden_layers": 4,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        },
        _RTN,
        ("linear_attn.in_proj_qkvz.weight", "linear_attn.A_log", "mtp.fc.weight"),
        extra=_QWEN3_NEXT_MTP,
        dense=False,
    ),
    Row(
        "google/gemma-2-*",
        "gemma2",
        {"head_dim": 32, "sliding_window": 32},
        _DENSE,
        ("pre_feedforward_layernorm.weight",),
        _pieces("GemmaTokenizer"),
    ),
    Row(
        "google/gemma-3-1b",
        "gemma3_text",
        {"head_dim": 32, "sliding_window": 32},
        _DENSE,
        ("self_attn.k_norm.weight",),
        _pieces("GemmaTokenizer"),
    ),
    Row(
        "google/gemma-3-4b/12b/27b",
        "gemma3",
        {
            "mm_tokens_per_image": 4,
            "image_token_index": 511,
            "boi_token_index": 509,
            "eoi_token_index": 510,
            "tie_word_embeddings": True,
        },
        _DENSE,
        (
            "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
            "multi_modal_projector.mm_input_projection_weight",
        ),
        _pieces("GemmaTokenizer"),
        parts={
            "text_config": {**_COMMON, "head_dim": 32, "sliding_window": 32, "model_type": "gemma3_text"},
            "vision_config": {
                **_SIGHT,
                "image_size": 56,
                "model_type": "siglip_vision_model",
                "vision_use_head": False,
            },
        },
        renamed={"vision_tower.": "vision_tower.vision_model."},
    ),
    Row(
        "openai/gpt-oss-*",
        "gpt_oss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": 32,
            "intermediate_size": 64,
        },
        _RTN,
        ("mlp.experts.gate_up_proj_bias", "self_attn.sinks", "mlp.router.bias"),
        dense=False,
    ),
    Row(
        "deepseek-ai/DeepSeek-V3/R1",
        "deepseek_v3",
        _MLA,
        _RTN,
        ("self_attn.kv_a_proj_with_mqa.weight", "mlp.experts.3.gate_proj.weight", "model.layers.3.eh_proj.weight"),
        extra=_mtp("model.layers.3", experts=4),
        dense=False,
    ),
    Row(
        "zai-org/glm-4-9b-chat-hf",
        "glm",
        {"head_dim": 16, "attention_bias": True},
        _DENSE,
        ("mlp.gate_up_proj.weight",),
    ),
    Row("zai-org/GLM-4-32B-0414", "glm4", {"head_dim": 16}, _DENSE, ("post_self_attn_layernorm.weight",)),
    Row(
        "zai-org/GLM-4.5(-Air)",
        "glm4_moe",
        {
            "head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "attention_bias": True,
            "use_qk_norm": True,
        },
        _RTN,
        ("mlp.gate.e_score_correction_bias", "model.layers.2.eh_proj.weight"),
        extra=_mtp("model.layers.2", experts=4, attention=True),
        dense=False,
    ),
    Row("allenai/OLMo-2-*", "olmo2", {}, _DENSE, ("post_feedforward_layernorm.weight",)),
    Row(
        "ibm-granite/granite-3.*",
        "granite",
        {
            "residual_multiplier": 0.22,
            "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
            "attention_multiplier": 0.0156,
            "tie_word_embeddings": True,
        },
        _DENSE,
        _QKVO,
    ),
    Row(
        "mistralai/Mistral-Small-3.1/3.2",
        "mistral3",
        {"image_token_index": 511, "spatial_merge_size": 2},
        _DENSE,
        (
            "language_model.model.layers.0.self_attn.q_proj.weight",
            "vision_tower.transformer.layers.0.attention.q_proj.weight",
        ),
        parts={
            "text_config": {**_COMMON, "head_dim": 16, "model_type": "mistral"},
            "vision_config": {**_SIGHT, "head_dim": 16, "image_size": 56, "model_type": "pixtral"},
        },
    ),
    Row("HuggingFaceTB/SmolLM3-3B", "smollm3", {"tie_word_embeddings": True, "no_rope_layers": [1, 0]}, _DENSE),
    Row(
        "microsoft/Phi-3.5-MoE-instruct",
        "phimoe",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True},
        _RTN,
        ("block_sparse_moe.experts.3.w3.weight", "input_layernorm.bias"),
        _pieces(),
        dense=False,
    ),
    Row(
        "ibm-ai-platform/Bamba-9B",
        "bamba",
        {
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_chunk_size": 16,
            "num_hidden_layers": 3,
        },
        _DENSE,
        ("mamba.in_proj.weight", "mamba.A_log"),
    ),
]

#: Models of several modalities besides those above: quantized on the command line, their towers kept.
SEEING: list[Row] = [
    Row(
        "llava-hf/llava-1.5-*",
        "llava",
        {"image_token_index": 511},
        _DENSE,
        ("language_model.model.layers.0.mlp.up_proj.weight", "vision_tower.vision_model.pre_layrnorm.weight"),
        _pieces(),
        parts={
            "text_config": {**_COMMON, "model_type": "llama"},
            "vision_config": {**_SIGHT, "model_type": "clip_vision_model", "projection_dim": 32},
        },
        renamed={"vision_tower.": "vision_tower.vision_model."},
    ),
    Row(
        "Qwen/Qwen2.5-VL-*",
        "qwen2_5_vl",
        {"image_token_id": 510, "video_token_id": 511},
        _DENSE,
        ("model.layers.0.self_attn.q_proj.bias", "visual.blocks.0.attn.qkv.weight", "visual.merger.mlp.0.weight"),
        parts={
            "text_config": {
                **_COMMON,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": 64,
                "fullatt_block_indexes": [0],
            },
        },
    ),
    Row(
        "Qwen/Qwen2-Audio-7B",
        "qwen2_audio",
        {"audio_token_index": 511},
        _DENSE,
        (
            "language_model.model.layers.0.self_attn.q_proj.bias",
            "audio_tower.layers.0.fc1.weight",
            "multi_modal_projector.linear.weight",
        ),
        parts={
            "text_config": {**_COMMON, "model_type": "qwen2"},
            "audio_config": {
                "d_model": 32,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 64,
                "num_mel_bins": 16,
                "max_source_positions": 32,
            },
        },
    ),
    Row(
        "mistralai/Voxtral-Mini-3B",
        "voxtral",
        {"audio_token_id": 511},
        _DENSE,
        ("language_model.model.layers.0.self_attn.q_proj.weight", "audio_tower.layers.0.fc1.weight"),
        parts={
            "text_config": {**_COMMON, "head_dim": 16, "model_type": "llama"},
            "audio_config": {
                "hidden_size": 32,
                "intermediate_size": 128,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_mel_bins": 16,
                "max_source_positions": 32,
            },
        },
    ),
]
ROWS = [*GUIDE, *TODAY, *SEEING]


def row(name: str) -> Row:
    """The row of a published model."""
    return next(r for r in ROWS if r.name == name)


def make(row: Row, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the checkpoint of a row: random weights, none of them trivial."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    model = _remote(row, folder) if row.remote else _native(row)
    _randomize(model)
    model.to(dtype).save_pretrained(folder)
    if row.model_type not in ("chatglm", "qwen"):
        row.tokenizer(folder)
    if row.remote:
        _add_code(row, folder)
    if row.extra or row.renamed:
        _as_published(row, folder, dtype)
    return folder


def _native(row: Row) -> Any:
    import transformers

    values = {"tie_word_embeddings": False, **row.values}
    if row.parts:
        config = transformers.AutoConfig.for_model(row.model_type, **values, **row.parts)
    else:
        values = {k: v for k, v in {**_COMMON, **values}.items() if v is not None}
        if row.model_type in ("cohere", "gemma2", "gemma3_text", "opt"):
            values.pop("tie_word_embeddings") if "tie_word_embeddings" not in row.values else None
        config = transformers.AutoConfig.for_model(row.model_type, **values)
    mapping = transformers.models.auto.modeling_auto
    text = mapping.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(row.model_type)
    seeing = mapping.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(row.model_type)
    other = mapping.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(row.model_type)
    kind: Any = getattr(transformers, (seeing if row.parts and seeing else text) or other)
    return kind(config)


def _remote(row: Row, folder: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    for path in (REMOTE / row.model_type).glob("*.py"):
        shutil.copy(path, folder)
    config = _auto_map(row)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    own = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    return AutoModelForCausalLM.from_config(own, trust_remote_code=True)


def _auto_map(row: Row) -> dict[str, Any]:
    """config.json of a model whose code comes along, as published."""
    module, config, model = {
        "chatglm": ("chatglm", "ChatGLMConfig", "ChatGLMForConditionalGeneration"),
        "qwen": ("qwen", "QWenConfig", "QWenLMHeadModel"),
        "grok": ("grok_1", "Grok1Config", "Grok1ModelForCausalLM"),
        "deepseek": ("deepseek", "DeepseekConfig", "DeepseekForCausalLM"),
    }[row.model_type]
    kind = "grok-1" if row.model_type == "grok" else row.model_type
    auto_map = {
        "AutoConfig": f"configuration_{module}.{config}",
        "AutoModelForCausalLM": f"modeling_{module}.{model}",
    }
    return {"model_type": kind, "architectures": [model], "auto_map": auto_map, **row.values}


def _add_code(row: Row, folder: Path) -> None:
    """config.json refers to the code next to it, and so does the tokenizer where it has its own class."""
    path = folder / "config.json"
    saved = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**saved, **_auto_map(row)}), "utf-8")
    own = {
        "chatglm": ("tokenizer.model", word_list().encode(), "tokenization_chatglm.ChatGLMTokenizer"),
        "qwen": ("qwen.tiktoken", tiktoken_file(), "tokenization_qwen.QWenTokenizer"),
    }
    if row.model_type in own:
        name, content, reference = own[row.model_type]
        (folder / name).write_bytes(content)
        settings = {"auto_map": {"AutoTokenizer": [reference, None]}, "tokenizer_class": reference.split(".")[1]}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")


def _as_published(row: Row, folder: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    for start, published in row.renamed.items():
        tensors = {
            published + name.removeprefix(start) if name.startswith(start) else name: tensor
            for name, tensor in tensors.items()
        }
    for name, shape in row.extra.items():
        tensors[name] = (torch.randn(shape) * 0.2).to(dtype)
    save_file(tensors, path, metadata={"format": "pt"})


@torch.no_grad()
def _randomize(model: Any) -> None:
    """Norms, biases and gates that do something, and the outliers that language models have."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.dim() < 2:
            if name.endswith(("A_log", "dt_bias")):
                continue
            parameter.add_(torch.randn_like(parameter) * 0.2)
            if "norm" in name or "ln_" in name:
                parameter[5::32] += 3
        elif not 0.1 <= float(parameter.std()) <= 1:  # too small to matter, or never initialised
            parameter.copy_(torch.randn_like(parameter) * (0.15 if parameter.dim() == 2 else 0.1))
        if parameter.dim() == 2 and name.endswith(_OUTLIERS):
            parameter[3::32] *= 6


#: Weights whose outputs are what output projections and last projections read.
_OUTLIERS = ("v_proj.weight", "up_proj.weight", "fc1.weight", "fc_in.weight", "w1.weight", "dense_h_to_4h.weight")
