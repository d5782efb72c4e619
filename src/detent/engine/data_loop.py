"""The user's `forward_loop`, run as often as data is needed, though the user's function runs once.

What the loop calls the model with is remembered and replayed. Where a loop calls only parts of the model, it is run
again.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detent.data.padding import current_token_mask, token_mask
from detent.errors import DetentError

ForwardLoop = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Call:
    """What a model was called with.

    Attributes:
        mask: which tokens are real, None where all are.
        said: what the model returned, sequences first; None where that isn't known.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor | None = None
    said: Tensor | None = None

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
                cut(self.said, start),
            )
            for start in range(0, size, rows)
        ]

    def joined(self, other: Call) -> Call | None:
        """Both calls as one batch, or None where they differ in more than what tensors hold."""
        values = [
            *zip(self.args, other.args, strict=False),
            *((v, other.kwargs.get(k)) for k, v in self.kwargs.items()),
        ]
        alike = len(self.args) == len(other.args) and self.kwargs.keys() == other.kwargs.keys()
        if not alike or self.mask is not None or other.mask is not None or not _fit(self.said, other.said):
            return None
        if not any(isinstance(a, Tensor) and a.dim() for a, _ in values) or not all(_fit(a, b) for a, b in values):
            return None

        def both(a: Any, b: Any) -> Any:
            return torch.cat([a, b]) if isinstance(a, Tensor) and a.dim() else a

        return Call(
            tuple(both(a, b) for a, b in zip(self.args, other.args, strict=True)),
            {name: both(value, other.kwargs[name]) for name, value in self.kwargs.items()},
            said=both(self.said, other.said),
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
    """The same calls with `size` sequences each, as far as they can be cut and put together."""
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
    """Whether two arguments can stand for one: tensors that fit behind each other, or equal values."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dim() > 0 and a.shape[1:] == b.shape[1:] and a.dtype == b.dtype and a.device == b.device
    return a is b or (isinstance(a, (bool, int, float, str)) and a == b)


class DataLoop:
    """A source of calibration data: call it with the model.

    Attributes:
        forward_loop: the user's function, or None where there is no data (the object is then false).
        calls: how often the model was called in the last run.
    """

    def __init__(self, forward_loop: ForwardLoop | None) -> None:
        self.forward_loop = forward_loop
        self.calls = 0
        self._remembered: list[Call] = []

    def __bool__(self) -> bool:
        return self.forward_loop is not None

    def __call__(self, model: nn.Module) -> None:
        """Run the model on all data.

        Raises:
            DetentError: there is no data.
        """
        if self.forward_loop is None:
            raise DetentError("there is no calibration data: pass a forward_loop")
        if self._remembered:
            for call in self._remembered:
                with _mask_from_arguments(model), token_mask(call.mask):
                    model(*call.args, **call.kwargs)
            return
        remembered: list[Call] = []

        def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _check_ids(model, args, kwargs)
            remembered.append(Call(args, dict(kwargs), current_token_mask()))

        hook = model.register_forward_pre_hook(remember, with_kwargs=True)
        try:
            with _mask_from_arguments(model):
                if _takes_an_argument(self.forward_loop):
                    self.forward_loop(model)
                else:
                    self.forward_loop()  # type: ignore[call-arg]
        finally:
            hook.remove()
        self.calls = len(remembered)
        self._remembered = remembered

    def limited(self, model: nn.Module, rows: int | None) -> DataLoop:
        """The first calls of the same data that together have `rows` vectors of input (tokens, where input is ids)."""
        if rows is None:
            return self
        kept, count = [], 0
        for call in self.calls_of(model):
            if count >= rows:
                break
            kept.append(call)
            count += call.rows
        if not kept:
            return self
        part = DataLoop(self.forward_loop)
        part._remembered, part.calls = kept, len(kept)
        return part

    def calls_of(self, model: nn.Module) -> list[Call]:
        """What the loop calls the model with; runs it, if it hasn't run yet."""
        if not self._remembered:
            self(model)
        return list(self._remembered)


def _check_ids(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Token ids have to be ones that a language model knows.

    Raises:
        DetentError: they aren't.
    """
    ids = kwargs.get("input_ids", args[0] if args else None)
    embed: Any = getattr(model, "get_input_embeddings", None)
    if not isinstance(ids, Tensor) or ids.is_floating_point() or not ids.numel() or not callable(embed):
        return
    try:
        table = embed()
    except NotImplementedError:  # a model of transformers without one, such as one for images
        return
    known = getattr(table, "num_embeddings", None)
    if known is not None and not 0 <= int(ids.min()) <= int(ids.max()) < known:
        raise DetentError(
            f"the calibration data holds token id {int(ids.max() if ids.max() >= known else ids.min())}, but the model"
            f" knows ids from 0 to {known - 1}; use the tokenizer that came with the model"
        )


def _takes_an_argument(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a function of C without a signature
        return True
    return any(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)


@contextmanager
def _mask_from_arguments(model: nn.Module) -> Iterator[None]:
    """Padding never enters statistics: where a call passes an `attention_mask` [batch, seq], its zeros are left out."""
    active: list[ExitStack] = []
    try:
        signature = inspect.signature(model.forward)
    except ValueError:
        signature = inspect.Signature()

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = _mask_argument(signature, args, kwargs) if current_token_mask() is None else None
        stack = ExitStack()
        if mask is not None:
            stack.enter_context(token_mask(mask))
        active.append(stack)

    def after(*_: Any) -> None:
        active.pop().close()

    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        while active:
            active.pop().close()


def _mask_argument(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The `attention_mask` of a call: by keyword, by position, or inside a batch that is passed as a mapping."""
    mask = kwargs.get("attention_mask")
    if mask is None and "attention_mask" in signature.parameters:
        try:
            mask = signature.bind_partial(*args, **kwargs).arguments.get("attention_mask")
        except TypeError:  # the call itself will fail, with a better message
            return None
    if mask is None and args and isinstance(args[0], Mapping):
        mask = args[0].get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
