from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from cli.runner import Workplace, save_checkpoint, save_text


@pytest.fixture(scope="session", autouse=True)
def _one_parser() -> Iterator[None]:
    """The parser is built once, and not for each of the hundreds of commands (0.05 s)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Made once; nobody changes it."""
    folder = tmp_path_factory.mktemp("shared")
    return Workplace(
        save_checkpoint(folder / "model"),
        save_text(folder / "calibration.json"),
        save_text(folder / "evaluation.json", seed=1),
        folder / "unused",
    )


@pytest.fixture
def place(shared: Workplace, tmp_path: Path) -> Workplace:
    return Workplace(shared.model, shared.calibration, shared.evaluation, tmp_path / "out")
