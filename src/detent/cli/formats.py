"""``detent formats``: which checkpoint format holds which scheme, and which engine loads it."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from detent.cli import console


def formats(
    scheme: Annotated[str | None, typer.Argument(help="A scheme, to see why a format can't hold it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which checkpoint format holds which scheme; for one scheme, also which engine loads it and what that needs.

    A format is chosen with --model_export and --custom_mode of quantize, or --format of convert.
    """
    from detent.report.formats import format_rows

    rows = format_rows(scheme)
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    console.show(_matrix(rows) if scheme is None else _one(rows[0]))


def _matrix(rows: list[dict[str, Any]]) -> Any:
    """Schemes down, formats across; in each cell the numbers of the engines that load it."""
    from rich.table import Table

    engines = list(
        dict.fromkeys(e for row in rows for held in row["formats"].values() for e in held.get("engines", ()))
    )
    number = {engine: str(n) for n, engine in enumerate(engines, 1)}
    legend = ", ".join(f"{n} {engine}" for engine, n in number.items())
    table = Table(title=f"Formats, and the engines that load them: {legend}", title_justify="left")
    table.add_column("scheme", overflow="fold")
    for name in rows[0]["formats"]:
        table.add_column(name, overflow="fold")
    for row in rows:
        cells = (held.get("engines") for held in row["formats"].values())
        table.add_row(
            row["scheme"],
            *("-" if cell is None else " ".join(number[engine] for engine in cell) or "yes" for cell in cells),
        )
    return table


def _one(row: dict[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"Formats of {row['scheme']}", title_justify="left")
    for heading in ("format", "held", "engines and what they need; or the reason"):
        table.add_column(heading, overflow="fold")
    for name, held in row["formats"].items():
        engines = [f"{engine}: {need}" if need else engine for engine, need in held.get("engines", {}).items()]
        text = Text(held.get("reason") or "\n".join(engines))  # brackets are part of it, not markup
        table.add_row(name, "no" if "reason" in held else "yes", text)
    return table
