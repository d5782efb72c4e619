"""The commands, and how errors end them: one message and exit code 2 for what a user can fix."""

from __future__ import annotations

import logging
import sys
import time

import typer

from detent._version import __version__
from detent.cli import console
from detent.cli.arguments import normalize
from detent.cli.convert import convert
from detent.cli.evaluate import evaluate
from detent.cli.formats import formats
from detent.cli.inspect import inspect
from detent.cli.plan import plan
from detent.cli.quantize import epilog, quantize
from detent.cli.schemes import schemes
from detent.cli.startup import Invocation, first_process
from detent.cli.structure import structure
from detent.errors import DetentError
from detent.external.interrupts import one_command
from detent.progress import use_reporter

app = typer.Typer(
    name="detent",
    help="Low-bit models: quantize a checkpoint, measure it, look into it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Plain help: the boxes cut long flag names short.
    rich_markup_mode=None,
)


def _version(show: bool) -> None:
    if show:
        console.show(f"detent {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", help="Show the version.", callback=_version, is_eager=True),
) -> None:
    pass


app.command(epilog=epilog())(quantize)
app.command(epilog=epilog())(plan)
app.command()(schemes)
app.command()(formats)
app.command()(evaluate)
app.command()(convert)
app.command()(inspect)
app.command()(structure)


def run(arguments: list[str]) -> int:
    """Run a command; returns the exit code.

    The parser library reports misspelled flags, with code 2 too, and Ctrl-C, with code 130. SIGTERM cleans up like
    Ctrl-C, with code 143.
    """
    started = time.monotonic()
    # What library code warns of is already in the plan, and the report words it for the user.
    logger = logging.getLogger("detent")
    level = logger.level
    logger.setLevel(logging.ERROR)
    bars = console.Bars()
    try:
        with one_command(), use_reporter(bars if first_process() else None):
            app(normalize(arguments), prog_name="detent", obj=Invocation(["detent", *arguments], started))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except DetentError as error:
        bars.close()
        if not error.told:
            console.failure(str(error))
        return 2
    except (MemoryError, RuntimeError) as error:
        bars.close()
        if not _out_of_memory(error):
            raise
        console.failure(
            f"out of memory ({str(error).splitlines()[0] if str(error) else 'main memory'}). Smaller --batch_size,"
            " --eval_batch_size or --seq_len, --data_type bfloat16, or --device cpu may help"
        )
        return 2
    finally:
        bars.close()
        logger.setLevel(level)
    return 0


def _out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, in Python, on a device, or in PyTorch's allocator on the CPU, which has no class."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return "can't allocate memory" in str(error)
