"""Something to do once another library has been imported, without importing it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def once_imported(library: str, then: str) -> None:
    """Import the module `then` as soon as the module `library` has been imported, or now if it has been."""
    if library in sys.modules:
        importlib.import_module(then)
    else:
        sys.meta_path.insert(0, _Awaited(library, then))


class _Awaited:
    """Finds one module, once, as the finders after it do, and has another imported when it has run."""

    def __init__(self, library: str, then: str) -> None:
        self.library, self.then = library, then

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.library or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        loader = None if spec is None else spec.loader
        if loader is None:
            return spec
        execute = loader.exec_module

        def execute_and_go_on(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(self.then)

        loader.exec_module = execute_and_go_on  # type: ignore[method-assign]
        return spec
