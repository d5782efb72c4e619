"""The shape of the package, read from its source: imports run downward only, and what library code never does.

docs/architecture.md explains the layers; this file is what keeps them.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "detent"

#: Top to bottom. A layer imports itself and what stands after it.
LAYERS = (
    "cli",
    "runs",
    "report",
    "evaluation",
    "search",
    "engine",
    "plan",
    "transforms",
    "algorithms",
    "structure",
    "onnx",
    "model",
    "pretrained",
    "checkpoints",
    "nn",
    "config",
    "statistics",
    "data",
    "formats",
    "external",
)
#: Modules beneath the layers: everyone may import them, and they import nothing of the package.
GROUND = ("errors", "progress", "notices", "padding", "threads", "distributed", "_version")
#: The package itself (its public names) and `python -m detent`. Only the command line, on top, may import the former.
ROOT, MAIN = "__init__", "__main__"

#: Stored objects that run code when they are loaded.
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}

#: What `import detent` must leave alone: each costs more than it is worth to someone who only wants the library.
HEAVY_MODULES = {
    "accelerate",
    "compressed_tensors",
    "datasets",
    "gguf",
    "huggingface_hub",
    "jinja2",
    "lm_eval",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "pandas",
    "pyarrow",
    "rich",
    "scipy",
    "tokenizers",
    "transformers",
    "typer",
}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    """The first component of a file's place in the package: a layer, a ground module, or the package itself."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_parts(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """(line, layer or module of the package) for each import of the package, wherever in the file it stands."""
    here = ("detent", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(tree):
        targets: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            # `from detent import formats` imports a layer, `from detent import quantize` the package itself.
            targets = [(*module, alias.name) for alias in node.names] if module == ("detent",) else [module]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            targets = [tuple(name.split(".")) for name in names]
        for target in targets:
            if target[0] == "detent":
                part = target[1] if len(target) > 1 else ROOT
                yield node.lineno, part if part in LAYERS + GROUND else ROOT


def may_import(importer: str, imported: str) -> bool:
    if importer in (ROOT, MAIN) or importer == imported:
        return True
    if importer in GROUND:
        return False
    if imported in GROUND:
        return True
    if imported == ROOT:
        return importer == "cli"
    return LAYERS.index(importer) < LAYERS.index(imported)


def upward_imports(source: str, path: Path) -> list[str]:
    layer = layer_of(path)
    return [
        f"line {line}: {layer} imports {'the package itself' if part == ROOT else part}"
        for line, part in imported_parts(ast.parse(source), path)
        if not may_import(layer, part)
    ]


def catches_everything(handler: ast.ExceptHandler) -> bool:
    """Whether a handler swallows more than it can know about. `except BaseException: ...; raise` only cleans up."""
    if handler.type is None:
        names = {"BaseException"}
    else:
        types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        names = {ast.unparse(kind).removeprefix("builtins.") for kind in types}
    reraises = isinstance(handler.body[-1], ast.Raise) and handler.body[-1].exc is None
    return "Exception" in names or ("BaseException" in names and not (reraises and handler.type is not None))


def unwanted_calls(node: ast.Call, layer: str) -> Iterator[str]:
    name = ast.unparse(node.func)
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}

    def is_true(keyword: str) -> bool:
        value = keywords.get(keyword)
        return isinstance(value, ast.Constant) and value.value is True

    if layer != "cli" and name in ("print", "builtins.print", "sys.stdout.write", "sys.stderr.write"):
        yield f"{name}: only the command line prints; use logging or detent.progress"
    if name == "torch.load" and not is_true("weights_only"):
        yield "torch.load without weights_only=True runs code from the file"
    if name == "torch.save":
        yield "torch.save writes a pickle; use safetensors and JSON"
    if name in ("np.load", "numpy.load") and "allow_pickle" in keywords:
        yield f"{name} with allow_pickle runs code from the file"
    if name in ("suppress", "contextlib.suppress") and {ast.unparse(arg) for arg in node.args} & {
        "Exception",
        "BaseException",
    }:
        yield f"{name}({', '.join(map(ast.unparse, node.args))}) hides every failure"


