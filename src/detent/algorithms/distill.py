"""`distill`: the whole quantized model is trained, for a few dozen small steps, to give the float model's outputs.

Objective: what the caller measures on one batch, usually the Kullback-Leibler divergence of the quantized model's
predictions from the float model's (`divergence`), the thing that perplexity sees. What is trained is what the file
format leaves open: the codes and scales of `LearnedWeight`, and parameters that stay float, such as norms. Every layer
then makes up for the errors of all others, in either direction, which no layer-by-layer objective can ask for.

Adam with a learning rate that falls linearly (to a twentieth: codes flicker as long as positions move). On request
training ends with the mean of its last steps (Polyak and Juditsky, 1992), which depends less on the batches that came
last. Some batches are held out: training starts from what other algorithms made, the state of least held-out objective
is kept, and if that is the first one, nothing has changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from detent.algorithms.learned import LearnedWeight, Snapshot, check_some, shuffled
from detent.algorithms.registry import Handler, LayerFacts, codes_together, quantized_twice, register
from detent.algorithms.site_work import SiteWork
from detent.config.algorithm import DistillCalibConfig
from detent.errors import DetentError
from detent.progress import track


@dataclass(frozen=True)
class Rates:
    """Learning rates at their height.

    Attributes:
        position: in units of the element (steps, for integers).
        stretch: of scales, relative.
        other: of other parameters, in their own units.
    """

    position: float = 0.005
    stretch: float = 0.005
    other: float = 0.001


@dataclass(frozen=True)
class Distilled:
    """Attributes:
    before, after: the objective on the held-out batches, at first and of what was kept; never larger.
    steps: how many were taken.
    kept: the step whose state was kept; 0: nothing has changed.
    """

    before: float
    after: float
    steps: int
    kept: int


def distill(
    objective: Callable[[Any], Tensor],
    batches: Sequence[Any],
    held_out: Sequence[Any],
    weights: Sequence[LearnedWeight],
    others: Sequence[nn.Parameter] = (),
    *,
    steps: int,
    rates: Rates | None = None,
    average: float = 0.0,
    checks: int = 4,
    seed: int = 0,
    task: str = "",
    name: str = "distill",
) -> Distilled:
    """Train `weights` and `others` in place.

    Args:
        objective: of a batch, a scalar that is differentiable with respect to what is trained.
        batches: to train on, one a step, in random order, each as often as the others. A few sequences each: many small
            steps do more than few large ones in the same time.
        held_out: to choose the state by; may be the same as `batches` where there are too few to hold any out.
        weights: as the model computes with them.
        others: parameters that stay float.
        steps: how many to take.
        rates: learning rates.
        average: the share of the steps, counted from the end, whose mean is what training ends with; 0: the last step.
        checks: how often the held-out objective is measured, the last time at the end.
        seed: of the order of the batches.
        task: named in progress reports.
        name: of the algorithm, in messages.

    Raises:
        DetentError: nothing to train, no batches, or an objective that isn't finite.
    """
    check_some(weights, name)
    if not batches or not held_out:
        raise DetentError(f"{name}: needs at least one batch to train on and one to choose by")
    rates = rates or Rates()
    trained = [*(w.position for w in weights), *(w.stretch for w in weights if w.stretch is not None), *others]
    wanted = [p.requires_grad for p in trained]
    before = _mean(objective, held_out)
    best, mean = Snapshot(trained, before, 0), None
    optimizer = _optimizer(weights, others, rates)
    order = shuffled(len(batches), steps, seed)
    measured = {round(steps * (i + 1) / checks) for i in range(checks)}
    try:
        for parameter in trained:
            parameter.requires_grad_(True)
        for step in track(range(1, steps + 1), task, steps) if task else range(1, steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = group["height"] * _course(step, steps)
            with torch.enable_grad():
                loss = objective(batches[order[step - 1]])
                loss.backward()
            if not math.isfinite(now := float(loss.detach())):
                raise DetentError(f"{name}: the objective became {now} in step {step}; use lower rates")
            optimizer.step()
            optimizer.zero_grad()
            for weight in weights:
                weight.settle()
            if (count := step - (steps - round(average * steps))) > 0:
                mean = mean or Snapshot(trained, math.inf, step)
                mean.blend(trained, 1 / count)
            if mean is not None and step == steps:
                mean.restore(trained)
            if step in measured:
                value = _mean(objective, held_out)
                if value < best.objective:
                    best = Snapshot(trained, value, step)
    finally:
        best.restore(trained)
        for parameter, before_training in zip(trained, wanted, strict=True):
            parameter.grad = None
            parameter.requires_grad_(before_training)
    return Distilled(before, best.objective, steps, best.step)


def divergence(logits: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(reference || model) in nats, the mean over tokens.

    Args:
        logits: [..., classes], any float type.
        reference: logits or log-probabilities of the float model, the same shape.
        mask: bool [...], which tokens count; all by default.
    """
    model, target = log_softmax(logits.float(), -1), log_softmax(reference.float(), -1)
    if mask is not None:
        model, target = model[mask], target[mask]
    model, target = model.reshape(-1, model.shape[-1]), target.reshape(-1, target.shape[-1])
    return kl_div(model, target, log_target=True, reduction="batchmean")


def _optimizer(weights: Sequence[LearnedWeight], others: Sequence[nn.Parameter], rates: Rates) -> torch.optim.Adam:
    groups = [
        ([w.position for w in weights], rates.position),
        ([w.stretch for w in weights if w.stretch is not None], rates.stretch),
        (list(others), rates.other),
    ]
    return torch.optim.Adam(
        [{"params": parameters, "lr": rate, "height": rate} for parameters, rate in groups if parameters],
        betas=(0.9, 0.95),
        eps=1e-12,  # gradients of a mean over tokens are small; the default would damp them
        fused=True,
    )


def _course(step: int, steps: int) -> float:
    """The share of the learning rate's height in a step, counted from 1."""
    warm = min(1.0, step / 2)
    return warm * (0.05 + 0.95 * (1 - (step - 1) / steps))


@torch.no_grad()
def _mean(objective: Callable[[Any], Tensor], batches: Sequence[Any]) -> float:
    return float(sum(float(objective(batch)) for batch in batches) / len(batches))


@register(DistillCalibConfig)
class DistillHandler(Handler[DistillCalibConfig]):
    """Nothing at a site; the engine trains the rounded model (`detent.engine.learn_model`)."""

    scope = "end"
    from_latents = True

    def refusal(self, step: DistillCalibConfig, layer: LayerFacts) -> str | None:
        return codes_together(layer) or quantized_twice(layer)

    def solve(self, step: DistillCalibConfig, site: SiteWork) -> None:
        pass
