"""Whether other programs read what Detent writes, and compute the same: `make verify-readers`.

    python tools/verify_readers [NAME ...]

Runs each script of this folder, or those named, and prints a table of format, scheme, reader and the largest
difference between logits. Exit code 1 says that a reader didn't run, or computed something else. `harness.py` says what
a script is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import harness
from rich.console import Console
from rich.table import Table

# Some scripts have the names of packages (gguf, mlx), which must stay importable.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != harness.HERE.resolve()]


def main() -> int:
    parser = argparse.ArgumentParser(description="Check that other programs read what Detent writes.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of: {', '.join(harness.scripts())}")
    names = parser.parse_args().names or harness.scripts()
    if unknown := [name for name in names if name not in harness.scripts()]:
        parser.error(f"unknown reader {unknown[0]!r}; known: {', '.join(harness.scripts())}")
    console, failures = Console(width=160), []
    table = Table("format", "scheme", "reader", "largest difference", "at most", "note", title="What readers compute")
    for name in names:
        for row in harness.load(name).rows():
            found = "none" if row.difference is None else f"{row.difference:.2e}"
            console.print(f"{name}: {row.format}, {row.scheme}: {found}", markup=False)
            table.add_row(row.format, row.scheme, row.reader, found, f"{row.limit:.0e}", row.note)
            if not row.passed:
                failures.append(f"{name}: {row.format}, {row.scheme}, {row.reader}: {found} {row.note}")
    console.print(table)
    for failure in failures:
        console.print(f"FAILED {failure}", markup=False)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
