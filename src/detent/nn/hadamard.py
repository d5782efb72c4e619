"""The normalized Hadamard transform along the last axis: ``y = x H / sqrt(n)``, an orthogonal change of basis.

H is the matrix of `detent.nn.hadamard_matrices`, a Kronecker product of small matrices that are applied one after the
other: n (f1 + f2 + ...) operations for a vector instead of n^2. Where no H of the full width is known, the transform is
block-diagonal: the largest order that divides the width, repeated. It stays orthogonal, but spreads an outlier over its
block only.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from detent.errors import DetentError
from detent.nn.hadamard_matrices import hadamard_factors, hadamard_matrix, largest_block


def hadamard_transform(x: Tensor, block_size: int | None = None, *, inverse: bool = False) -> Tensor:
    """`x` turned by the normalized Hadamard matrix, in blocks of `block_size`.

    Args:
        x: floating point [..., n]. Half-precision types are summed in float32 and rounded once.
        block_size: a divisor of n that has a Hadamard matrix; by default see `rotation_block`.
        inverse: multiply with the transpose instead, which undoes the transform.

    Returns:
        A tensor of the same shape and dtype.

    Raises:
        DetentError: the block doesn't divide n or has no Hadamard matrix.
    """
    n = x.shape[-1]
    block = rotation_block(n, block_size)
    y = x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
    y = y.reshape(-1, block)
    for order in hadamard_factors(block) or ():
        # The leading one of the axes that the block splits into is transformed and becomes the last; after as many
        # steps as there are factors, all are back in their places.
        h = _normalized(order, y.dtype, y.device)
        y = (y.reshape(-1, order, block // order).transpose(1, 2) @ (h.T if inverse else h)).reshape(-1, block)
    return y.reshape(x.shape).to(x.dtype)


def rotation_block(width: int, block_size: int | None = None) -> int:
    """The size of the blocks that a width is rotated in.

    Args:
        width: of the axis.
        block_size: what is asked for; None: `width` where it has a Hadamard matrix, else its largest divisor that has.

    Raises:
        DetentError: the block doesn't divide the width or has no Hadamard matrix, or none larger than 1 has (odd
            widths).
    """
    if width < 2 and block_size is None:
        raise DetentError(f"a width of {width} cannot be rotated")
    largest = largest_block(width)
    if block_size is None:
        if largest == 1:
            raise DetentError(
                f"no Hadamard matrix exists for a width of {width}, nor for blocks of it: sizes are 2 or multiples"
                " of 4; leave this rotation off"
            )
        return largest
    if block_size < 1 or width % block_size or hadamard_factors(block_size) is None:
        reason = "doesn't divide it" if block_size < 1 or width % block_size else "has no Hadamard matrix"
        raise DetentError(
            f"a width of {width} cannot be rotated in blocks of {block_size}, which {reason}; the largest block that"
            f" can be used is {largest}"
        )
    return block_size


def random_signs(width: int, seed: int = 0) -> Tensor:
    """`width` random numbers of +1 and -1, float32, the same for the same seed on every device."""
    bits = torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(seed))
    return 1.0 - 2.0 * bits


@lru_cache(maxsize=64)
def _normalized(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # A matrix made in inference mode could not take part in a later backward pass.
    with torch.inference_mode(False), torch.no_grad():
        return (hadamard_matrix(order).to(torch.float64) / math.sqrt(order)).to(device, dtype)
