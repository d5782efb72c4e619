"""``detent schemes``: every scheme, what it costs and what can hold it."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from detent.cli import console


def schemes(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List every scheme with its bits per weight and the checkpoint formats that hold it.

    Bits are those of a weight of 4096 x 4096 in a bfloat16 model, scales and zero points included. The grammar has
    more: any width from 2 to 8, any pairing of weights (w_) and activations (a_).
    """
    from detent.report.schemes import scheme_rows

    rows = scheme_rows()
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    from rich.table import Table

    table = Table(title="Schemes", title_justify="left")
    for heading, side in (("scheme", "left"), ("bits/weight", "right"), ("activations", "left"), ("held by", "left")):
        table.add_column(heading, justify=side, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*_cells(row))
    console.show(table)


def _cells(row: dict[str, Any]) -> list[str]:
    names = "\n".join([row["name"], *(f"  = {alias}" for alias in row["aliases"])])
    bits = "-" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.3f}"
    return [names, bits, row["activations"], ", ".join(row["held_by"]) or "-"]
