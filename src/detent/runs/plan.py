"""`plan_checkpoint`: what a run would do, without reading a weight."""

from __future__ import annotations

import math

from detent.checkpoints import Source
from detent.errors import DetentError
from detent.plan.cost import Cost, Samples, cost
from detent.plan.plan import Plan
from detent.report.plan import PlanReport, grouped
from detent.report.terminal import format_bytes
from detent.runs.options import AlgorithmOptions, CalibrationOptions, ModelOptions, SchemeOptions
from detent.runs.parts import planned_weights
from detent.runs.prepare import prepare
from detent.runs.run import BUILTIN_MODEL, Run, model_folder


def plan_checkpoint(
    model_options: ModelOptions,
    scheme_options: SchemeOptions,
    *,
    algorithms: AlgorithmOptions | None = None,
    calibration: CalibrationOptions | None = None,
    run: Run | None = None,
) -> PlanReport:
    """Plan the quantization of a checkpoint of any size, from its config.json and the headers of its files.

    Args:
        model_options, scheme_options, algorithms, calibration, run: as for `quantize_checkpoint`.

    Raises:
        DetentError: whatever `quantize_checkpoint` would refuse before it reads a weight.

    Example:
        >>> import detent
        >>> plan = detent.plan_checkpoint(detent.ModelOptions(), detent.SchemeOptions("w_fp8", group_size=None))
        >>> plan.weights.quantized, plan.way
        (28, 'tensor by tensor')
    """
    run = run or Run()
    folder, _ = model_folder(model_options)
    prepared = prepare(folder, model_options, scheme_options, algorithms, run, without_weights=True)
    source, plan = prepared.source, prepared.plan
    seconds = run.seconds
    will = cost(plan, source, prepared.dtype, samples_of(plan, calibration or CalibrationOptions()))
    return PlanReport(
        model=model_options.model_dir or BUILTIN_MODEL,
        scheme=plan.scheme.name,
        algorithms=[str(step.method) for step in plan.algorithms],
        layout=plan.layout.name,
        layout_notes=plan.layout_notes,
        way=will.way,
        weights=planned_weights(source, plan),
        tensors=grouped(_rows(plan, source)),
        before_bytes=source.nbytes,
        output_bytes=will.output,
        bits_per_weight=will.bits_per_weight,
        peak_memory_bytes=will.memory,
        states_bytes=will.states,
        disk_bytes=will.disk,
        estimated_seconds=will.seconds,
        planning_seconds=seconds,
        notices=run.notices,
    )


def samples_of(plan: Plan, options: CalibrationOptions) -> Samples | None:
    """What a plan is calibrated on, as far as is known without the texts."""
    if not plan.needs_data:
        return None
    return Samples(options.num_samples, options.seq_len, options.batch_size)


def spills(will: Cost, budget: int | None, available: int | None) -> bool:
    """Whether hidden states have to go to disk.

    Args:
        will: what the run will need.
        budget: bytes that the user allows; None for no limit of theirs.
        available: bytes that the machine has left; None where that isn't known.

    Raises:
        DetentError: the budget, or the machine, doesn't hold what has to be in memory.
    """
    if budget is not None and will.memory > budget:
        raise DetentError(
            f"memory_budget {format_bytes(budget)}: this run, {will.way}, needs at least {format_bytes(will.memory)}; a"
            " smaller batch size or shorter samples take less"
        )
    limit = budget if budget is not None else available
    return limit is not None and will.memory + will.states > limit


def _rows(plan: Plan, source: Source) -> list[tuple[str, tuple[int, ...], int, str | None, str]]:
    rows: list[tuple[str, tuple[int, ...], int, str | None, str]] = []
    formats = {f"{plan.names.layer(name) or name}.weight": layer for name, layer in plan.formats.layers.items()}
    for tensor in dict.fromkeys([*source.tensors, *formats]):
        if tensor in plan.kept:
            shape = source.info(tensor).shape
            rows.append((tensor, shape, math.prod(shape), None, plan.kept[tensor]))
        elif tensor in formats:
            layer = formats[tensor]
            sides = [f"{side} {fmt}" for side, fmt in (("input", layer.input), ("output", layer.output)) if fmt]
            words = "; ".join([str(layer.weight) if layer.weight else "weight as it was", *sides])
            reason = f"a {layer.kind} that the scheme {plan.scheme.name} covers"
            rows.append((tensor, layer.shape, math.prod(layer.shape), words, reason))
    return rows
