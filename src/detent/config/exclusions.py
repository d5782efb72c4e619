"""The places that presets never quantize, as (pattern, parent class) pairs.

Output heads (errors there reach the logits undamped), routers (a changed choice of experts is not a small error),
normalization, activations, embeddings, convolutions and gates of linear-attention blocks, and the vision part of
multi-modal models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

DEFAULT_EXCLUSIONS: tuple[tuple[str, str | None], ...] = (
    ("*", "nn.BatchNorm1d"),
    ("*", "nn.BatchNorm2d"),
    ("*", "nn.BatchNorm3d"),
    ("*", "nn.LeakyReLU"),
    ("*", "nn.Embedding"),
    ("*lm_head*", None),
    ("*proj_out.*", None),  # the output head of Whisper
    ("*output_layer*", None),
    ("output.*", None),
    ("*router*", None),
    ("*block_sparse_moe.gate*", None),
    ("*mlp.gate.*", None),
    ("*mlp.shared_expert_gate.*", None),
    ("*linear_attn.conv1d*", None),
    ("*linear_attn.in_proj_a*", None),
    ("*linear_attn.in_proj_b*", None),
    ("*mixer.conv1d*", None),
    ("mtp.*", None),
    ("*embed_vision*", None),
    ("*vision_tower*", None),
    ("*visual*", None),
    ("*vision_model*", None),
    ("*multi_modal_projector*", None),
)

#: Hybrids of Mamba blocks and experts keep their attention and latent projections as well ...
MAMBA_EXCLUSIONS: tuple[tuple[str, str | None], ...] = (
    ("*fc1_latent_proj*", None),
    ("*fc2_latent_proj*", None),
    ("*q_proj*", None),
    ("*k_proj*", None),
    ("*v_proj*", None),
    ("*o_proj*", None),
    ("*self_attention.linear_qkv*", None),
    ("*self_attention.linear_proj*", None),
)
#: ... and conservative presets also the projections around the state-space mixer.
MAMBA_MIXER_EXCLUSIONS: tuple[tuple[str, str | None], ...] = (
    ("*mixer.in_proj*", None),
    ("*mixer.out_proj*", None),
)

_WITHOUT_WARNING = {*DEFAULT_EXCLUSIONS, *MAMBA_EXCLUSIONS, *MAMBA_MIXER_EXCLUSIONS, ("default", None), ("*", None)}
# What presets for weights alone, or for attention, switch off.
_WITHOUT_WARNING |= {("*input_quantizer", None), ("*output_quantizer", None), ("*q_bmm_quantizer", None)}


def is_default_exclusion(pattern: str | Callable[[str], bool], parent_class: Any) -> bool:
    """Whether presets exclude this place: that a model doesn't have it is then nothing to warn about."""
    return isinstance(pattern, str) and (str(pattern), parent_class) in _WITHOUT_WARNING
