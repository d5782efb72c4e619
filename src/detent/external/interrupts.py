"""Ctrl-C and SIGTERM: both end a command the same way, cleaning up, and neither can fall into the middle of a swap."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
#: The exit code of a command that SIGTERM has ended: 128 and its number, as shells have it.
TERMINATED = 128 + signal.SIGTERM

#: Whether `one_command` is in charge.
_command = False


def in_main_thread() -> bool:
    """Only there may handlers be set."""
    return threading.current_thread() is threading.main_thread()


@contextmanager
def one_command() -> Iterator[None]:
    """Make SIGTERM raise ``SystemExit(143)`` in the main thread, so that everything on the stack cleans up. Signals
    that arrive after `shielded` has put a result in place are ignored to the end of the command."""
    global _command
    if not in_main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    signal.signal(signal.SIGTERM, _terminate)
    _command = True
    try:
        yield
    finally:
        _command = False
        for number, handler in before.items():
            signal.signal(number, handler)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(TERMINATED)


@contextmanager
def shielded() -> Iterator[None]:
    """Signals wait until the block is over; then, where a command is in charge, they come too late and are ignored."""
    if not in_main_thread():
        yield
        return
    arrived: list[int] = []
    before: dict[int, Any] = {
        number: signal.signal(number, lambda number, frame: arrived.append(number)) for number in _SIGNALS
    }
    try:
        yield
    except BaseException:
        _restore(before)
        raise
    if _command:
        return  # the handlers stay, and do nothing, until the command ends
    _restore(before)
    for number in arrived:
        signal.raise_signal(number)


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
