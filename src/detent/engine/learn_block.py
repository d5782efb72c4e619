"""Learning codes and scales of one block by gradient descent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from detent.algorithms.autoround import OffsetWeight, autoround
from detent.algorithms.distill import Rates, distill
from detent.algorithms.layer import Layer
from detent.algorithms.learned import LearnedWeight
from detent.algorithms.outcome import Outcome
from detent.config.algorithm import AutoRoundCalibConfig, BlockAPCalibConfig
from detent.engine.blocks import BlockChain
from detent.engine.learning import _adopt, _products, computing_with, only_these_learn, trainable
from detent.engine.store import TensorStore

#: Steps' worth of sequences by which `block_ap` judges whether a block has become better.
_JUDGES = 2


#: The last share of `block_ap`'s steps, of which the mean is taken: with few sequences that generalises better.
_AVERAGED = 0.2


def tune_block(
    chain: BlockChain,
    index: int,
    inputs: TensorStore,
    targets: TensorStore,
    layers: Sequence[Layer],
    config: AutoRoundCalibConfig | BlockAPCalibConfig,
    latents: dict[str, Tensor],
) -> None:
    """Learn the codes and scales of a block's weights so that it gives the float model's outputs.

    Args:
        chain, index: the block.
        inputs: what it is fed, for each batch.
        targets: what the float model has for its outputs.
        layers: the block's quantized layers, with ranges to begin with.
        config: of the algorithm.
        latents: {layer: float [out, in]}: what rounding came from, where that isn't what the layer holds; `block_ap`
            starts from these and leaves its own there.
    """
    name = str(config.method)
    layers = trainable(layers, name)
    if not layers:
        return
    block = chain.blocks[index]
    device = chain.device(index)
    portions = _portions(chain, index, inputs, config.batch_size)
    shape = inputs.get(0, torch.device("cpu")).shape
    tokens = min(shape[0], config.batch_size) * math.prod(shape[1:-1])

    def objective(portion: list[tuple[int, slice | None]]) -> Tensor:
        errors, count = [], 0
        for batch, rows in portion:
            target = targets.get(batch, device)
            target = target if rows is None else target[rows]
            output = chain.run(index, batch, inputs.get(batch, device), rows=rows)
            errors.append((output.float() - target.float()).square().sum())
            count += target.numel()
        return torch.stack(errors).sum() / count

    weights: dict[str, OffsetWeight] | dict[str, LearnedWeight]
    with only_these_learn(block, []), _products(layers, tokens):
        if isinstance(config, AutoRoundCalibConfig):
            weights = offsets = {
                layer.name: OffsetWeight(layer.matrix(), layer.format, layer.scales()) for layer in layers
            }
            with computing_with(offsets, layers):
                tuned = autoround(
                    objective, portions, list(offsets.values()), iterations=config.iterations, rate=config.lr
                )
            before, after, kept = tuned.before, tuned.after, tuned.kept
            plain = "rounding under the first scales is kept"
            decided = {"iterations": tuned.iterations, "kept": kept}
        else:
            weights = learned = _learned_weights(layers, latents)
            with computing_with(learned, layers):
                done = distill(
                    objective,
                    portions,
                    portions[:: -(-len(portions) // _JUDGES)],
                    list(learned.values()),
                    steps=config.steps,
                    rates=Rates(config.position_rate, config.scale_rate),
                    average=_AVERAGED,
                    checks=1,
                    name=name,
                )
            before, after, kept, plain = done.before, done.after, done.kept, "the weights stay as they were"
            decided = {"steps": done.steps, "kept": kept}
            if kept:
                latents.update({layer: weight.latent() for layer, weight in learned.items()})
    objective_name = "mean squared error of the block's outputs"
    notice = "" if kept else f"no step was better, so {plain}"
    _adopt(layers, weights, kept, Outcome(name, objective_name, before, after, decided=decided, notice=notice))


def _learned_weights(layers: Sequence[Layer], latents: Mapping[str, Tensor]) -> dict[str, LearnedWeight]:
    return {
        layer.name: LearnedWeight(
            latents.get(layer.name, layer.matrix()), layer.format, layer.scales(), rounded=layer.matrix()
        )
        for layer in layers
    }


def _portions(chain: BlockChain, index: int, inputs: TensorStore, size: int) -> list[list[tuple[int, slice | None]]]:
    """(number of a batch, which of its sequences), together until they have `size` sequences; None: all of them, also
    where a batch can't be cut."""
    portions: list[list[tuple[int, slice | None]]] = []
    count = size
    for batch in range(len(inputs)):
        hidden = inputs.get(batch, torch.device("cpu"))
        rows = hidden.shape[0]
        step = size if rows > size and chain.can_cut(index, batch, hidden) else rows
        for start in range(0, rows, step):
            if count >= size:
                portions.append([])
                count = 0
            portions[-1].append((batch, None if step == rows else slice(start, start + step)))
            count += min(step, rows - start)
    return portions
