"""Signals while libraries are imported, which takes seconds. Imports nothing heavy itself."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from detent.external.interrupts import in_main_thread


@contextmanager
def nothing_to_clean_up() -> Iterator[None]:
    """A signal ends the process at once, without a traceback: for imports, where an exception may turn into another
    one, or leave a module half made."""
    if not in_main_thread():
        yield
        return
    before = {number: signal.signal(number, _leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # a progress bar hides the cursor
    sys.stderr.write("\nAborted!\n" if number == signal.SIGINT else "\nTerminated!\n")
    sys.stderr.flush()
    os._exit(128 + number)
