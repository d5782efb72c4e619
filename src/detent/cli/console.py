"""What the terminal shows while work goes on: notices, and a bar for everything that takes longer than two seconds."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

#: Results go to standard output; whatever accompanies the work goes to standard error.
out = Console()
err = Console(stderr=True)

#: Seconds after which a task gets a bar, or a line where there is no terminal. Anything that ends up longer than two
#: seconds has had one by then.
_PATIENCE = 1.0


def notice(text: str) -> None:
    """A line that the user should read."""
    err.print(f"[yellow]Note:[/yellow] {escape(text)}", highlight=False)


def failure(text: str) -> None:
    """The one message of a command that could not do its work."""
    err.print(f"[bold red]Error:[/bold red] {escape(text)}", highlight=False, soft_wrap=True)


class Bars:
    """A progress reporter: one bar at a time, shown once its task proves long."""

    def __init__(self) -> None:
        self._task = ""
        self._started = 0.0
        self._bar: Progress | None = None
        self._id: Any = None

    def __call__(self, task: str, done: int, total: int) -> None:
        if done == 0 or task != self._task:
            self.close()
            self._task, self._started = task, time.monotonic()
        elapsed = time.monotonic() - self._started
        if done >= total:
            if elapsed > 2 and not err.is_terminal:
                err.print(f"{escape(task)}: {total} in {elapsed:.0f} s", highlight=False)
            self.close()
            return
        if self._bar is None and done and elapsed > _PATIENCE and err.is_terminal:
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
            self._id = self._bar.add_task(task, total=total)
            self._bar.start()
        if self._bar is not None:
            self._bar.update(self._id, completed=done)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._task = None, ""
