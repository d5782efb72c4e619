from __future__ import annotations

from pathlib import Path

import pytest

from cli.runner import Workplace, save_checkpoint, save_text


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
