"""Calls of a model and of its blocks: what they were made with, how they are cut and joined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class PassOver(BaseException):
    """Ends a forward pass of which nothing more is needed; not an `Exception`, so that a model doesn't catch it."""


@dataclass(frozen=True)
class Call:
    """What a model was called with.

    Attributes:
        mask: which tokens are real, None where all are.
        output: what the model returned, sequences first; None where that isn't known.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor | None = None
    output: Tensor | None = None

    def split(self, rows: int) -> list[Call]:
        """The same call in pieces of at most `rows` sequences: tensors whose first axis is the batch are cut."""
        tensors = [x for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor) and x.dim()]
        size = tensors[0].shape[0] if tensors else 0
        if size <= rows:
            return [self]

        def cut(x: Any, start: int) -> Any:
            return x[start : start + rows] if isinstance(x, Tensor) and x.dim() and x.shape[0] == size else x

        return [
            Call(
                tuple(cut(x, start) for x in self.args),
                {name: cut(x, start) for name, x in self.kwargs.items()},
                cut(self.mask, start),
                cut(self.output, start),
            )
            for start in range(0, size, rows)
        ]

    def joined(self, other: Call) -> Call | None:
        """Both calls as one batch, or None where they differ in more than what tensors hold."""
        values = [
            *zip(self.args, other.args, strict=False),
            *((v, other.kwargs.get(k)) for k, v in self.kwargs.items()),
        ]
        same = len(self.args) == len(other.args) and self.kwargs.keys() == other.kwargs.keys()
        if not same or self.mask is not None or other.mask is not None or not _fit(self.output, other.output):
            return None
        if not any(isinstance(a, Tensor) and a.dim() for a, _ in values) or not all(_fit(a, b) for a, b in values):
            return None

        def both(a: Any, b: Any) -> Any:
            return torch.cat([a, b]) if isinstance(a, Tensor) and a.dim() else a

        return Call(
            tuple(both(a, b) for a, b in zip(self.args, other.args, strict=True)),
            {name: both(value, other.kwargs[name]) for name, value in self.kwargs.items()},
            output=both(self.output, other.output),
        )

    @property
    def sequences(self) -> int:
        """The length of the first axis of the first tensor."""
        tensors = [x for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor) and x.dim()]
        return tensors[0].shape[0] if tensors else 1

    @property
    def rows(self) -> int:
        """Tokens, or vectors, of the first tensor that the model is called with; 0 without one."""
        for x in (*self.args, *self.kwargs.values()):
            if isinstance(x, Tensor) and x.dim():
                return x.numel() if not x.is_floating_point() else math.prod(x.shape[:-1])
        return 0

    def token_mask(self) -> Tensor | None:
        """bool [batch, seq], which tokens count; None for all."""
        mask = self.kwargs.get("attention_mask") if self.mask is None else self.mask
        return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.all()) else None


def regrouped(calls: Sequence[Call], size: int) -> list[Call]:
    """The same calls with `size` sequences each, as far as they can be cut and joined."""
    groups: list[Call] = []
    for piece in (piece for call in calls for piece in call.split(size)):
        if groups and groups[-1].sequences + piece.sequences <= size:
            joined = groups[-1].joined(piece)
            if joined is not None:
                groups[-1] = joined
                continue
        groups.append(piece)
    return groups


def _fit(a: Any, b: Any) -> bool:
    """Whether two arguments can be joined into one: tensors that can be concatenated, or equal values."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dim() > 0 and a.shape[1:] == b.shape[1:] and a.dtype == b.dtype and a.device == b.device
    return a is b or (isinstance(a, (bool, int, float, str)) and a == b)


_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")


@dataclass
class BlockCall:
    """What a block was called with in one batch, its hidden state left out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def cut_call(
    hidden: Tensor, call: BlockCall, mask: Tensor | None, rows: slice
) -> tuple[Tensor, BlockCall, Tensor | None] | None:
    """A call cut to some sequences of its batch, or None where there is only one or not every tensor has the batch in
    front."""
    batch = hidden.shape[0]
    if hidden.dim() != 3 or batch < 2:
        return None
    fits = True

    def cut(value: Any) -> Any:
        nonlocal fits
        if isinstance(value, tuple):
            return tuple(cut(v) for v in value)
        if not isinstance(value, Tensor) or value.dim() == 0:
            fits = fits and not isinstance(value, (list, dict))
            return value
        fits = fits and value.shape[0] in (1, batch)
        return value if value.shape[0] == 1 else value[rows]

    small = BlockCall(tuple(cut(v) for v in call.args), {name: cut(v) for name, v in call.kwargs.items()})
    mask = cut(mask)
    return (hidden[rows], small, mask) if fits else None


_HIDDEN = object()


def find_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall, bool] | None:
    """(hidden state, the call without it, whether a cache already held something)."""
    cached = False
    rest: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name in _CACHES and value is not None:
            length = value.get_seq_length() if hasattr(value, "get_seq_length") else 0
            cached = cached or bool(length)
            value = None
        rest[name] = False if name == "use_cache" else value
    if args and isinstance(args[0], Tensor):
        return args[0], BlockCall((_HIDDEN, *args[1:]), rest), cached
    hidden = rest.get("hidden_states")
    if isinstance(hidden, Tensor):
        return hidden, BlockCall(args, {**rest, "hidden_states": _HIDDEN}), cached
    return None


def with_hidden(call: BlockCall, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args = tuple(hidden if a is _HIDDEN else a for a in call.args)
    return args, {name: hidden if value is _HIDDEN else value for name, value in call.kwargs.items()}


def hidden_of(output: Any) -> Tensor:
    """The hidden state in what a block returns: the tensor, or the first of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def like_output(template: Any, hidden: Tensor) -> Any:
    """`hidden` in the form of `template`, the output of a block."""
    if isinstance(template, Tensor):
        return hidden
    if isinstance(template, tuple) and not hasattr(template, "_fields"):
        return (hidden, *template[1:])
    return [hidden, *template[1:]]
