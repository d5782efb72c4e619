"""Calibration: ranges for every quantizer that needs one, from weights and from a user's `forward_loop`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from detent.algorithms.layer import layers_of
from detent.algorithms.modes import ForwardLoop, mode_of
from detent.algorithms.weight_ranges import calibrate_weight, quantized_weights
from detent.config import MaxCalibConfig, QuantizeAlgorithmConfig, RotationConfig, parse_algorithm
from detent.config.algorithm import BestCalibConfig, BlockAPCalibConfig, DataAlgorithmConfig, DistillCalibConfig
from detent.distributed import ParallelState
from detent.engine.data_loop import DataLoop
from detent.engine.learn_model import distill_model, predictions
from detent.engine.solve import Solver, describe
from detent.engine.traversal import solve_model
from detent.errors import DetentError
from detent.model.conversion import named_members
from detent.model.rollback import unchanged_on_failure
from detent.model.scopes import evaluating, observing
from detent.nn import TensorQuantizer, quantizers_of
from detent.nn.sequential import members_of
from detent.notices import notify
from detent.progress import track
from detent.structure import find_structure
from detent.transforms.folding import Folding
from detent.transforms.rotation import rotate_model

_log = logging.getLogger(__name__)


def calibrate(
    model: nn.Module,
    algorithm: str | dict[str, Any] | list[Any] | None = "max",
    forward_loop: ForwardLoop | None = None,
    *,
    folding: Folding | None = None,
) -> nn.Module:
    """Find the range of every enabled quantizer that needs one, and run the algorithms that change weights.

    Args:
        model: a model with quantizers. It runs in eval mode, without gradients; every module's train flag is restored.
        algorithm: ``"max"``, ``"mse"``, a dict with ``"method"`` and its options, a list of these (one after the
            other), or None for no calibration.
        forward_loop: a function that calls the model it is given on calibration data, once however many algorithms
            there are. Only needed where activations have static ranges. Where the model is called with an
            `attention_mask` [batch, seq], what it masks stays out of the statistics.
        folding: where channel scales are folded to; None: they stay in the layers' input quantizers.

    Returns:
        `model`.

    Raises:
        DetentError: the algorithm is unknown; data is needed and missing; the loop never calls the model or never
            reaches a quantizer or layer that needs data; NaN or infinity is met; an algorithm can't serve a format.
            Weights, ranges and train flags are then as they were.
    """
    loop = forward_loop if isinstance(forward_loop, DataLoop) else DataLoop(forward_loop)
    steps = [step for step in parse_algorithm(algorithm) if step.method is not None]
    if not steps:
        _warn_uncalibrated(model)
        return model
    if isinstance(steps[-1], RotationConfig):
        steps.append(MaxCalibConfig())
    steps = [part for step in steps for part in (step.parts() if isinstance(step, BestCalibConfig) else [step])]
    with unchanged_on_failure(model), torch.no_grad():
        with evaluating(model):
            for group in _groups(steps):
                _run_group(model, group, loop, folding)
        if any(getattr(step, "distributed_sync", False) for step in steps):
            _synchronize(model)
    return model


def _groups(steps: list[QuantizeAlgorithmConfig]) -> list[list[QuantizeAlgorithmConfig]]:
    """Steps that are done together: those between steps that change the model as a whole, which stand alone."""
    groups: list[list[QuantizeAlgorithmConfig]] = []
    for step in steps:
        if not groups or _stands_alone(step) or _stands_alone(groups[-1][0]):
            groups.append([step])
        else:
            groups[-1].append(step)
    return groups


def _stands_alone(step: QuantizeAlgorithmConfig) -> bool:
    return isinstance(step, RotationConfig) or mode_of(step) is not None


def _run_group(model: nn.Module, steps: list[QuantizeAlgorithmConfig], loop: DataLoop, folding: Folding | None) -> None:
    mode = mode_of(steps[0])
    if isinstance(steps[0], RotationConfig):
        _rotate(model, steps[0], loop, folding)
    elif mode is not None:
        mode.apply(model, steps[0], loop.forward_loop)
    elif any(isinstance(step, DataAlgorithmConfig) for step in steps):
        _calibrate_on_data(model, steps, loop, folding)
    else:
        _calibrate_activations(model, loop)
        for step in steps:
            _calibrate_weights(model, step)


def _warn_uncalibrated(model: nn.Module) -> None:
    waiting = [q.name for q in named_members(model) if q.needs_calibration and q.is_static and not q.is_calibrated]
    if waiting:
        _log.info("%d static quantizers, such as %s, take their range from each tensor", len(waiting), waiting[0])


def _rotate(model: nn.Module, config: RotationConfig, loop: DataLoop, folding: Folding | None) -> None:
    """Rotate the model, proved and measured on the first calibration batch, or on random tokens without data."""
    structure = find_structure(model) if folding is None else folding.structure
    calls = loop.calls_of(model)[:1] if loop else []
    probe = calls[0].split(4)[0] if calls else None
    run = None if probe is None else (lambda m: m(*probe.args, **probe.kwargs))
    report = rotate_model(model, structure, config, run)
    if report.notice:
        notify(report.notice)
    for part in report.parts:
        if part.reason:
            notify(f"rotation: {part}")
    if folding is not None:
        folding.changed |= set(report.changed)


# ---- weights --------------------------------------------------------------------------------------------------------


def _calibrate_weights(model: nn.Module, config: QuantizeAlgorithmConfig) -> None:
    total = sum(1 for _ in quantized_weights(model))
    for name, quantizer, weight in track(quantized_weights(model), "Calibrating weights", total):
        calibrate_weight(name, quantizer, weight, config)


def _calibrate_on_data(
    model: nn.Module, steps: list[QuantizeAlgorithmConfig], loop: DataLoop, folding: Folding | None
) -> None:
    """Algorithms that learn from data: statistics, then one site after the other; activation ranges on the way."""
    if not loop:
        raise DetentError(
            f"{describe(steps)}: this algorithm learns from data; pass a forward_loop that runs the model on"
            " calibration data"
        )
    distilling = [step for step in steps if isinstance(step, DistillCalibConfig)]
    lessons = predictions(model, layers_of(model), loop, distilling[0]) if distilling else []
    if not lessons:
        steps = [step.alone() if isinstance(step, BlockAPCalibConfig) else step for step in steps]
    solver = Solver(steps, folding)
    waiting = _waiting(model)
    together = _ActivationPass(model, waiting, loop)
    limits = [step.max_tokens for step in steps if isinstance(step, DataAlgorithmConfig) and step.max_tokens]
    part = loop.limited(model, min(limits) if limits else None)
    if part is not loop:
        together.loop = part
    solve_model(model, steps, part, solver, lambda: list(named_members(model)), together)
    solved = {id(layer.module) for layer in layers_of(model) if layer.has_rows}
    for name, quantizer, weight in quantized_weights(model):
        if id(model.get_submodule(name.rpartition(".")[0])) not in solved:
            calibrate_weight(name, quantizer, weight, None)
    for step in distilling:
        if not together.done:
            _calibrate_activations(model, loop)
        changed = distill_model(model, lessons, [x for x in layers_of(model) if x.has_rows], step, solver.latents)
        if folding is not None:
            folding.changed |= changed
    elsewhere = any(not q.name.endswith("input_quantizer") for q in waiting)
    if not together.done or (folding is not None and folding.rows and elsewhere):
        _calibrate_activations(model, loop)
    elif solver.scaled:
        stale = {id(layer.input_quantizer) for layer in layers_of(model) if layer.name in solver.scaled}
        _observe_activations(model, [q for q in waiting if id(q) in stale], loop)


# ---- activations ----------------------------------------------------------------------------------------------------


def _waiting(model: nn.Module) -> list[TensorQuantizer]:
    """Quantizers that have to see data: those that aren't a weight's."""
    direct = {id(member) for _, quantizer, _ in quantized_weights(model) for member in members_of(quantizer)}
    return [q for q in named_members(model) if id(q) not in direct and (q.needs_calibration or q.needs_bias)]


def _calibrate_activations(model: nn.Module, loop: DataLoop) -> None:
    waiting = _waiting(model)
    if not loop:
        needing = [q.name for q in waiting if _cannot_do_without_data(q)]
        if needing:
            raise DetentError(
                f"{len(needing)} quantizers need data for their static ranges (for instance {needing[0]}): pass a"
                " forward_loop that runs the model on calibration data, or make them dynamic (type: 'dynamic')"
            )
        return
    _observe_activations(model, waiting, loop)


def _observe_activations(model: nn.Module, waiting: list[TensorQuantizer], loop: DataLoop) -> None:
    if not waiting:
        return
    activations = _ActivationPass(model, waiting, loop)
    with activations():
        loop(model)


class _ActivationPass:
    """A run of the loop in which quantizers find their ranges, together with whatever else looks on.

    Attributes:
        done: whether the ranges have been found.
    """

    def __init__(self, model: nn.Module, waiting: list[TensorQuantizer], loop: DataLoop) -> None:
        self._model, self._waiting, self.loop = model, waiting, loop
        self.done = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with observing(self._model, self._waiting):
            yield
            unseen = [q.name for q in self._waiting if not _take_over(q)]
        self.done = True
        if unseen and len(unseen) == len(self._waiting) and not self.loop.calls:
            raise DetentError("the forward_loop never called the model, so there is nothing to calibrate with")
        if unseen:
            raise DetentError(
                f"the calibration data never reached {len(unseen)} quantizers (for instance {', '.join(unseen[:3])});"
                " exclude them in the configuration, make them dynamic, or feed data that uses them"
            )


def _cannot_do_without_data(quantizer: TensorQuantizer) -> bool:
    """Whether a range or bias is still unknown. Dynamic formats under an outer scale can take that from each tensor."""
    needs_range = quantizer.needs_calibration and quantizer.is_static and not quantizer.is_calibrated
    return needs_range or (quantizer.needs_bias and quantizer._bias_value is None)


def _take_over(quantizer: TensorQuantizer) -> bool:
    """Load what a quantizer observed; False if that is nothing."""
    try:
        quantizer.load_calib_amax()
    except DetentError as error:
        if "no data was observed" not in str(error):
            raise
        return False
    return True


# ---- several processes ----------------------------------------------------------------------------------------------


def _synchronize(model: nn.Module) -> None:
    """Give ranks that see different data, or hold parts of one matrix, the widest range that any of them found."""
    for module in model.modules():
        state = getattr(module, "parallel_state", None) or ParallelState()
        for _, quantizer in quantizers_of(module):
            for member in members_of(quantizer):
                if not (member.is_enabled and member.is_calibrated):
                    continue
                member.sync_amax_across_distributed_group(state.data_parallel_group)
                if member.amax is not None and member.amax.numel() == 1:
                    member.sync_amax_across_distributed_group(state.tensor_parallel_group)
