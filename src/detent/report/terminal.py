"""The report of a run as something that `rich` can show. Nothing here prints."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from detent.report.run_report import RunReport, SearchReport

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

#: How many of the layers with the largest errors the summary lists.
WORST_LAYERS = 5
#: How many names the summary gives for one reason why weights were kept.
NAMES_PER_REASON = 3


def summary_table(report: RunReport) -> RenderableType:
    """What a run did: weights, size, perplexity, worst layers, time, memory and notices."""
    from rich.console import Group
    from rich.text import Text

    # Titles are lines of their own: a table's own title is wrapped at the width of the table.
    parts: list[RenderableType] = [Text("Summary", style="bold"), _facts(report)]
    if report.search is not None:
        heading = f"\nChosen formats ({report.search.effective_bits:.3f} bits per weight)"
        parts += [Text(heading, style="bold"), _choices(report.search)]
    if any(layer.relative_error is not None for layer in report.layers):
        title = Text(f"\nLargest relative errors (of {len(report.layers)} weights)", style="bold")
        parts += [title, _worst_layers(report)]
    # Text, not markup: names and paths may hold square brackets.
    parts.extend(Text(f"Notice: {notice}", style="yellow") for notice in report.notices)
    return Group(*parts)


def format_bytes(count: int) -> str:
    """A size with two decimals and a binary unit, such as ``"1.25 MiB"``."""
    if count < 1024:
        return f"{count} B"
    units = ("KiB", "MiB", "GiB", "TiB", "PiB")
    power = min(len(units), max(1, math.floor(math.log(count, 1024))))
    return f"{count / 1024**power:.2f} {units[power - 1]}"


def format_seconds(seconds: float) -> str:
    """A length of time, such as ``"3.2 s"``, ``"4 min 5 s"`` or ``"2 h 10 min"``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def plain_table(show_header: bool) -> Table:
    from rich.table import Table

    return Table(box=None, padding=(0, 2, 0, 0), show_header=show_header)


def _facts(report: RunReport) -> Table:
    from rich.text import Text

    table = plain_table(show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _fact_rows(report):
        table.add_row(name, Text(value))
    return table


def _fact_rows(report: RunReport) -> list[tuple[str, str]]:
    rows = [("model", report.model), ("scheme", report.scheme or "none (nothing quantized)")]
    rows += _weight_rows(report)
    rows.append(("size", _size(report)))
    if report.perplexity is not None:
        rows.append(("perplexity", _perplexity(report)))
    if report.evaluation is not None:
        rows.append(("measured on", f"{report.evaluation.dataset}: {_evaluation_details(report)}"))
    if report.calibration is not None:
        used = report.calibration
        rows.append(("calibrated on", f"{used.source}: {used.samples:,} samples, {used.tokens:,} tokens"))
    rows += _algorithm_rows(report)
    rows.append(("time", format_seconds(report.seconds)))
    memory = format_bytes(report.peak_memory_bytes)
    if report.peak_anonymous_memory_bytes:
        memory += f", of which {format_bytes(report.peak_anonymous_memory_bytes)} at once without files' pages"
    if report.peak_device_memory_bytes is not None:
        memory += f", on the device {format_bytes(report.peak_device_memory_bytes)}"
    rows.append(("peak memory", memory))
    if report.verification is not None:
        found = report.verification
        of = (
            ""
            if found.blocks is None
            else f" of the first {'block' if found.blocks == 1 else f'{found.blocks} blocks'}"
        )
        rows.append(
            ("read back", f"{found.tensors:,} tensors as written; logits{of} differ by {found.logit_difference:.1g}")
        )
    if report.output_dir is not None:
        layout = "" if report.layout is None else f" ({report.layout})"
        rows.append(("written to", f"{report.output_dir}{layout}"))
    return rows


def _algorithm_rows(report: RunReport) -> list[tuple[str, str]]:
    """For each algorithm: its objective relative to that of round-to-nearest, over all weights."""
    done: dict[tuple[str, str], list[float]] = {}
    for layer in report.layers:
        for one in layer.algorithms:
            done.setdefault((one.algorithm, one.objective), []).append(one.after / one.before if one.before else 1.0)
    rows = []
    for (name, objective), ratios in done.items():
        mean = math.exp(sum(math.log(max(ratio, 1e-12)) for ratio in ratios) / len(ratios))
        weights = "1 weight" if len(ratios) == 1 else f"{len(ratios)} weights"
        rows.append((name, f"{objective}: {mean:.3f} of round-to-nearest's (geometric mean of {weights})"))
    return rows


def _weight_rows(report: RunReport) -> list[tuple[str, str]]:
    weights = report.weights
    if not weights.quantized and not weights.kept:
        return []  # a float model that was only measured
    rows = [("weights quantized", f"{weights.quantized:,} ({weights.quantized_parameters:,} parameters)")]
    by_reason: dict[str, list[str]] = {}
    for name, reason in weights.kept_reasons.items():
        by_reason.setdefault(reason, []).append(name)
    lines = [f"{weights.kept:,} ({weights.kept_parameters:,} parameters)"]
    for reason, names in by_reason.items():
        more = f", and {len(names) - NAMES_PER_REASON} more" if len(names) > NAMES_PER_REASON else ""
        lines.append(f"  {reason}: {', '.join(names[:NAMES_PER_REASON])}{more}")
    return [*rows, ("weights kept", "\n".join(lines))]


def _size(report: RunReport) -> str:
    before, after = report.size_bytes.before, report.size_bytes.after
    if after is None:
        return format_bytes(before)
    ratio = f" ({before / after:.2f} times smaller)" if 0 < after <= before else ""
    return f"{format_bytes(before)} -> {format_bytes(after)}{ratio}"


def _perplexity(report: RunReport) -> str:
    measured = report.perplexity
    if measured is None or (measured.before is None and measured.after is None):
        return "not measured"
    if measured.before is None or measured.after is None:
        value = measured.before if measured.after is None else measured.after
        return f"{value:.3f} {'before' if measured.after is None else 'after'}"
    change = (measured.after / measured.before - 1) * 100
    return f"{measured.before:.3f} -> {measured.after:.3f} ({change:+.1f}%)"


def _evaluation_details(report: RunReport) -> str:
    used = report.evaluation
    return "" if used is None else f"{used.tokens:,} tokens in windows of {used.window:,}"


def _choices(search: SearchReport) -> Table:
    from rich.text import Text

    table = plain_table(show_header=True)
    table.add_column("layers", overflow="fold")
    table.add_column("format", overflow="fold")
    table.add_column("bits", justify="right", no_wrap=True)
    table.add_column("loss", justify="right", no_wrap=True)
    for row in search.choices:
        more = f" and {len(row.layers) - NAMES_PER_REASON} more" if len(row.layers) > NAMES_PER_REASON else ""
        names = Text(", ".join(row.layers[:NAMES_PER_REASON]) + more)
        table.add_row(names, Text(row.format), f"{row.bits:.3f}", f"{row.score:.2g}")
    return table


def _worst_layers(report: RunReport) -> Table:
    from rich.text import Text

    table = plain_table(show_header=True)
    table.add_column("weight", overflow="fold")
    table.add_column("format", overflow="fold")
    table.add_column("error", justify="right", no_wrap=True)
    measured = [(layer.relative_error, layer) for layer in report.layers if layer.relative_error is not None]
    for error, layer in sorted(measured, key=lambda pair: -pair[0])[:WORST_LAYERS]:
        table.add_row(Text(layer.name), Text(layer.format), f"{error * 100:.3g}%")
    return table
