"""The scripts of `make verify-readers`. Needs none of the readers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

TOOL = Path(__file__).parents[1] / "tools" / "verify_readers"


def load_harness() -> ModuleType:
    spec = importlib.util.spec_from_file_location("harness", TOOL / "harness.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["harness"] = module
    spec.loader.exec_module(module)
    return module


harness = load_harness()


def test_each_script_has_rows_and_its_reader_an_environment() -> None:
    for name in harness.scripts():
        script = harness.load(name)
        assert callable(script.rows), name
        if hasattr(script, "logits"):
            assert (TOOL / f"{name}.txt").is_file(), name


def test_a_difference_of_nan_or_none_has_not_passed() -> None:
    def passed(difference: float | None) -> bool:
        return harness.Row("gptq", "w_int4_per_group_sym", "a reader", difference, limit=0.5).passed

    assert [passed(found) for found in (0.0, 0.5, 0.51, float("nan"), None)] == [True, True, False, False, False]


def test_a_reader_without_an_environment_is_told(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(harness, "ENVIRONMENTS", tmp_path)
    row = harness.compare("some/mlx.py", tmp_path, "mlx", "w_int4_per_group_sym", "mlx-lm", limit=1e-3)
    assert not row.passed
    assert "make verify-readers" in row.note
