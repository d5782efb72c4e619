"""The commands, and what becomes of errors: one message and exit code 2 for what a user can mend."""

from __future__ import annotations

import typer

from detent._version import __version__
from detent.cli import console
from detent.cli.arguments import normalize
from detent.cli.evaluate import evaluate
from detent.cli.inspect import inspect
from detent.cli.quantize import quantize
from detent.cli.schemes import schemes
from detent.errors import DetentError
from detent.progress import use_reporter

app = typer.Typer(
    name="detent",
    help="Low-bit models: quantize a checkpoint, measure it, look into it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(show: bool) -> None:
    if show:
        console.out.print(f"detent {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", help="Show the version.", callback=_version, is_eager=True),
) -> None:
    pass


app.command()(quantize)
app.command()(schemes)
app.command()(evaluate)
app.command()(inspect)


def run(arguments: list[str]) -> int:
    """Run a command; returns the exit code. Misspelled flags are the parser library's to explain, with code 2 too."""
    bars = console.Bars()
    try:
        with use_reporter(bars):
            app(normalize(arguments))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except DetentError as error:
        bars.close()
        console.failure(str(error))
        return 2
    finally:
        bars.close()
    return 0
