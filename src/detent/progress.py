"""Progress of long work, through one callback.

Library code calls :func:`track` around a loop; it never prints. Code that shows progress (the command line, a
notebook) installs a reporter with :func:`use_reporter`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")

#: ``reporter(task, done, total)``: called when a task starts (done=0), after each step, and when it ends (done=total).
Reporter = Callable[[str, int, int], None]

_reporter: ContextVar[Reporter | None] = ContextVar("detent_progress_reporter", default=None)


def report(task: str, done: int, total: int) -> None:
    """Tell the installed reporter, if any, that `done` of `total` steps of `task` are finished."""
    reporter = _reporter.get()
    if reporter is not None:
        reporter(task, done, total)


def track(items: Iterable[T], task: str, total: int) -> Iterator[T]:
    """Yield every item of `items`, reporting each as a finished step of `task` once the caller asks for the next."""
    report(task, 0, total)
    for done, item in enumerate(items, start=1):
        yield item
        report(task, done, total)


@contextmanager
def use_reporter(reporter: Reporter | None) -> Iterator[None]:
    """Send all progress inside the ``with`` block to `reporter` (``None`` silences it).

    Example:
        >>> import detent
        >>> from detent.progress import track
        >>> with detent.use_reporter(lambda task, done, total: print(f"{task}: {done} of {total}")):
        ...     for _ in track("ab", "Spelling", 2):
        ...         pass
        Spelling: 0 of 2
        Spelling: 1 of 2
        Spelling: 2 of 2
    """
    token = _reporter.set(reporter)
    try:
        yield
    finally:
        _reporter.reset(token)
