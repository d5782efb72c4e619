"""``detent convert``: a quantized checkpoint in another format."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import typer

from detent.cli import console
from detent.cli.startup import check_early, load_libraries


def convert(
    context: typer.Context,
    model_dir: Annotated[str, typer.Argument(help="Quantized checkpoint: a folder or hub name.")],
    output_dir: Annotated[str, typer.Argument(help="Folder to write.")],
    format: Annotated[str, typer.Option("--format", help="Format to write: see `detent formats`.")],
    custom_mode: Annotated[
        str | None, typer.Option("--custom_mode", help="With --format hf_format: the layout of another tool.")
    ] = None,
    pack_method: Annotated[
        Literal["reorder", "order"], typer.Option("--pack_method", help="Order of 4-bit codes in the layout of Quark.")
    ] = "reorder",
    gguf_type: Annotated[str | None, typer.Option("--gguf_type", help="Type or mixture of types of GGUF.")] = None,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Round weights once more where the format lacks their values.")
    ] = False,
    quant_scheme: Annotated[
        str | None, typer.Option("--quant_scheme", help="How to store weights (default: as they are).")
    ] = None,
    group_size: Annotated[int | None, typer.Option("--group_size", help="Group size of --quant_scheme.", min=1)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that Detent wrote.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust_remote_code", help="Let Python code that comes with the checkpoint run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write a quantized checkpoint in another format, with the same values, and compare the two.

    Where the other format has no grid with these values, nothing is written and the reason is told, unless
    --requantize says to round them once more.
    """
    notices = check_early(model_dir, [], output_dir, overwrite=overwrite)
    load_libraries()
    from detent.report import summary_table
    from detent.runs.convert import convert_checkpoint
    from detent.runs.options import ExportOptions
    from detent.runs.run import Run

    run = Run(context.obj.command, console.notice, started=context.obj.started)
    for notice in notices:
        run.notify(notice)
    report = convert_checkpoint(
        model_dir,
        output_dir,
        ExportOptions(format, custom_mode, pack_method, gguf_type),
        requantize=requantize,
        scheme=quant_scheme,
        group_size=group_size,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        run=run,
    )
    if as_json:
        sys.stdout.write(report.to_json())
    else:
        console.show(summary_table(report))
