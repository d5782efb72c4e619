"""Parts of a report, made from what the engine and the checkpoints know."""

from __future__ import annotations

import math
from typing import Any

from detent.checkpoints import LayerFormats, QuantizedCheckpoint, Source
from detent.data.batches import CalibrationBatches
from detent.plan.plan import Plan
from detent.report.run_report import AlgorithmReport, Calibration, LayerReport, Weights
from detent.runs.write import LayerResult


def planned_weights(source: Source, plan: Plan) -> Weights:
    """What happens to every tensor of a checkpoint that is quantized by `plan`."""
    kept = {name: math.prod(source.info(name).shape) for name in plan.kept}
    layers = (*plan.formats.layers.values(), *plan.carried.formats.values())
    shapes = [f.shape for f in layers if f.weight is not None]
    return Weights(
        quantized=len(shapes),
        kept=len(kept),
        quantized_parameters=sum(map(math.prod, shapes)),
        kept_parameters=sum(kept.values()),
        kept_reasons=plan.kept,
    )


def stored_parts(checkpoint: QuantizedCheckpoint) -> dict[str, Any]:
    """``weights`` and ``layers`` of the report on a checkpoint that is quantized already."""
    layers = checkpoint.formats.layers
    shapes = [f.shape for f in layers.values() if f.weight is not None]
    weights = Weights(
        quantized=len(shapes),
        kept=len(checkpoint.kept),
        quantized_parameters=sum(map(math.prod, shapes)),
        kept_parameters=sum(math.prod(checkpoint.source.info(name).shape) for name in checkpoint.kept),
    )
    return {"weights": weights, "layers": [_layer(name, formats, None) for name, formats in layers.items()]}


def layer_report(name: str, layer: LayerResult) -> LayerReport:
    """One quantized layer of a run."""
    report = _layer(name, layer.formats, layer.relative_error)
    report.algorithms = [AlgorithmReport(**outcome.to_dict()) for outcome in layer.outcomes]
    return report


def calibration_report(batches: CalibrationBatches) -> Calibration:
    """What a run was calibrated on."""
    return Calibration(source=batches.description, samples=len(batches.samples), tokens=batches.tokens)


def _layer(name: str, formats: LayerFormats, error: float | None) -> LayerReport:
    weight = formats.weight
    sides = [f"{side} {fmt}" for side, fmt in (("input", formats.input), ("output", formats.output)) if fmt is not None]
    return LayerReport(
        name=name,
        format="; ".join([str(weight) if weight else "weight as it was", *sides]),
        relative_error=error,
        shape=list(formats.shape),
        bits_per_weight=None if weight is None else weight.bits_per_element(formats.shape),
    )
