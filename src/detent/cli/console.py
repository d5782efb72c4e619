"""What the terminal shows during a run: notices, and a bar for everything that takes longer than two seconds."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

#: Notices and progress go to standard error; results go to standard output.
err = Console(stderr=True)

#: Seconds after which a task gets a bar, so that anything longer than two seconds has one by then.
_PATIENCE = 1.0
#: Columns of output that does not go to a terminal: wide enough for names to stay whole, so that it can be searched.
_WIDTH_OF_FILES = 200


def show(result: RenderableType) -> None:
    """Print a result."""
    Console(width=None if sys.stdout.isatty() else _WIDTH_OF_FILES).print(result)


def notice(text: str) -> None:
    """A line that the user should read."""
    err.print(f"[yellow]Note:[/yellow] {escape(text)}", highlight=False, soft_wrap=True)


def failure(text: str) -> None:
    """The one message of a command that could not do its work."""
    err.print(f"[bold red]Error:[/bold red] {escape(text)}", highlight=False, soft_wrap=True)


class Bars:
    """A progress reporter: one bar at a time, shown once its task proves long.

    Where standard error is not a terminal, a long task leaves a line at its end instead.
    """

    def __init__(self) -> None:
        self._task, self._done, self._total = "", 0, 0
        self._started = 0.0
        self._bar: Progress | None = None
        self._id: Any = None
        # The bar appears by itself, even while a first long step is under way.
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()

    def __call__(self, task: str, done: int, total: int) -> None:
        with self._lock:
            if done == 0 or task != self._task:
                self._end()
                self._begin(task)
            self._done, self._total = done, total
            if done < total:
                if self._bar is not None:
                    self._bar.update(self._id, completed=done, total=total)
                return
            elapsed = time.monotonic() - self._started
            if elapsed > 2 and self._task and not err.is_terminal:
                err.print(f"{escape(task)}: {total} in {elapsed:.0f} s", highlight=False, soft_wrap=True)
            self._end()

    def close(self) -> None:
        """Take the bar away."""
        with self._lock:
            self._end()

    def _begin(self, task: str) -> None:
        self._task, self._started = task, time.monotonic()
        if err.is_terminal:
            self._timer = threading.Timer(_PATIENCE, self._appear, [task, self._started])
            self._timer.daemon = True
            self._timer.start()

    def _appear(self, task: str, started: float) -> None:
        with self._lock:
            if (self._task, self._started) != (task, started):
                return  # that task has ended
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=err,
                transient=True,
            )
            self._id = self._bar.add_task(escape(task), total=self._total, completed=self._done)
            # What was done before the bar appeared counts for the time left.
            self._bar.tasks[0].start_time = started
            self._bar.start()

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._timer, self._task = None, None, ""
