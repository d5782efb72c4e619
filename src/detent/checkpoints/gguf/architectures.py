"""The architectures that llama.cpp runs, by the facts in which they differ, and their hyper-parameters.

Most hyper-parameters have the same meaning everywhere and are read from transformers' configuration by one table. An
`Architecture` says the rest: how rows are ordered, and what llama.cpp takes for granted, which is checked, since a file
of a model that does otherwise would load and compute something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from detent.errors import DetentError
from detent.external.mistakes import as_detent_error, first_line

_GELU = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")
#: Keys of GGUF, and the fields of transformers' configurations that they are read from; the first that is set counts.
_KEYS = {
    "vocab_size": ("vocab_size",),
    "context_length": ("max_position_embeddings", "n_positions"),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.clamp_kqv": ("clip_qkv",),
    "expert_count": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "logit_scale": ("logit_scale", "logits_scaling"),
    "residual_scale": ("residual_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
    "attention.scale": ("attention_multiplier",),
    "use_parallel_residual": ("use_parallel_residual",),
}
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
#: Multi-head latent attention and DeepSeek's routing.
_LATENT = {
    "attention.q_lora_rank": ("q_lora_rank",),
    "attention.kv_lora_rank": ("kv_lora_rank",),
    "attention.value_length_mla": ("v_head_dim",),
    "leading_dense_block_count": ("first_k_dense_replace",),
    "expert_shared_count": ("n_shared_experts",),
    "expert_weights_scale": ("routed_scaling_factor",),
    "expert_weights_norm": ("norm_topk_prob",),
    "expert_group_count": ("n_group",),
    "expert_group_used_count": ("topk_group",),
    "rope.dimension_count": ("qk_rope_head_dim",),
}


@dataclass(frozen=True)
class Architecture:
    """What sets an architecture of llama.cpp apart.

    Attributes:
        name: as llama.cpp calls it.
        act: names of the activation function that it has built in; () for any, where the configuration names none.
        pairs: whether it rotates neighbouring values of a head, where transformers rotates one half against the other:
            rows of the queries and keys are then stored in another order.
        by_head: whether transformers holds query, key and value of each head side by side in one matrix.
        turned: whether transformers holds matrices of blocks as [in, out].
        shifted: whether transformers adds 1 to the weights of norms as it runs, and llama.cpp doesn't.
        head: whether a file may lack the output embedding, must have it, or must not (it is the input embedding then).
        window: every how many blocks attention isn't limited to a window; 0 where windows aren't known to it at all, 1
            where no block has one.
        defaults: values that hold where the configuration has no field for them.
        more: further keys, as in the table of all.
        expects: {field of the configuration: the values that it may have}.
    """

    name: str
    act: tuple[str, ...] = ("silu", "swish")
    pairs: bool = False
    by_head: bool = False
    turned: bool = False
    shifted: bool = False
    head: Literal["optional", "required", "tied"] = "optional"
    window: int = 0
    defaults: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    expects: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


_GEMMA: dict[str, Any] = {"act": _GELU, "shifted": True}
_ALL_MOE: dict[str, tuple[Any, ...]] = {"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}
_DEEPSEEK: dict[str, Any] = {"more": _LATENT, "expects": {"rope_interleave": (True, None), "attention_bias": (False,)}}
#: By transformers' "model_type".
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", pairs=True),
    "mistral": Architecture("llama", pairs=True),
    "mixtral": Architecture("llama", pairs=True),
    "smollm3": Architecture("smollm3", pairs=True, expects={"no_rope_layer_interval": (4,)}),
    "granite": Architecture("granite", pairs=True),
    "arcee": Architecture("arcee", ("relu2",), pairs=True),
    "olmo": Architecture("olmo", pairs=True, defaults={"attention.layer_norm_epsilon": 1e-5}),
    "olmo2": Architecture("olmo2", head="required"),
    "olmoe": Architecture("olmoe", head="required", expects={"norm_topk_prob": (False,)}),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen2_moe": Architecture("qwen2moe", head="required", expects={"norm_topk_prob": (False,)} | _ALL_MOE),
    "qwen3_moe": Architecture("qwen3moe", expects={"norm_topk_prob": (True,)} | _ALL_MOE),
    "seed_oss": Architecture("seed_oss"),
    "glm4": Architecture("glm4"),
    "phi": Architecture("phi2", _GELU, head="required", expects={"qk_layernorm": (False,)}),
    "phi3": Architecture("phi3", window=1),
    "gemma": Architecture("gemma", **_GEMMA, head="tied"),
    "gemma2": Architecture("gemma2", **_GEMMA, head="tied", window=2),
    "gemma3_text": Architecture("gemma3", **_GEMMA, window=6),
    "cohere": Architecture("command-r", head="tied"),
    "cohere2": Architecture("cohere2", head="tied", window=4),
    "gpt2": Architecture(
        "gpt2", _GELU, turned=True, expects={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)}
    ),
    "gpt_neox": Architecture("gptneox", _GELU, by_head=True, head="required"),
    "bloom": Architecture("bloom", (), by_head=True, expects={"apply_residual_connection_post_layernorm": (False,)}),
    "gpt_bigcode": Architecture(
        "starcoder", _GELU, defaults={"attention.head_count_kv": 1}, expects={"multi_query": (True,)}
    ),
    "starcoder2": Architecture("starcoder2", _GELU),
    "stablelm": Architecture("stablelm", head="required", expects={"qk_layernorm": (False,)}),
    "nemotron": Architecture("nemotron", ("relu2",), shifted=True, head="required"),
    "gpt_oss": Architecture(
        "gpt-oss", head="required", window=2, more={"expert_feed_forward_length": ("intermediate_size",)}
    ),
    "deepseek_v2": Architecture("deepseek2", **_DEEPSEEK, defaults={"expert_gating_func": 1}),
    "deepseek_v3": Architecture("deepseek2", **_DEEPSEEK, defaults={"expert_gating_func": 2}),
}


def architecture_of(config: Mapping[str, Any]) -> tuple[Architecture, Any]:
    """(the architecture, transformers' configuration) of a config.json.

    Raises:
        DetentError: it isn't one that can be written, or differs from what llama.cpp takes for granted.
    """
    from transformers import AutoConfig

    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise DetentError(
            f"a model of type {kind!r} can't be written as GGUF; those that can are of the types"
            f" {', '.join(sorted(ARCHITECTURES))}"
        )
    rest = {name: value for name, value in config.items() if name not in ("model_type", "quantization_config")}
    with as_detent_error(lambda error: f"config.json of a {kind} model: {first_line(error)}"):
        known = AutoConfig.for_model(kind, **rest)
    arch = ARCHITECTURES[kind]
    _check(arch, known)
    return arch, known


def _check(arch: Architecture, config: Any) -> None:
    """Refuse what llama.cpp would compute in another way."""
    wrong = [
        (name, getattr(config, name, None), allowed)
        for name, allowed in arch.expects.items()
        if getattr(config, name, None) not in allowed
    ]
    act = next((value for name in _ACTIVATIONS if (value := getattr(config, name, None))), None)
    if arch.act and act is not None and act not in arch.act:
        wrong.append(("the activation function", act, arch.act))
    types = windows_of(config)
    if arch.window > 1 and types and types != [(i + 1) % arch.window != 0 for i in range(len(types))]:
        wrong.append(("layer_types", "another pattern of windows", (f"a full one every {arch.window} blocks",)))
    scale, width = getattr(config, "query_pre_attn_scalar", None), head_size(config)
    if scale is not None and scale != width:
        wrong.append(("query_pre_attn_scalar", scale, (width,)))
    if wrong:
        name, found, allowed = wrong[0]
        raise DetentError(
            f"this {config.model_type} model can't be written as GGUF: {name} is {found!r}, but llama.cpp has"
            f" {' or '.join(map(str, allowed))} built in for {arch.name}"
        )
    if arch.head == "tied" and not config.tie_word_embeddings:
        raise DetentError(
            f"this {config.model_type} model can't be written as GGUF: its output embedding is a matrix of its own, but"
            f" llama.cpp takes the input embedding for {arch.name}"
        )


def windows_of(config: Any) -> list[bool]:
    """Whether attention is limited to a window, by block; [] if nothing says so."""
    types = getattr(config, "layer_types", None) or []
    found = [kind == "sliding_attention" for kind in types]
    return found if any(found) and getattr(config, "sliding_window", None) else []


def notes_on(arch: Architecture, config: Any) -> list[str]:
    """What users of the file should know."""
    window = getattr(config, "sliding_window", None)
    everywhere = window and not getattr(config, "layer_types", None) and getattr(config, "use_sliding_window", True)
    if arch.window or not (window and (everywhere or windows_of(config))):
        return []
    if window >= (getattr(config, "max_position_embeddings", None) or 0):
        return []
    return [f"llama.cpp limits no attention of {arch.name} to a window, as this model does beyond {window} tokens"]


def head_size(config: Any) -> int:
    """Values of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def hyper_parameters(arch: Architecture, config: Any) -> dict[str, Any]:
    """{key: value} of everything but the tokenizer, as the file has it."""
    values, own = dict(arch.defaults), type(config)()  # a config.json may hold more than its class knows
    for key, fields in {**_KEYS, **arch.more}.items():
        names = [name for name in fields if hasattr(own, name)]
        found = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
        if found is not None:
            values[key] = found
    values.setdefault("context_length", getattr(config, "seq_length", None) or 2048)  # of ALiBi any will do
    values.setdefault("feed_forward_length", 4 * config.hidden_size)
    values.setdefault("attention.head_count_kv", config.num_attention_heads)
    if "attention.kv_lora_rank" in values:  # one shared key of the latent and the rotated part
        values["attention.head_count_kv"] = 1
        values["attention.value_length"] = config.kv_lora_rank
        values["attention.key_length"] = config.kv_lora_rank + config.qk_rope_head_dim
        values["attention.key_length_mla"] = config.qk_nope_head_dim + config.qk_rope_head_dim
    else:
        values["attention.key_length"] = values["attention.value_length"] = head_size(config)
    if arch.window == 1:
        values["attention.sliding_window"] = getattr(config, "sliding_window", None) or 0
    elif arch.window and windows_of(config):
        values["attention.sliding_window"] = config.sliding_window
    values |= {key: value for key, value in _rotation(arch, config).items() if key not in values}
    return {f"{arch.name}.{key}": value for key, value in values.items()}


def _rotary(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameters of the rotary embedding, those of blocks with a window); ({}, {}) where there is none."""
    found = getattr(config, "rope_parameters", None) or {}
    return found.get("full_attention", found), found.get("sliding_attention") or {}


def _rotation(arch: Architecture, config: Any) -> dict[str, Any]:
    """Keys of the rotary embedding.

    Raises:
        DetentError: it is stretched in a way that llama.cpp doesn't know.
    """
    rope, local = _rotary(config)
    if not rope:
        return {}
    share = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    values = {
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        "rope.dimension_count": int(head_size(config) * share),
    }
    if local:
        values["rope.freq_base_swa"] = float(local.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        values |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind in ("yarn", "longrope"):
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        values["rope.scaling.original_context_length"] = int(original)
        fields = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
        values |= {f"rope.scaling.{key}": float(rope[name]) for key, name in fields.items() if rope.get(name)}
    if kind == "longrope":
        values |= {"rope.scaling.type": kind, "rope.scaling.attn_factor": _stretched(config, kind)[1]}
    if rope.get("mscale_all_dim") and kind == "yarn":
        values["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    if kind not in ("default", "linear", "yarn", "longrope", "llama3") or (kind == "longrope" and arch.name != "phi3"):
        raise DetentError(f"a rotary embedding of type {kind!r} can't be written as GGUF for {arch.name}")
    return values


def _stretched(config: Any, kind: str) -> tuple[Tensor, float]:
    """(frequencies, factor of the attention) of a stretched rotary embedding, as transformers computes them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies, float(factor)


def extra_tensors(config: Any) -> dict[str, Tensor]:
    """Tensors that the file has and the checkpoint doesn't: by what frequencies of the rotary embedding are divided."""
    rope, _ = _rotary(config)
    if rope.get("rope_type") == "llama3":
        width = int(head_size(config) * (rope.get("partial_rotary_factor") or 1.0))
        plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
        return {"rope_freqs.weight": plain / _stretched(config, "llama3")[0]}
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{length}.weight": torch.tensor(rope[f"{length}_factor"], dtype=torch.float32)
            for length in ("long", "short")
        }
    return {}
