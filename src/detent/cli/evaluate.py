"""``detent evaluate``: the perplexity of a checkpoint, quantized or not."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from detent.cli import console


def evaluate(
    model_dir: Annotated[
        str | None, typer.Argument(help="Checkpoint folder; without it, the built-in sample model.")
    ] = None,
    eval_dataset: Annotated[
        str | None, typer.Option("--eval_dataset", "--dataset", help="A text file, a hub data set, or 'builtin'.")
    ] = None,
    num_eval_data: Annotated[int, typer.Option("--num_eval_data", help="Windows to evaluate; -1: all.", min=-1)] = -1,
    eval_batch_size: Annotated[int, typer.Option("--eval_batch_size", help="Windows that run at once.", min=1)] = 1,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda or cuda:N [cuda where present].")] = None,
    data_type: Annotated[str, typer.Option("--data_type", help="auto, float16, bfloat16 or float32.")] = "auto",
    model_attn_implementation: Annotated[
        str, typer.Option("--model_attn_implementation", help="eager, sdpa or flash_attention_2.")
    ] = "eager",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust_remote_code", help="Let Python code that comes with the checkpoint run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Measure the perplexity of a checkpoint, quantized or not."""
    from detent.cli.devices import choose_device
    from detent.engine.models import DTYPES
    from detent.errors import DetentError
    from detent.report import summary_table
    from detent.report.runs import EvaluationOptions, ModelOptions, Run, evaluate_checkpoint

    if data_type not in ("auto", *DTYPES):
        raise DetentError(f"--data_type {data_type}: auto, {', '.join(DTYPES)}")
    model = ModelOptions(model_dir, data_type, choose_device(device), model_attn_implementation, trust_remote_code)
    options = EvaluationOptions(False, eval_dataset, None if num_eval_data == -1 else num_eval_data, eval_batch_size)
    report = evaluate_checkpoint(model, options, run=Run(["detent", *sys.argv[1:]], console.notice))
    if as_json:
        sys.stdout.write(report.to_json())
    else:
        console.out.print(summary_table(report))
