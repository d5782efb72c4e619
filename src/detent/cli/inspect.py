"""``detent inspect``: every tensor of a checkpoint."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from detent.cli import console


def inspect(
    model_dir: Annotated[str, typer.Argument(help="Checkpoint folder, quantized or not.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List every tensor of a checkpoint: format, bits, size; and the totals. Reads file headers and scales."""
    from detent.report.contents import contents

    found = contents(model_dir)
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return
    from rich.table import Table

    from detent.report import format_bytes

    table = Table(title=f"{model_dir} ({found['quant_method'] or 'not quantized'})", title_justify="left")
    for heading, side in (
        ("tensor", "left"),
        ("shape", "left"),
        ("format", "left"),
        ("bits", "right"),
        ("size", "right"),
    ):
        table.add_column(heading, justify=side, overflow="fold")  # type: ignore[arg-type]
    for tensor in found["tensors"]:
        shape = " x ".join(map(str, tensor["shape"])) or "scalar"
        table.add_row(tensor["name"], shape, tensor["format"], f"{tensor['bits']:.3f}", format_bytes(tensor["bytes"]))
    totals = found["totals"]
    table.add_section()
    table.add_row(
        f"{totals['quantized']} quantized, {totals['kept']} kept",
        f"{totals['parameters']:,} parameters",
        "",
        f"{totals['bits_per_parameter']:.3f}",
        format_bytes(totals["bytes"]),
    )
    console.show(table)
