"""What training a block and training a model share: which parameters learn, and how exact products have to be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from detent.algorithms.layer import Layer
from detent.statistics.products import LARGE_IN_TRAINING, fast_products

#: Bits of a weight's codes up to which training may round products' factors to bfloat16, which holds eight.
_COARSE = 6


@contextmanager
def only_these_learn(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside the context no other parameter of the model requires a gradient."""
    kept = {id(parameter) for parameter in trained}
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def coarse(layers: Sequence[Layer]) -> bool:
    """Whether rounding to bfloat16 hides little of what weights are rounded to: codes of eight bits would be lost."""
    return all(layer.format.element.bits <= _COARSE for layer in layers)


def products(layers: Sequence[Layer], tokens: int) -> AbstractContextManager[None]:
    """`fast_products` for steps of training: by the multiplications in a typical product of `tokens` rows."""
    work = tokens * sorted(layer.module.weight.numel() for layer in layers)[len(layers) // 2]
    return fast_products(work if coarse(layers) else 0, LARGE_IN_TRAINING)
