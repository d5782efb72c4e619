"""Algorithms that learn by gradient descent: `autoround` on one block, `distill` on the whole model.

While they run, a layer computes with a weight that is on the grid of its format and can be trained; afterwards it holds
that weight's values and scales. What the layer holds before is left alone, for whoever has to go back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from detent.algorithms.autoround import OffsetWeight, autoround
from detent.algorithms.distill import Rates, distill, divergence
from detent.algorithms.learned import LearnedWeight
from detent.algorithms.objective import check_elementwise
from detent.algorithms.outcome import Outcome
from detent.config.algorithm import AutoRoundCalibConfig, BlockAPCalibConfig, DistillCalibConfig
from detent.data.padding import token_mask
from detent.engine.blocks import BlockChain, TensorStore, without_cache
from detent.engine.data_loop import Call, DataLoop, regrouped
from detent.engine.layers import Layer
from detent.engine.notices import notify
from detent.engine.traversal_scope import off
from detent.errors import DetentError
from detent.nn import QuantWeightBase, SequentialQuantizer, TensorQuantizer
from detent.progress import track
from detent.statistics.products import LARGE_IN_TRAINING, fast_forward, fast_products

#: Bytes that the float model's predictions may take; on so many tokens `distill` trains.
PREDICTION_BYTES = 1 << 30
#: Steps' worth of sequences by which `block_ap` judges whether a block has become better.
_JUDGES = 2
#: Bits of a weight's codes up to which training may round products' factors to bfloat16, which holds eight.
_COARSE = 6
#: The last share of `block_ap`'s steps, of which the mean is taken: with few sequences that generalises better.
_AVERAGED = 0.2


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


# ---- the whole model ------------------------------------------------------------------------------------------------


@dataclass
class Lesson:
    """A few sequences, and what the float model predicts for them. `mask`: which tokens count, None for all."""

    call: Call
    prediction: Tensor
    mask: Tensor | None


def predictions(model: nn.Module, layers: Sequence[Layer], loop: DataLoop, config: DistillCalibConfig) -> list[Lesson]:
    """What the float model says to the calibration data, a few sequences at a time, as far as `PREDICTION_BYTES` go;
    nothing where that is too little to learn from.

    Raises:
        DetentError: the calibration loop never calls the model itself, or the model gives no tensor to learn from.
    """
    quantizers = [module for module in model.modules() if isinstance(module, TensorQuantizer)]
    fast = fast_forward((layer.module.weight for layer in layers), training=coarse(layers))
    with torch.no_grad(), off(quantizers), without_cache(model), fast:
        pieces = regrouped(_calls_with_predictions(model, loop), config.batch_size)
        if not pieces:
            raise DetentError(
                "distill: the calibration loop calls only parts of the model, so there is no output to learn from"
            )
        if config.passes is not None:
            pieces = pieces[: config.steps + config.held_out]
        lessons, size = [], 0
        for piece in track(pieces, "Float predictions", len(pieces)):
            output = _prediction(_called(model, piece))[0] if piece.said is None else piece.said
            size += output.numel() * output.element_size()
            lessons.append(Lesson(piece, output, piece.token_mask()))
            if size >= PREDICTION_BYTES:
                break
    steps = _steps(config, len(lessons))
    if config.passes is not None and steps < min(config.steps, config.least_steps):
        room = " and the room for predictions" if len(lessons) < len(pieces) else ""
        notify(f"distill: left out: the data{room} are enough for {steps} steps, fewer than {config.least_steps}")
        return []
    return lessons


def _steps(config: DistillCalibConfig, lessons: int) -> int:
    possible = lessons - _held_out(config, lessons)
    return config.steps if config.passes is None else min(config.steps, config.passes * possible)


def _held_out(config: DistillCalibConfig, lessons: int) -> int:
    return min(config.held_out, lessons // 4)


def _calls_with_predictions(model: nn.Module, loop: DataLoop) -> list[Call]:
    """The loop's calls; where it runs just now for the first time, with what the model said to the first of them."""
    said: list[Tensor] = []
    size = 0

    def listen(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal size
        if size < PREDICTION_BYTES:
            said.append(_prediction(output)[0].detach())
            size += said[-1].numel() * said[-1].element_size()

    hook = model.register_forward_hook(listen)
    try:
        calls = loop.calls_of(model)
    finally:
        hook.remove()
    for index, (call, output) in enumerate(zip(calls, said, strict=False)):
        if output.dim() and output.shape[0] == call.sequences:
            calls[index] = replace(call, said=output)
    return calls


def distill_model(
    model: nn.Module,
    lessons: Sequence[Lesson],
    layers: Sequence[Layer],
    config: DistillCalibConfig,
    latents: Mapping[str, Tensor],
) -> set[str]:
    """Train codes, scales and norms of a rounded model to give the float model's predictions.

    Args:
        model: rounded, with scales for all weights.
        lessons: from `predictions`; without any, nothing is done.
        layers: with quantized weights.
        config: of the algorithm.
        latents: {layer: float [out, in]}: what rounding came from, where that isn't what the layer holds.

    Returns:
        Names of the float parameters that have new values.
    """
    layers = trainable(layers, "distill") if lessons else []
    if not layers:
        return set()
    weights = _learned_weights(layers, latents)
    others = _norm_parameters(model) if config.train_norms else {}
    for parameter in others.values():
        parameter.data = parameter.data.clone()
    held = _held_out(config, len(lessons))
    chosen = lessons[-held:] if held else lessons
    steps = _steps(config, len(lessons))

    def objective(lesson: Lesson) -> Tensor:
        output, is_logits = _prediction(_called(model, lesson.call))
        if is_logits:
            return divergence(output, lesson.prediction, lesson.mask)
        return (output.float() - lesson.prediction.float()).square().mean()

    with (
        only_these_learn(model, list(others.values())),
        computing_with(weights, layers),
        without_cache(model),
        _products(layers, math.prod(lessons[0].prediction.shape[:-1])),
    ):
        done = distill(
            objective,
            lessons[:-held] if held else lessons,
            chosen,
            list(weights.values()),
            list(others.values()),
            steps=steps,
            rates=Rates(config.position_rate, config.scale_rate, config.norm_rate),
            checks=min(4, 1 + steps // 40),
            task="Distilling",
        )
    outcome = Outcome(
        "distill",
        "divergence of the model's predictions on sequences held out",
        done.before,
        done.after,
        decided={"steps": done.steps, "kept": done.kept},
        notice="" if done.kept else "no step was better, so the weights stay as they were",
    )
    _adopt(layers, weights, done.kept, outcome)
    return set(others) if done.kept else set()


def coarse(layers: Sequence[Layer]) -> bool:
    """Whether rounding to bfloat16 hides little of what weights are rounded to: codes of eight bits would be lost."""
    return all(layer.format.element.bits <= _COARSE for layer in layers)


def _products(layers: Sequence[Layer], tokens: int) -> AbstractContextManager[None]:
    """`fast_products` for steps of training: by the multiplications in a typical product of `tokens` rows."""
    work = tokens * sorted(layer.module.weight.numel() for layer in layers)[len(layers) // 2]
    return fast_products(work if coarse(layers) else 0, LARGE_IN_TRAINING)


def _called(model: nn.Module, call: Call) -> Any:
    with token_mask(call.mask):
        return model(*call.args, **call.kwargs)


def _prediction(output: Any) -> tuple[Tensor, bool]:
    """(what the model gives, whether these are logits)."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits, True
    if isinstance(output, Tensor):
        return output, False
    first = getattr(output, "last_hidden_state", None)
    if first is None and isinstance(output, (tuple, list)) and output:
        first = output[0]
    if not isinstance(first, Tensor):
        raise DetentError(f"distill: the model gives a {type(output).__name__} without a tensor to learn from")
    return first, False


def _norm_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights and biases of modules that hold vectors alone: norms."""
    found = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if (
            own
            and not isinstance(module, (TensorQuantizer, QuantWeightBase))
            and all(p.dim() == 1 for p in own.values())
        ):
            found.update({f"{name}.{key}": p for key, p in own.items() if p.is_floating_point()})
    return found
