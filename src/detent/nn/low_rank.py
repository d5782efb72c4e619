"""A low-rank branch alongside a quantized weight: ``y = Q(x) Q(W)^T + (x A^T) B^T``, A [rank, in] and B [out, rank].

The branch reads the input scaled and rotated like the quantized path, but not rounded. It is held by the weight
quantizer, as ``weight_quantizer.svdquant_lora_a`` and ``svdquant_lora_b``, so it is saved, restored and moved with the
quantizer's other state, and stays in use when the quantizer is switched off, folded or packed: the weight alongside is
only the rest.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from detent.errors import DetentError
from detent.nn.sequential import members_of
from detent.nn.tensor_quantizer import TensorQuantizer


def low_rank_of(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """(A, B) of a quantized module's branch, or None."""
    quantizer = _holder(module)
    if quantizer is None or quantizer.svdquant_lora_a is None or quantizer.svdquant_lora_b is None:
        return None
    return quantizer.svdquant_lora_a, quantizer.svdquant_lora_b


def set_low_rank(module: nn.Module, a: Tensor, b: Tensor, name: str = "layer") -> None:
    """Give a quantized linear a branch, replacing any that it has.

    Args:
        module: the quantized form of `nn.Linear`.
        a: [rank, in].
        b: [out, rank].
        name: what error messages call the module.

    Raises:
        DetentError: the module isn't a quantized linear, or the shapes don't fit it.
    """
    quantizer = _holder(module)
    if quantizer is None or not isinstance(module, nn.Linear):
        raise DetentError(f"{name}: a low-rank branch needs a quantized nn.Linear, not {type(module).__name__}")
    shapes = tuple(a.shape), tuple(b.shape)
    if a.dim() != 2 or b.dim() != 2 or shapes != ((len(a), module.in_features), (module.out_features, len(a))):
        raise DetentError(
            f"{name}: a low-rank branch of {module.in_features} inputs and {module.out_features} outputs has matrices"
            f" [rank, {module.in_features}] and [{module.out_features}, rank], not {shapes[0]} and {shapes[1]}"
        )
    quantizer.svdquant_lora_a, quantizer.svdquant_lora_b = a, b


def drop_low_rank(module: nn.Module) -> None:
    """Take a module's branch away."""
    quantizer = _holder(module)
    if quantizer is not None:
        quantizer.svdquant_lora_a = quantizer.svdquant_lora_b = None


def add_low_rank(module: Any, x: Tensor, y: Tensor) -> Tensor:
    """`y` plus what the module's branch, if it has one, makes of its input `x`."""
    branch = low_rank_of(module)
    if branch is None or x.numel() == 0:
        return y
    a, b = (matrix.to(y.device, y.dtype) for matrix in branch)
    x = members_of(module.input_quantizer)[0].transform(x)
    return y + F.linear(F.linear(x.to(y.dtype), a), b)


def _holder(module: nn.Module) -> TensorQuantizer | None:
    """The quantizer that holds the branch: the weight's, or the first of several in sequence."""
    quantizer: Any = module._modules.get("weight_quantizer")
    return None if quantizer is None else members_of(quantizer)[0]
