"""Names and order: which tensors of a GGUF file are which tensors of a checkpoint.

Invariant: `TensorPlace.to_file` and `TensorPlace.from_file` are inverses, bit for bit, for bytes of codes and for
tensors that stay; for norms that are stored with 1 added after `TensorPlace.settled`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detent.checkpoints.gguf.architectures import Architecture, head_size
from detent.checkpoints.gguf.container import gguf_package
from detent.errors import DetentError

#: Buffers that older checkpoints hold, and that are computed in every engine.
_COMPUTED = re.compile(r"(rotary_emb\.inv_freq|\.(attn|attention)\.(masked_)?bias)$")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_BLOCK = re.compile(r"^(?:\w+\.)*?(?:layers|h|blocks)\.(\d+)\.")
#: The names of a checkpoint's tensors in the file that is made of it, ``*`` for the numbers of experts.
NAMES_KEY = "detent.tensors"
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"


class Split(NamedTuple):
    """A tensor of a checkpoint that is several of the file: how their names end, how they are cut and joined."""

    ends: tuple[str, ...]
    cut: Callable[[Tensor, Any], tuple[Tensor, ...]]
    join: Callable[[Sequence[Tensor], Any], Tensor]


@dataclass(frozen=True)
class TensorPlace:
    """A tensor of the file that a tensor of the checkpoint is, or a part of.

    Attributes:
        name: in the file.
        expert: which of the matrices that are stacked in it; None where it isn't a stack.
        rows: (shape, order): the rows, seen in this shape, have their axes in this order in the file.
        shifted: whether 1 is added.
        turned: whether a matrix is transposed, unless it is quantized: codes are stored by output in any case.
        flat: whether a matrix of one row is a vector.
    """

    name: str
    expert: int | None = None
    rows: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    shifted: bool = False
    turned: bool = False
    flat: bool = False

    def to_file(self, value: Tensor, *, coded: bool) -> Tensor:
        """The values, or `coded`, the bytes [rows, n] of codes, as the file has them."""
        if not coded:
            value = value.t() if self.turned and value.dim() == 2 else value
            value = value.float() + 1 if self.shifted else value.flatten() if self.flat else value
        if self.rows is not None:
            value = _reordered(value, *self.rows)
        return value.contiguous()

    def from_file(self, value: Tensor, *, coded: bool) -> Tensor:
        """The inverse of `to_file`."""
        if self.rows is not None:
            shape, order = self.rows
            inverse = tuple(order.index(axis) for axis in range(len(order)))
            value = _reordered(value, tuple(shape[axis] for axis in order), inverse)
        if not coded:
            value = value - 1 if self.shifted else value.reshape(1, -1) if self.flat else value
            value = value.t() if self.turned and value.dim() == 2 else value
        return value.contiguous()

    def settled(self, value: Tensor) -> Tensor:
        """A tensor that stays, with the values that a reader gets: to add 1 rounds."""
        return value.float() + 1 - 1 if self.shifted else value


def _reordered(value: Tensor, shape: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    more = range(len(shape), len(shape) + value.dim() - 1)
    return value.reshape(*shape, *value.shape[1:]).permute(*order, *more).reshape(value.shape)


class TensorNames:
    """The places of the tensors of one checkpoint.

    Args:
        arch, config: of the model.
    """

    def __init__(self, arch: Architecture, config: Any) -> None:
        gguf = gguf_package()
        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        if arch.name not in kinds:
            raise DetentError(f"the installed gguf package doesn't know {arch.name}; update it")
        self._arch, self._config = arch, config
        self._map = gguf.get_tensor_name_map(kinds[arch.name], config.num_hidden_layers)
        self._splits = {**_LATENT, **(_FUSED_EXPERTS if arch.name == "gpt-oss" else {})}
        # A file must have an output embedding for some architectures: of a tied model, the embedding once more.
        self._twice = arch.head == "required" and config.tie_word_embeddings

    def left_out(self, tensor: str) -> bool:
        """Whether a tensor has no place in a file, and is no part of what the model computes: buffers, and blocks that
        follow the last one, which predict further tokens."""
        block = _BLOCK.match(tensor)
        after = block is not None and int(block[1]) >= self._config.num_hidden_layers
        tied = tensor == "lm_head.weight" and self._arch.head == "tied"
        return after or tied or _COMPUTED.search(tensor) is not None

    def places(self, tensor: str) -> list[TensorPlace]:
        """Where a tensor goes: a part to each place.

        Raises:
            DetentError: llama.cpp has no tensor like it.
        """
        split = self.split(tensor)
        if split is None:
            place = self._place(tensor)
            return [place, replace(place, name=OUTPUT)] if self._twice and place.name == EMBEDDING else [place]
        stem = tensor.removesuffix(_end_of(tensor, self._splits))
        return [self._place(stem + end) for end in split.ends]

    def split(self, tensor: str) -> Split | None:
        """How a tensor is cut into several of the file; None where it isn't."""
        end = _end_of(tensor, self._splits)
        return self._splits[end] if end else None

    def cut(self, tensor: str, value: Tensor) -> list[Tensor]:
        """The parts of a tensor, one for each of its places."""
        split = self.split(tensor)
        return [value] * len(self.places(tensor)) if split is None else list(split.cut(value, self._config))

    def join(self, tensor: str, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `cut`."""
        split = self.split(tensor)
        return parts[0] if split is None else split.join(parts, self._config)

    def _place(self, tensor: str) -> TensorPlace:
        found = _EXPERT.search(tensor)
        base = tensor if found is None else tensor[: found.start()] + ".experts." + tensor[found.end() :]
        stem, _, last = base.rpartition(".")
        if last not in ("weight", "bias", "scale"):
            stem, last = (base.removesuffix("_bias"), "bias") if base.endswith("_bias") else (base, "weight")
        mapped = self._map.get_name(stem) or self._map.get_name(stem.removeprefix("transformer."))
        if mapped is None:
            raise DetentError(
                f"{tensor} can't be written as GGUF: llama.cpp has no such tensor in a model of type {self._arch.name}"
            )
        name = f"{mapped}.{last}"
        return TensorPlace(
            name,
            None if found is None else int(found[1]),
            None if last == "scale" else self._rows(mapped),
            self._arch.shifted and name.endswith("norm.weight"),
            self._arch.turned and mapped.startswith("blk.") and last == "weight",
            mapped.endswith("ffn_gate_inp_shexp"),
        )

    def _rows(self, mapped: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        config, kind = self._config, mapped.rpartition(".")[2]
        heads, size = config.num_attention_heads, head_size(config)
        if self._arch.pairs and kind in ("attn_q", "attn_k"):
            own = heads if kind == "attn_q" else getattr(config, "num_key_value_heads", None) or heads
            return (own, 2, size // 2), (0, 2, 1)
        if self._arch.by_head and kind == "attn_qkv":
            return (heads, 3, size), (1, 0, 2)
        return None


def without_number(tensor: str) -> str:
    """A name with ``*`` for the number of an expert."""
    return _EXPERT.sub(".experts.*.", tensor, count=1)


def _end_of(tensor: str, splits: Mapping[str, Split]) -> str:
    return next((end for end in splits if tensor.endswith(end)), "")


def names_of_model(config: Any) -> list[str]:
    """The names that the tensors of a model have in a checkpoint of transformers."""
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return list(revert_weight_conversion(model, state))


def stacks(names: TensorNames, tensors: Iterable[str]) -> dict[str, int]:
    """{tensor of the file: how many matrices are stacked in it, 0 for a plain one}."""
    found: dict[str, int] = {}
    for tensor in tensors:
        for place in [] if names.left_out(tensor) else names.places(tensor):
            found[place.name] = max(found.get(place.name, 0), 0 if place.expert is None else place.expert + 1)
    return found


# ---- tensors that are several of the file ----------------------------------------------------------------------------


def _cut_latent(value: Tensor, config: Any) -> tuple[Tensor, ...]:
    heads, nope = config.num_attention_heads, config.qk_nope_head_dim
    whole = value.reshape(heads, nope + config.v_head_dim, -1)
    return whole[:, :nope].transpose(1, 2), whole[:, nope:]


def _join_latent(parts: Sequence[Tensor], config: Any) -> Tensor:
    key, value = parts
    return torch.cat([key.transpose(1, 2), value], 1).flatten(0, 1)


_LATENT = {
    "kv_b_proj.weight": Split(("k_b_proj.weight", "v_b_proj.weight"), _cut_latent, _join_latent),
}
#: gpt-oss: matrices are [experts, in, out], and rows of gate and up alternate.
_FUSED_EXPERTS = {
    "experts.gate_up_proj": Split(
        ("experts.gate_proj", "experts.up_proj"),
        lambda value, _: (value[..., ::2].transpose(1, 2), value[..., 1::2].transpose(1, 2)),
        lambda parts, _: torch.stack([part.transpose(1, 2) for part in parts], -1).flatten(-2),
    ),
    "experts.gate_up_proj_bias": Split(
        ("experts.gate_proj_bias", "experts.up_proj_bias"),
        lambda value, _: (value[..., ::2], value[..., 1::2]),
        lambda parts, _: torch.stack(list(parts), -1).flatten(-2),
    ),
    "experts.down_proj": Split(
        ("experts.down_proj",), lambda value, _: (value.transpose(1, 2),), lambda parts, _: parts[0].transpose(1, 2)
    ),
}