def unwanted(source: str, layer: str) -> list[str]:
    """What no file of the package may contain, as "line N: what"."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            found += [(node.lineno, message) for message in unwanted_calls(node, layer)]
        elif isinstance(node, ast.ExceptHandler) and catches_everything(node):
            found.append((node.lineno, "a handler for every exception; name those that can be handled"))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = names if isinstance(node, ast.Import) else [node.module or ""]
            found += [(node.lineno, f"{m} runs code from files") for m in modules if m.split(".")[0] in UNSAFE_MODULES]
            if isinstance(node, ast.ImportFrom) and node.module == "torch" and {"load", "save"} & set(names):
                found.append((node.lineno, "write torch.load and torch.save in full, so that this test sees them"))
    return [f"line {line}: {message}" for line, message in sorted(found)]


def test_there_is_something_to_check() -> None:
    assert sources()


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_file_keeps_the_architecture(path: Path) -> None:
    layer = layer_of(path)
    assert layer in (*LAYERS, *GROUND, ROOT, MAIN), (
        f"{layer} is no layer: put the file into one (docs/architecture.md), or give the layer its place in LAYERS"
    )
    source = path.read_text(encoding="utf-8")
    assert upward_imports(source, path) == []
    assert unwanted(source, layer) == []


#: A file has one subject and is read in one go. Tables of numbers may be longer.
LONGEST_FILE = 450


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_file_is_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{lines} lines: which of its subjects deserves a file of its own?"


def repeated_classes(files: dict[str, str]) -> dict[str, list[str]]:
    """{name: files} of top-level classes that several files define. A word has one meaning."""
    homes: dict[str, list[str]] = {}
    for file, source in files.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(file)
    return {name: found for name, found in homes.items() if len(found) > 1}


def test_a_class_name_has_one_meaning() -> None:
    files = {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in sources()}
    assert repeated_classes(files) == {}
    assert repeated_classes({"a.py": "class Site: ...", "b.py": "class Site: ...\nclass X: ..."}) == {
        "Site": ["a.py", "b.py"]
    }


#: Options of the command line are told to Python users too by code below it, so its messages don't name flags.
def flags_named(source: str) -> list[str]:
    """Flags (``--like_this``) in the string literals of code that aren't docstrings."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]
    return [flag for text in texts for flag in re.findall(r"(?<![\w-])--[a-z]\w+", text)]


@pytest.mark.parametrize(
    "path", [p for p in sources() if layer_of(p) not in ("cli", MAIN)], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_messages_below_the_command_line_name_no_flags(path: Path) -> None:
    assert flags_named(path.read_text(encoding="utf-8")) == []


def test_import_leaves_heavy_libraries_alone() -> None:
    """Whatever `import torch` alone brings is not ours to save; the rest must be imported where it is used."""

    def loaded(module: str) -> set[str]:
        code = f"import {module}, sys; print(*sys.modules)"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return set(run.stdout.split())

    assert (loaded("detent") - loaded("torch")) & HEAVY_MODULES == set()


# The checks above, checked: each must see what it is there for, and must let through what is allowed.


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("formats/x.py", "from detent.config import schemes"),
        ("formats/x.py", "from detent import nn"),
        ("formats/x.py", "from ..nn import TensorQuantizer"),
        ("formats/deep/x.py", "from ...nn import TensorQuantizer"),
        ("formats/x.py", "from .. import nn"),
        ("formats/x.py", "import detent.cli.main as m"),
        ("formats/x.py", "def f():\n    from detent.engine import plan"),
        ("formats/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import detent.nn"),
        ("formats/x.py", "import importlib\nimportlib.import_module('detent.nn')"),
        ("nn/x.py", "import detent"),
        ("nn/x.py", "from detent import quantize"),
        ("report/x.py", "from detent.cli import main"),
        ("errors.py", "from detent.formats import Format"),
        ("progress.py", "from .errors import DetentError"),
    ],
)
def test_upward_imports_are_seen(place: str, source: str) -> None:
    assert len(upward_imports(source, PACKAGE / place)) == 1


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("formats/x.py", "import torch\nfrom .elements import Element\nfrom detent.errors import DetentError"),
        ("nn/x.py", "from detent.formats import Format\nfrom ..config import presets\nfrom .. import errors"),
        ("nn/__init__.py", "from .modules import QuantLinear\nfrom . import registry"),
        ("cli/x.py", "import detent\nfrom detent import quantize\nfrom detent.report import summary"),
        ("__init__.py", "from .cli import main\nfrom detent.formats import encode"),
        ("formats/x.py", "import detention\nfrom detentlib.nn import y"),
    ],
)
def test_downward_imports_pass(place: str, source: str) -> None:
    assert upward_imports(source, PACKAGE / place) == []


@pytest.mark.parametrize(
    "source",
    [
        "print('x')",
        "import sys\nsys.stderr.write('x')",
        "import pickle",
        "from cloudpickle import loads",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "from torch import load",
        "torch.save(x, f)",
        "np.load(f, allow_pickle=True)",
        "try:\n    f()\nexcept:\n    raise",
        "try:\n    f()\nexcept Exception:\n    pass",
        "try:\n    f()\nexcept (ValueError, Exception) as e:\n    raise RuntimeError from e",
        "try:\n    f()\nexcept BaseException:\n    pass",
        "with contextlib.suppress(Exception):\n    f()",
    ],
)
def test_unwanted_code_is_seen(source: str) -> None:
    assert len(unwanted(source, "formats")) == 1


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("cli", "print('x')"),
        ("formats", "console.print('x')\nlogger.info('x')"),
        ("checkpoints", "torch.load(f, weights_only=True)\nnp.load(f)"),
        ("checkpoints", "try:\n    f()\nexcept OSError:\n    pass"),
        ("checkpoints", "try:\n    f()\nexcept BaseException:\n    cleanup()\n    raise"),
        ("checkpoints", "with contextlib.suppress(FileNotFoundError):\n    f()"),
    ],
)
def test_allowed_code_passes(layer: str, source: str) -> None:
    assert unwanted(source, layer) == []
