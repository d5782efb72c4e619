"""Functions that quantize in place of a format: what the attribute ``backend`` names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from detent.errors import DetentError

if TYPE_CHECKING:
    from detent.nn.tensor_quantizer import TensorQuantizer

Backend = Callable[[Tensor, "TensorQuantizer"], Tensor]

_backends: dict[str, Backend] = {}


def register_quant_backend(name: str, function: Backend) -> None:
    """Let quantizers with ``backend=name`` compute ``function(x, quantizer)`` instead of their format.

    Args:
        name: what the attribute ``backend`` will say; a name that is there already is replaced.
        function: takes the tensor, after the pre-quantization scale and the rotation, and the quantizer (its attribute
            ``attributes.backend_extra_args`` holds the user's arguments); returns a tensor of the same shape and dtype.
    """
    _backends[name] = function


def unregister_quant_backend(name: str) -> None:
    """Undo `register_quant_backend`; a name that isn't there is no error."""
    _backends.pop(name, None)


def is_registered_quant_backend(name: str) -> bool:
    """Whether quantizers can name this backend."""
    return name in _backends


def quant_backend(name: str, quantizer_name: str) -> Backend:
    """The function called `name`. Raises DetentError, naming the quantizer, where there is none."""
    if name not in _backends:
        known = ", ".join(sorted(_backends)) or "none"
        raise DetentError(
            f"{quantizer_name}: backend {name!r} is not registered (registered: {known}); see"
            " detent.register_quant_backend()"
        )
    return _backends[name]
