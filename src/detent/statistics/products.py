"""Matrix products for statistics: float32 sums of products, of which large ones may round their factors to bfloat16.

CPUs with bfloat16 matrix units multiply several times faster that way; small products aren't worth it and stay exact,
and activations that are bfloat16 already lose nothing. Rounding a factor changes it by at most 2^-9 of
itself; the sums stay float32. A second moment of rounded rows is the exact second moment of rows that differ from the
observed ones by at most 2^-9 in each entry: still symmetric and positive semi-definite, and an entry is off by at most
2^-8 of ``sum |x_i x_j|``, far below what another sample of calibration text changes. The forward passes that only
observe a large model are run the same way: what its layers read is then what the model in bfloat16 products makes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor


def _setting() -> Any:
    """PyTorch's switch for CPU products of float32 matrices, or None where this version has none."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    return matmul if hasattr(matmul, "fp32_precision") else None


#: Multiplications in one product from which on its factors may be rounded.
LARGE = 1 << 29
#: The same where weights are trained: a step's gradient differs more from another batch's than by rounding.
LARGE_IN_TRAINING = 1 << 24


@contextmanager
def fast_products(size: int, least: int = LARGE) -> Iterator[None]:
    """Let products of float32 matrices on the CPU round their factors to bfloat16 inside the block.

    Args:
        size: multiplications in one product.
        least: below this size nothing is rounded.
    """
    setting = _setting()
    if size < least or setting is None or not torch.backends.mkldnn.is_available():
        yield
        return
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


#: Elements of a weight from which on its products count as large, and the same where weights are trained.
LARGE_WEIGHT, LARGE_WEIGHT_IN_TRAINING = 1 << 20, 1 << 16


def fast_forward(weights: Iterable[Tensor], *, training: bool = False) -> AbstractContextManager[None]:
    """`fast_products` for forward passes of layers with these weights.

    Args:
        weights: the largest counts.
        training: what is observed serves training.
    """
    least = LARGE_WEIGHT_IN_TRAINING if training else LARGE_WEIGHT
    return fast_products(LARGE if any(weight.numel() >= least for weight in weights) else 0)
