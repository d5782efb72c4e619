"""``detent plan``: what ``detent quantize`` would do with the same flags."""

from __future__ import annotations

import inspect
import sys
from typing import Annotated, Any

import typer

from detent.cli import console
from detent.cli.asked import asked_for
from detent.cli.quantize import check_flags, quantize
from detent.cli.startup import check_early, load_libraries
from detent.errors import DetentError


def plan(context: typer.Context, **_: Any) -> None:
    """Show what quantize would do with the same flags, in seconds and without reading a weight.

    What gets which format and why, what stays and why, the size of the result, and what the run would need.
    """
    typed = check_flags(context)
    for name in ("skip_quantization", "model_reload"):
        if name in typed:
            raise DetentError(f"--{name} quantizes nothing, so there is nothing to plan")
    notices = check_early(context.params["model_dir"], [context.params["dataset"]])
    load_libraries()
    from detent.report.plan import plan_table
    from detent.runs.plan import plan_checkpoint
    from detent.runs.run import Run

    asked = asked_for(context)
    run = Run(context.obj.command, console.notice, started=context.obj.started)
    for notice in notices:
        run.notify(notice)
    report = plan_checkpoint(
        asked.model, asked.scheme, algorithms=asked.algorithms, calibration=asked.calibration, run=run
    )
    if context.params["as_json"]:
        sys.stdout.write(report.model_dump_json(indent=2) + "\n")
        return
    console.show(plan_table(report))


_AS_JSON = inspect.Parameter(
    "as_json",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--json", help="Print JSON.")],
)
# The parser library asks a command for its parameters: here they are those of `quantize`, and one more.
plan.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [*inspect.signature(quantize, eval_str=True).parameters.values(), _AS_JSON]
)
