"""Algorithms that learn by gradient descent: `autoround` on one block, `distill` on the whole model.

While they run, a layer computes with a weight that is on the grid of its format and can be trained; afterwards it holds
that weight's values and scales. What the layer holds before is left alone, for whoever has to go back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from detent.algorithms.autoround import OffsetWeight
from detent.algorithms.layer import Layer
from detent.algorithms.learned import LearnedWeight
from detent.algorithms.objective import check_elementwise
from detent.algorithms.outcome import Outcome
from detent.errors import DetentError
from detent.nn import SequentialQuantizer
from detent.notices import notify
from detent.statistics.products import LARGE_IN_TRAINING, fast_products

#: Bits of a weight's codes up to which training may round products' factors to bfloat16, which holds eight.
_COARSE = 6


def trainable(layers: Sequence[Layer], algorithm: str) -> list[Layer]:
    """The layers whose codes can be chosen one by one; for the others the user is told that they stay as they are."""
    found = []
    for layer in layers:
        try:
            layer.check_matrix_format(algorithm)
            check_elementwise(layer.format, algorithm)
            if isinstance(layer.module.weight_quantizer, SequentialQuantizer):
                raise DetentError(f"{algorithm}: weights that are quantized twice aren't learned")
        except DetentError as error:
            notify(f"{layer.name} stays as it is: {error}")
            continue
        found.append(layer)
    return found


@contextmanager
def computing_with(weights: Mapping[str, nn.Module], layers: Sequence[Layer]) -> Iterator[None]:
    """Inside the block, the layers named in `weights` compute with what these give."""
    replaced = [layer for layer in layers if layer.name in weights]

    def stand_in(layer: Layer, learned: nn.Module) -> Any:
        shape, dtype = layer.module.weight.shape, layer.module.weight.dtype
        return lambda: learned().reshape(shape).to(dtype)

    for layer in replaced:
        layer.module.__dict__["quantized_weight"] = stand_in(layer, weights[layer.name])
    try:
        yield
    finally:
        for layer in replaced:
            del layer.module.__dict__["quantized_weight"]


@contextmanager
def only_these_learn(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """No other parameter of the model wants a gradient inside the block."""
    kept = {id(parameter) for parameter in trained}
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def _adopt(
    layers: Sequence[Layer], weights: Mapping[str, OffsetWeight | LearnedWeight], kept: int, outcome: Outcome
) -> None:
    """Give the layers what was learned, if a step was kept, and note what was done."""
    for layer in layers:
        if kept:
            values, scales = weights[layer.name].result()
            layer.set_scales(scales)
            layer.set_matrix(values)
        layer.note(outcome)


# ---- one block ------------------------------------------------------------------------------------------------------


# ---- the whole model ------------------------------------------------------------------------------------------------


def coarse(layers: Sequence[Layer]) -> bool:
    """Whether rounding to bfloat16 hides little of what weights are rounded to: codes of eight bits would be lost."""
    return all(layer.format.element.bits <= _COARSE for layer in layers)


def _products(layers: Sequence[Layer], tokens: int) -> AbstractContextManager[None]:
    """`fast_products` for steps of training: by the multiplications in a typical product of `tokens` rows."""
    work = tokens * sorted(layer.module.weight.numel() for layer in layers)[len(layers) // 2]
    return fast_products(work if coarse(layers) else 0, LARGE_IN_TRAINING)
