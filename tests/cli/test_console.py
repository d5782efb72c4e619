"""Bars for what takes long, and lines where no terminal is."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from detent.cli import console


@pytest.fixture
def screen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    file = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=file, force_terminal=request.param, width=100))
    monkeypatch.setattr(console, "_PATIENCE", 0.0)
    return file


def shown(screen: io.StringIO, text: str) -> bool:
    """Whether `text` appears within ten seconds."""
    for _ in range(1000):
        if text in screen.getvalue():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("screen", [True], indirect=True)
def test_bar_appears_and_goes(screen: io.StringIO) -> None:
    bars = console.Bars()
    bars("Working [hard]", 0, 4)
    assert shown(screen, "Working [hard]"), "even while the first step is under way"
    bars("Working [hard]", 2, 4)
    assert shown(screen, "2/4")
    bars("Working [hard]", 4, 4)
    assert screen.getvalue().endswith("\x1b[2K"), "the line is cleared"
    bars("Next", 0, 2)
    assert shown(screen, "0/2")
    bars.close()


@pytest.mark.parametrize("screen", [True], indirect=True)
def test_short_tasks_show_nothing(screen: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_PATIENCE", 60.0)
    bars = console.Bars()
    for done in range(4):
        bars("Working", done, 3)
    bars("Empty", 0, 0)
    bars.close()
    assert screen.getvalue() == ""


@pytest.mark.parametrize("screen", [False], indirect=True)
def test_a_line_for_long_tasks_without_a_terminal(screen: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 3.0, 10.0, 11.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    bars = console.Bars()
    bars("Long", 0, 5)
    bars("Long", 5, 5)
    bars("Short", 0, 5)
    bars("Short", 5, 5)
    assert screen.getvalue() == "Long: 5 in 3 s\n"
