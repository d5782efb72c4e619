"""Distillation: learning scales and codes of a whole model from the predictions of the float model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from detent.algorithms.block_work import adopt, computing_with, learned_weights
from detent.algorithms.distill import Rates, distill, divergence
from detent.algorithms.layer import Layer
from detent.algorithms.outcome import Outcome
from detent.algorithms.site_work import Ledger
from detent.config.algorithm import DistillCalibConfig
from detent.engine.calls import Call, regrouped
from detent.engine.data_loop import DataLoop
from detent.engine.learning import coarse, only_these_learn, products
from detent.errors import DetentError
from detent.model.edit import WeightEdits
from detent.model.scopes import quantizers_off, without_cache
from detent.nn import QuantWeightBase, TensorQuantizer
from detent.notices import notify
from detent.padding import token_mask
from detent.progress import track
from detent.statistics.products import fast_forward

#: Bytes that the float model's predictions may take, which limits the tokens that `distill` trains on.
PREDICTION_BYTES = 1 << 30


@dataclass
class Lesson:
    """A few sequences, and what the float model predicts for them. `mask`: which tokens count, None for all."""

    call: Call
    prediction: Tensor
    mask: Tensor | None


def predictions(model: nn.Module, layers: Sequence[Layer], loop: DataLoop, config: DistillCalibConfig) -> list[Lesson]:
    """What the float model predicts for the calibration data, a few sequences at a time, up to `PREDICTION_BYTES`;
    nothing where that is too little to learn from.

    Raises:
        DetentError: the calibration loop never calls the model itself, or the model gives no tensor to learn from.
    """
    quantizers = [module for module in model.modules() if isinstance(module, TensorQuantizer)]
    fast = fast_forward((layer.module.weight for layer in layers), training=coarse(layers))
    with torch.no_grad(), quantizers_off(quantizers), without_cache(model), fast:
        pieces = regrouped(_calls_with_predictions(model, loop), config.batch_size)
        if not pieces:
            raise DetentError(
                "distill: the calibration loop calls only parts of the model, so there is no output to learn from"
            )
        if config.passes is not None:
            pieces = pieces[: config.steps + config.held_out]
        lessons, size = [], 0
        for piece in track(pieces, "Float predictions", len(pieces)):
            output = _prediction(_called(model, piece))[0] if piece.output is None else piece.output
            size += output.numel() * output.element_size()
            lessons.append(Lesson(piece, output, piece.token_mask()))
            if size >= PREDICTION_BYTES:
                break
    steps = _steps(config, len(lessons))
    if config.passes is not None and steps < min(config.steps, config.least_steps):
        memory = " and the memory for predictions" if len(lessons) < len(pieces) else ""
        notify(
            f"distill skipped: the calibration data{memory} allow {steps} steps; at least {config.least_steps} are"
            " needed"
        )
        return []
    return lessons


def _steps(config: DistillCalibConfig, lessons: int) -> int:
    possible = lessons - _held_out(config, lessons)
    return config.steps if config.passes is None else min(config.steps, config.passes * possible)


def _held_out(config: DistillCalibConfig, lessons: int) -> int:
    return min(config.held_out, lessons // 4)


def _calls_with_predictions(model: nn.Module, loop: DataLoop) -> list[Call]:
    """The loop's calls; if this is its first run, with what the model returned for the first of them."""
    outputs: list[Tensor] = []
    size = 0

    def record(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal size
        if size < PREDICTION_BYTES:
            outputs.append(_prediction(output)[0].detach())
            size += outputs[-1].numel() * outputs[-1].element_size()

    hook = model.register_forward_hook(record)
    try:
        calls = loop.calls_of(model)
    finally:
        hook.remove()
    for index, (call, output) in enumerate(zip(calls, outputs, strict=False)):
        if output.dim() and output.shape[0] == call.sequences:
            calls[index] = replace(call, output=output)
    return calls


def distill_model(
    model: nn.Module,
    lessons: Sequence[Lesson],
    layers: Sequence[Layer],
    config: DistillCalibConfig,
    ledger: Ledger,
) -> set[str]:
    """Train codes, scales and norms of a rounded model to give the float model's predictions.

    Args:
        model: rounded, with scales for all weights.
        lessons: from `predictions`; without any, nothing is done.
        layers: with quantized weights.
        config: of the algorithm.
        ledger: what was done to the layers before, and where what is done now is noted.

    Returns:
        Names of the float parameters that have new values.
    """
    if not layers or not lessons:
        return set()
    weights = learned_weights(layers, ledger)
    others = _norm_parameters(model) if config.train_norms else {}
    weights_of = WeightEdits(model)
    for name, parameter in others.items():
        weights_of.put(name, parameter)  # trained in memory that no other tensor shares
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
        products(layers, math.prod(lessons[0].prediction.shape[:-1])),
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
    adopt(ledger, layers, weights, done.kept, outcome)
    return set(others) if done.kept else set()


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
