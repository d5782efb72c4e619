"""Handing one block to an algorithm that trains it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detent.algorithms.block_work import BlockWork
from detent.algorithms.layer import Layer
from detent.algorithms.registry import handler_of
from detent.algorithms.site_work import Ledger
from detent.engine.blocks import BlockChain
from detent.engine.learning import only_these_learn, products
from detent.engine.store import TensorStore

#: Some sequences of the calibration data: (number of a batch, which of its sequences; None for all).
Portion = list[tuple[int, slice | None]]


def train_block(
    chain: BlockChain,
    index: int,
    inputs: TensorStore,
    targets: TensorStore,
    layers: Sequence[Layer],
    step: Any,
    ledger: Ledger,
) -> None:
    """Train the codes and scales of a block's weights so that it gives the float model's outputs.

    Args:
        chain, index: the block.
        inputs: what it is fed, for each batch.
        targets: the float model's outputs.
        layers: the block's quantized layers, which already have ranges.
        step: the configuration of an algorithm of scope ``block``, which has a ``batch_size``.
        ledger: what was done to the layers before, and where what is done now is noted.
    """
    if not layers:
        return
    block = chain.blocks[index]
    device = chain.device(index)
    shape = inputs.get(0, torch.device("cpu")).shape
    tokens = min(shape[0], step.batch_size) * math.prod(shape[1:-1])

    def objective(portion: Portion) -> Tensor:
        errors, count = [], 0
        for batch, rows in portion:
            target = targets.get(batch, device)
            target = target if rows is None else target[rows]
            output = chain.run(index, batch, inputs.get(batch, device), rows=rows)
            errors.append((output.float() - target.float()).square().sum())
            count += target.numel()
        return torch.stack(errors).sum() / count

    portions = _portions(chain, index, inputs, step.batch_size)
    with only_these_learn(block, []), products(layers, tokens):
        handler_of(step).train(step, BlockWork(layers, ledger, objective, portions))


def _portions(chain: BlockChain, index: int, inputs: TensorStore, size: int) -> list[Portion]:
    """The sequences of all batches, `size` at a time; a batch that can't be cut stays whole."""
    portions: list[Portion] = []
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
