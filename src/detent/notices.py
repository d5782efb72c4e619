"""Notices to the user about a run: logged, or collected for the report by the code that makes it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_log = logging.getLogger("detent")
_collected: ContextVar[list[str] | None] = ContextVar("detent_notices", default=None)


def notify(text: str) -> None:
    """Tell the user: a warning in the log, and a line in the report that is being made, if one is."""
    collected = _collected.get()
    if collected is None:
        _log.warning("%s", text)
    elif text not in collected:
        collected.append(text)


@contextmanager
def collected_notices() -> Iterator[list[str]]:
    """Inside the block, notices go into the list instead of the log."""
    notices: list[str] = []
    token = _collected.set(notices)
    try:
        yield notices
    finally:
        _collected.reset(token)
