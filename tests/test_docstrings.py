"""Every example in a docstring of the package runs and shows what it says."""

from __future__ import annotations

import doctest
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import detent

PACKAGE = Path(__file__).parents[1] / "src" / "detent"


def examples() -> Iterator[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    for path in sorted(PACKAGE.rglob("*.py")):
        if ">>> " not in path.read_text(encoding="utf-8"):
            continue
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
        yield from (test for test in finder.find(module) if test.examples)


@pytest.mark.parametrize("example", list(examples()), ids=lambda test: test.name)
def test_example(example: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, with the names that the example imports and those of its module."""
    monkeypatch.chdir(tmp_path)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    failed, _ = runner.run(example, out=report.append)
    assert not failed, "".join(report)


def test_every_public_name_has_an_example() -> None:
    public = {name: getattr(detent, name) for name in detent.__all__}
    documented = {n: o for n, o in public.items() if inspect.isclass(o) or inspect.isroutine(o)}
    assert len(documented) > 40
    assert not [name for name, thing in documented.items() if ">>> " not in (inspect.getdoc(thing) or "")]
