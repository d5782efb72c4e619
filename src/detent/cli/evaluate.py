"""``detent evaluate``: the perplexity of a checkpoint, quantized or not."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import typer

from detent.cli import console
from detent.cli.startup import batch_size_of, check_early, choose_device, load_libraries, windows


def evaluate(
    context: typer.Context,
    model_dir: Annotated[
        str | None, typer.Argument(help="Checkpoint folder or hub name; without it, the built-in sample model.")
    ] = None,
    eval_dataset: Annotated[
        str | None, typer.Option("--eval_dataset", "--dataset", help="A text file, a hub data set, or 'builtin'.")
    ] = None,
    num_eval_data: Annotated[int, typer.Option("--num_eval_data", help="Windows to evaluate; -1: all.", min=-1)] = -1,
    eval_batch_size: Annotated[
        str | None,
        typer.Option("--eval_batch_size", help="Windows evaluated at once, or auto (default: 8, if memory allows)."),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda or cuda:N (default: cuda where there is one).")
    ] = None,
    data_type: Annotated[
        Literal["auto", "float16", "bfloat16", "float32"], typer.Option("--data_type", help="Type to load weights in.")
    ] = "auto",
    model_attn_implementation: Annotated[
        Literal["eager", "sdpa", "flash_attention_2"],
        typer.Option("--model_attn_implementation", help="Attention implementation."),
    ] = "eager",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust_remote_code", help="Let Python code that comes with the checkpoint run.")
    ] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Measure the perplexity of a checkpoint, quantized or not."""
    check_early(model_dir, [eval_dataset])
    load_libraries()
    from detent.report import summary_table
    from detent.runs.evaluate import evaluate_checkpoint
    from detent.runs.options import EvaluationOptions, ModelOptions
    from detent.runs.run import Run

    model = ModelOptions(
        model_dir, data_type, choose_device(device), model_attn_implementation, trust_remote_code, revision
    )
    options = EvaluationOptions(False, eval_dataset, windows(num_eval_data), batch_size_of(eval_batch_size))
    report = evaluate_checkpoint(
        model, options, run=Run(context.obj.command, console.notice, started=context.obj.started)
    )
    if as_json:
        sys.stdout.write(report.to_json())
    else:
        console.show(summary_table(report))
