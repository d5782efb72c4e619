"""Training weights by gradient descent: what a block hands to an algorithm, and what layers compute with meanwhile.

While training runs, a layer computes with a weight that is on the grid of its format and can be trained; afterwards it
holds that weight's values and scales. What the layer held before stays unchanged, so that it can be restored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from detent.algorithms.layer import Layer
from detent.algorithms.learned import GridWeight, LearnedWeight
from detent.algorithms.outcome import Outcome
from detent.algorithms.site_work import Ledger

#: What a block's outputs are compared by.
BLOCK_OBJECTIVE = "mean squared error of the block's outputs"


@dataclass(frozen=True)
class BlockWork:
    """One block whose sites are solved, to be trained so that it gives the float model's outputs.

    Attributes:
        layers: its quantized layers, with ranges to begin with.
        ledger: what was done to them before.
        objective: of a portion, the mean squared error of the block's outputs: a scalar that is differentiable with
            respect to what the layers compute with.
        portions: of the calibration data: ``batch_size`` sequences each, from the configuration.
    """

    layers: Sequence[Layer]
    ledger: Ledger
    objective: Callable[[Any], Tensor]
    portions: Sequence[Any]


@contextmanager
def computing_with(weights: Mapping[str, nn.Module], layers: Sequence[Layer]) -> Iterator[None]:
    """Inside the block, the layers named in `weights` compute with what these give."""
    replaced = [layer for layer in layers if layer.name in weights]

    def stand_in(layer: Layer, learned: nn.Module) -> Any:
        shape, dtype, module = layer.weight.shape, layer.weight.dtype, layer.module
        return lambda: module.from_output_first(learned().reshape(shape).to(dtype), module)

    for layer in replaced:
        layer.module.__dict__["quantized_weight"] = stand_in(layer, weights[layer.name])
    try:
        yield
    finally:
        for layer in replaced:
            del layer.module.__dict__["quantized_weight"]


def learned_weights(layers: Sequence[Layer], ledger: Ledger) -> dict[str, LearnedWeight]:
    """Weights to train, from what the layers were rounded to and what rounding came from."""
    weights = {}
    for layer in layers:
        latent = ledger.state(layer).latent
        matrix = layer.matrix()
        weights[layer.name] = LearnedWeight(
            matrix if latent is None else latent, layer.format, layer.scales(), rounded=matrix
        )
    return weights


def adopt(
    ledger: Ledger, layers: Sequence[Layer], weights: Mapping[str, GridWeight], kept: int, outcome: Outcome
) -> None:
    """Give the layers what was learned, if a step was kept, and note what was done."""
    for layer in layers:
        if kept:
            weight = weights[layer.name]
            ledger.adopt(layer, *weight.result(), latent=weight.latent())
        ledger.note(layer, outcome)
