"""The user's `forward_loop`, run as often as data is needed, though the user's function runs once.

What the loop calls the model with is remembered and replayed. Where a loop calls only parts of the model, it is run
again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from detent.data.padding import current_token_mask, token_mask
from detent.errors import DetentError

ForwardLoop = Callable[[nn.Module], Any]


class DataLoop:
    """A source of calibration data: call it with the model.

    Attributes:
        forward_loop: the user's function, or None where there is no data (the object is then false).
        calls: how often the model was called in the last run.
    """

    def __init__(self, forward_loop: ForwardLoop | None) -> None:
        self.forward_loop = forward_loop
        self.calls = 0
        self._remembered: list[tuple[tuple[Any, ...], dict[str, Any], Tensor | None]] = []

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
            for args, kwargs, mask in self._remembered:
                with _mask_from_arguments(model), token_mask(mask):
                    model(*args, **kwargs)
            return
        remembered: list[tuple[tuple[Any, ...], dict[str, Any], Tensor | None]] = []

        def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            remembered.append((args, dict(kwargs), current_token_mask()))

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
