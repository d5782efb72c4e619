"""`nn.MultiheadAttention` in separate operations: PyTorch's own is one that a probe can't look into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def plain_attention(module: Any) -> Callable[..., tuple[Tensor, None]] | None:
    """A forward for the module, without masks and dropout; None where it has separate matrices or extra keys."""
    if not isinstance(module, nn.MultiheadAttention) or module.in_proj_weight is None or module.bias_k is not None:
        return None

    def forward(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        matrix, bias = module.in_proj_weight, module.in_proj_bias
        if query is key and key is value:
            q, k, v = F.linear(query, matrix, bias).chunk(3, dim=-1)
        else:
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), matrix.chunk(3), biases, strict=True))
        batch_first = module.batch_first or query.dim() == 2

        def heads(x: Tensor) -> Tensor:  # to [batch, heads, tokens, channels]
            split: Tensor = x.unflatten(-1, (module.num_heads, -1))
            return split.movedim(-2, -3) if batch_first else split.permute(1, 2, 0, 3)

        y = F.scaled_dot_product_attention(heads(q), heads(k), heads(v))
        merged = (y.movedim(-3, -2) if batch_first else y.permute(2, 0, 1, 3)).flatten(-2)
        return module.out_proj(merged), None

    return forward
