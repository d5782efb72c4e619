"""The command line: parse, call, show. It has no logic of its own."""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> None:
    """Run ``detent`` with the arguments of the process, or with `arguments`; exits."""
    from detent.cli.imports import nothing_to_clean_up

    with nothing_to_clean_up():
        from detent.cli.app import run

    sys.exit(run(sys.argv[1:] if arguments is None else arguments))
