"""A plan as something to read: what gets which format and why, what stays and why, and what it will cost."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pydantic import BaseModel

from detent.report.run_report import Weights
from detent.report.terminal import format_bytes, format_seconds, plain_table

if TYPE_CHECKING:
    from rich.console import RenderableType


class PlannedTensors(BaseModel):
    """Tensors of one name, numbers aside, that share a fate.

    Attributes:
        name: with ``*`` in place of numbers. shapes: of all of them, each once.
        count, parameters: of all of them.
        format: what they get; None where they stay.
        reason: why.
    """

    name: str
    count: int
    shapes: list[list[int]]
    parameters: int
    format: str | None
    reason: str


class PlanReport(BaseModel):
    """What ``detent plan`` tells.

    Attributes:
        model, scheme: their names. layout: of the checkpoint. layout_notes: why not another.
        way: how weights pass through memory.
        weights: the sums. tensors: in the order of the files.
        before_bytes, output_bytes: of all tensors. bits_per_weight: of the quantized ones.
        peak_memory_bytes: upper estimate. states_bytes: hidden states, of which any share can go to disk.
        disk_bytes: that the run needs at the same time.
        estimated_seconds: rough.
        planning_seconds: that making the plan took.
        notices: what the user should know.
    """

    model: str
    scheme: str
    algorithms: list[str]
    layout: str
    layout_notes: list[str]
    way: str
    weights: Weights
    tensors: list[PlannedTensors]
    before_bytes: int
    output_bytes: int
    bits_per_weight: float
    peak_memory_bytes: int
    states_bytes: int
    disk_bytes: int
    estimated_seconds: float
    planning_seconds: float
    notices: list[str]


def grouped(rows: list[tuple[str, tuple[int, ...], int, str | None, str]]) -> list[PlannedTensors]:
    """(name, shape, parameters, format, reason) of every tensor, those of one kind together."""
    found: dict[tuple[str, str | None, str], PlannedTensors] = {}
    for name, shape, parameters, fmt, reason in rows:
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
        key = (pattern, fmt, reason)
        if key not in found:
            found[key] = PlannedTensors(name=pattern, count=0, shapes=[], parameters=0, format=fmt, reason=reason)
        one = found[key]
        one.count += 1
        one.parameters += parameters
        if list(shape) not in one.shapes:
            one.shapes.append(list(shape))
    return list(found.values())


def plan_table(report: PlanReport) -> RenderableType:
    """The plan for a terminal."""
    from rich.console import Group
    from rich.text import Text

    table = plain_table(show_header=True)
    for title in ("tensors", "count", "shape", "format", "why"):
        table.add_column(title, overflow="fold", justify="right" if title == "count" else "left")
    for row in report.tensors:
        shapes = ", ".join("x".join(map(str, shape)) for shape in row.shapes[:3]) + ", ..." * (len(row.shapes) > 3)
        table.add_row(Text(row.name), f"{row.count:,}", shapes, Text(row.format or "stays"), Text(row.reason))
    facts = plain_table(show_header=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    w = report.weights
    share = w.quantized_parameters / max(1, w.quantized_parameters + w.kept_parameters)
    memory = f"{format_bytes(report.peak_memory_bytes)} ({report.way})"
    if report.states_bytes:
        memory += f", and {format_bytes(report.states_bytes)} of hidden states, in memory or on disk"
    for name, value in [
        ("model", report.model),
        ("scheme", ", ".join([report.scheme, *report.algorithms])),
        ("quantized", f"{w.quantized:,} weights, {w.quantized_parameters:,} parameters ({share:.1%} of all)"),
        ("kept", f"{w.kept:,} tensors, {w.kept_parameters:,} parameters"),
        ("bits per weight", f"{report.bits_per_weight:.3f} of the quantized weights, scales included"),
        ("size", f"{format_bytes(report.before_bytes)} -> {format_bytes(report.output_bytes)}"),
        ("checkpoint format", report.layout + "".join(f"\n  {note}" for note in report.layout_notes)),
        ("peak memory", f"at most about {memory}"),
        ("disk", format_bytes(report.disk_bytes)),
        ("time", f"roughly {format_seconds(report.estimated_seconds)} on this machine"),
        ("planned in", format_seconds(report.planning_seconds)),
    ]:
        facts.add_row(name, Text(value))
    notices = [Text(f"Notice: {notice}", style="yellow") for notice in report.notices]
    return Group(table, Text("\nPlan", style="bold"), facts, *notices)
