"""Functions that quantize in place of a format: what the attribute ``backend`` names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from detent.errors import DetentError


class BackendUser(Protocol):
    """What a backend is called by, and is handed: a `TensorQuantizer`."""

    name: str

    @property
    def backend_extra_args(self) -> dict[str, Any]:
        """The user's arguments for the backend; {} for none."""


Backend = Callable[..., Tensor]

#: Name -> (function, its signature where it takes the user's arguments by keyword).
_backends: dict[str, tuple[Backend, inspect.Signature | None]] = {}


def register_quant_backend(name: str, function: Backend) -> None:
    """Let quantizers with ``backend=name`` compute ``function(x, quantizer)`` instead of their format.

    Args:
        name: the value of the attribute ``backend``; a backend already registered under it is replaced.
        function: takes the tensor, after the pre-quantization scale and the rotation, and the quantizer; returns a
            tensor of the same shape and dtype. The user's ``backend_extra_args`` are `quantizer.backend_extra_args`;
            a function with further parameters, or with ``**kwargs``, gets them by keyword as well.

    Raises:
        DetentError: the name isn't text, or the function can't be called.

    Example:
        >>> import torch, detent
        >>> detent.register_quant_backend("steps", lambda x, quantizer, step=1.0: (x / step).round() * step)
        >>> quantizer = detent.TensorQuantizer({"backend": "steps", "backend_extra_args": {"step": 0.5}})
        >>> quantizer(torch.tensor([0.3, 1.1]))
        tensor([0.5000, 1.0000])
        >>> detent.unregister_quant_backend("steps")
    """
    if not isinstance(name, str) or not callable(function):
        raise DetentError("register_quant_backend takes a name and a function of a tensor and its quantizer")
    _backends[name] = (function, _with_keywords(function))


def unregister_quant_backend(name: str) -> None:
    """Undo `register_quant_backend`; an unknown name is not an error.

    Example:
        >>> import detent
        >>> detent.register_quant_backend("same", lambda x, quantizer: x)
        >>> detent.unregister_quant_backend("same")
    """
    _backends.pop(name, None)


def run_backend(name: str, x: Tensor, quantizer: BackendUser) -> Tensor:
    """What the backend called `name` makes of `x`.

    Raises:
        DetentError: there is no such backend; it doesn't take the user's arguments, or needs others; it returns
            something other than a tensor of the same shape.
    """
    if name not in _backends:
        known = ", ".join(sorted(_backends)) or "none"
        raise DetentError(
            f"{quantizer.name}: backend {name!r} is not registered (registered: {known}); see"
            " detent.register_quant_backend()"
        )
    function, keywords = _backends[name]
    given = {} if keywords is None else quantizer.backend_extra_args
    if keywords is not None:
        try:
            keywords.bind(x, quantizer, **given)
        except TypeError as error:
            raise DetentError(
                f"{quantizer.name}: backend {name!r} doesn't accept backend_extra_args {given!r}: {error}"
            ) from None
    y = function(x, quantizer, **given)
    if not isinstance(y, Tensor) or y.shape != x.shape:
        got = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise DetentError(
            f"{quantizer.name}: backend {name!r} must return a tensor of shape {tuple(x.shape)}, not {got}"
        )
    return y


def _with_keywords(function: Backend) -> inspect.Signature | None:
    """The signature of a function that takes more than a tensor and its quantizer, else None."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # a function of C without a signature
        return None
    kinds = [p.kind for p in signature.parameters.values()]
    more = len([kind for kind in kinds if kind is not inspect.Parameter.VAR_POSITIONAL]) > 2
    return signature if more or inspect.Parameter.VAR_KEYWORD in kinds else None
