"""Mixtures of types by their usual names: which tensor of a model gets which type.

The rules are those of llama.cpp's quantizer (src/llama-quant.cpp), so that a name means the same everywhere: tensors
that are known to suffer most, in the first and last blocks or all over, have more bits than the others.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from detent.checkpoints.gguf.blocks import BLOCKS
from detent.checkpoints.gguf.names import EMBEDDING, OUTPUT
from detent.errors import DetentError

#: The type of most tensors, by the name of the mixture.
MIXTURES = {
    **{name: name for name in BLOCKS},
    "Q2_K_S": "Q2_K",
    **{f"Q3_K_{size}": "Q3_K" for size in "SML"},
    **{f"Q{bits}_K_{size}": f"Q{bits}_K" for bits in (4, 5) for size in "SM"},
    "MXFP4_MOE": "MXFP4",
}
#: What mixtures are short for, where llama.cpp means another one by a name that is also that of a type.
_MEANT = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
#: Types for rows that aren't multiples of a block of 256.
_INSTEAD = {
    "IQ4_XS": "IQ4_NL",
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
_NOT_QUANTIZED = re.compile(
    r"(_norm|ffn_gate_inp|ffn_gate_inp_shexp|position_embd|attn_k_b|attn_v_b|attn_sinks)\.|\.bias$"
)


@dataclass(frozen=True)
class Facts:
    """What the rules look at: the numbers of blocks, of experts, of heads that share a key; whether the output
    embedding is the input embedding, and whether importances are known."""

    blocks: int
    experts: int
    shared: int
    tied: bool
    weighted: bool = False


def mixture_named(name: str) -> str:
    """A mixture by a name in any spelling.

    Raises:
        DetentError: there is none of this name.
    """
    known = name.upper().replace("-", "_")
    if known not in MIXTURES:
        raise DetentError(f"unknown type of GGUF {name!r}; known: {', '.join(MIXTURES)}")
    return _MEANT.get(known, known)


def type_of(mixture: str, name: str, width: int, facts: Facts) -> str | None:
    """The type of a tensor; None for those that stay in floating point.

    Args:
        mixture: from `mixture_named`. name: of the tensor in the file. width: of its rows.
        facts: of the model.
    """
    kind = wanted_type(mixture, name, width, facts)
    return None if kind is None else _fitting(kind, width)


def wanted_type(mixture: str, name: str, width: int, facts: Facts) -> str | None:
    """`type_of` without regard to whether rows are multiples of the type's blocks."""
    if _NOT_QUANTIZED.search(name):
        return None
    base = MIXTURES[mixture]
    return base if BLOCKS[base].format is None else _rule(mixture, base, name, width, facts)


def _fitting(kind: str, width: int) -> str:
    """A type, or what stands in for it where rows aren't multiples of its blocks."""
    if width % BLOCKS[kind].elements:
        kind = _INSTEAD.get(kind, kind)
    return "F16" if width % BLOCKS[kind].elements else kind


def _rule(mixture: str, base: str, name: str, width: int, facts: Facts) -> str:
    if name == OUTPUT or (name == EMBEDDING and facts.tied):
        small = mixture == "MXFP4_MOE" or base == "Q8_0" or width % BLOCKS[base].elements
        return "Q8_0" if small else "Q6_K"
    if mixture == "MXFP4_MOE":
        return "MXFP4" if "_exps." in name else "Q8_0"
    if name == EMBEDDING:
        return "Q4_K" if base in ("TQ1_0", "TQ2_0") else base
    index = int(name.split(".")[1])
    part = name.split(".")[2]
    if part in ("attn_v", "attn_qkv", "attn_kv_b"):
        return _values(mixture, base, index, facts)
    if part == "attn_k" and facts.experts == 8:
        return "Q8_0"
    if part.startswith("ffn_down"):
        return _down(mixture, base, index, facts)
    if part == "attn_output":
        eight = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS")
        if facts.experts == 8:
            return "Q5_K" if mixture in eight else base
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(mixture, base)
    return base


def _values(mixture: str, base: str, index: int, facts: Facts) -> str:
    """The type of what makes values: a small matrix where several heads share them."""
    kind = base
    if mixture == "Q2_K":
        kind = "Q4_K" if facts.shared >= 4 else "Q3_K"
    elif mixture == "Q2_K_S" and facts.shared >= 4:
        kind = "Q4_K"
    elif mixture == "Q3_K_M":
        kind = "Q5_K" if index < 2 else "Q4_K"
    elif mixture == "Q3_K_L" or (mixture in ("IQ4_NL", "IQ4_XS") and facts.shared >= 4):
        kind = "Q5_K"
    elif mixture in ("Q4_K_M", "Q5_K_M") and _more_bits(index, facts.blocks):
        kind = "Q6_K"
    elif mixture == "Q4_K_S" and index < 4:
        kind = "Q5_K"
    if facts.blocks == 80 and facts.shared > 1 and kind in ("Q3_K", "Q4_K"):
        kind = "Q5_K"
    return "Q8_0" if facts.experts == 8 else kind


def _down(mixture: str, base: str, index: int, facts: Facts) -> str:
    """The type of the last matrix of a feed-forward network."""
    first = index < facts.blocks // 8
    if mixture in ("Q4_K_M", "Q5_K_M") and _more_bits(index, facts.blocks):
        return "Q6_K"
    if mixture == "Q3_K_M":
        return "Q5_K" if index < facts.blocks // 16 else "Q4_K"
    if first and facts.weighted and mixture in ("Q4_0", "Q5_0"):
        return {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}[mixture]
    if first and mixture in ("IQ4_NL", "IQ4_XS") and not facts.weighted:
        return "Q5_K"
    early = {"Q2_K_S": "Q4_K", "Q4_K_S": "Q5_K"}
    everywhere = {"Q2_K": "Q3_K", "Q3_K_L": "Q5_K"}
    return early[mixture] if first and mixture in early else everywhere.get(mixture, base)


def _more_bits(index: int, blocks: int) -> bool:
    return index < blocks // 8 or index >= 7 * blocks // 8 or (index - blocks // 8) % 3 == 2
