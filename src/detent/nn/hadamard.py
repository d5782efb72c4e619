"""The normalized Walsh-Hadamard transform along the last axis, for widths or blocks that are powers of two.

With H = 1/sqrt(n) [[1, 1], [1, -1]]^(tensor log2 n): H is symmetric and orthogonal, so the transform is its own
inverse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detent.errors import DetentError


def hadamard(x: Tensor, block_size: int | None = None, *, in_float32: bool = False) -> Tensor:
    """`x` [..., n] transformed in blocks of `block_size` (default n), in its own dtype or in float32.

    Raises:
        DetentError: the block is not a power of two, or does not divide n.
    """
    n = x.shape[-1]
    block = block_size or n
    if block & (block - 1) or n % block:
        raise DetentError(
            f"a rotation needs blocks of a power of two that divide the width; the width is {n}, the block {block};"
            " set rotate={'enable': True, 'block_size': ...}"
        )
    y = x.to(torch.float32) if in_float32 else x
    y = y.reshape(*x.shape[:-1], n // block, block)
    width = 1
    while width < block:
        pairs = y.reshape(*y.shape[:-1], block // (2 * width), 2, width)
        y = torch.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), -2).reshape(y.shape)
        width *= 2
    return (y.reshape(x.shape) * block**-0.5).to(x.dtype)
