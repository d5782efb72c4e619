"""The documentation runs: every Python block, every marked command, every link and every name that a page promises.

A page's blocks run in order and share one namespace and one empty working directory.

- ```` ```python ```` blocks are executed; ``<!-- no-test -->`` on the line before a fence leaves that block out.
- ```` ```console ```` blocks are executed where ``<!-- run -->`` stands on the line before: the lines that start with
  ``$ detent``, continued by a backslash as in a shell. Their exit code must be 0; the output shown is not compared.
"""

from __future__ import annotations

import importlib
import re
import shlex
import sys
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]

_FENCE = re.compile(
    r"^(?P<indent>[ ]*)(?P<fence>`{3,})(?P<language>\w*)[^\n`]*\n(?P<code>.*?)^(?P=indent)(?P=fence)[ ]*$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    #: Of the first line of code, in its page, counted from 1.
    line: int
    #: The comment before the fence, without its brackets: "no-test", "run" or "".
    mark: str


def blocks(page: str) -> Iterator[Block]:
    for match in _FENCE.finditer(page):
        before = page[: match.start()].rstrip().rpartition("\n")[2].strip()
        comment = re.fullmatch(r"<!--\s*(.*?)\s*-->", before)
        yield Block(
            language=match["language"],
            code=textwrap.dedent(match["code"]),
            line=page.count("\n", 0, match.start("code")) + 1,
            mark=comment[1] if comment else "",
        )


def commands(block: Block) -> list[list[str]]:
    """The commands of a console block, each as its arguments; an error for one that is not Detent's."""
    joined = block.code.replace("\\\n", " ")
    found = [shlex.split(line[2:], comments=True) for line in joined.splitlines() if line.startswith("$ ")]
    assert found, f"line {block.line}: a block marked 'run' without a command"
    for command in found:
        assert command[0] == "detent", f"line {block.line}: only `detent` commands can be run, not {command[0]!r}"
    return found


def run_python(block: Block, page: Path, module: types.ModuleType) -> None:
    # Padded with empty lines, so that a traceback tells the line of the page.
    exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), module.__dict__)


def run_command(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from detent.cli import main

    monkeypatch.setattr(sys, "argv", command)
    try:
        code = main()
    except SystemExit as exit_:
        code = exit_.code
    assert code in (None, 0), f"`{shlex.join(command)}` ended with {code!r}"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def runs_commands(page: Path) -> bool:
    return any(block.mark == "run" for block in blocks(page.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if runs_commands(page) else (), id=name_of(page)) for page in PAGES],
)
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("documentation_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language == "python" and block.mark != "no-test":
            run_python(block, page, module)
        elif block.language == "console" and block.mark == "run":
            for command in commands(block):
                run_command(command, monkeypatch)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^()\s#]+)[^()\s]*\)", text)
    missing = [t for t in targets if not re.match(r"\w+:", t) and not (page.parent / t).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_api_names_exist(page: Path) -> None:
    """What a page renders from docstrings (``::: detent.formats``) can be imported."""
    for name in re.findall(r"^::: ([\w.]+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name


def test_every_layer_has_an_api_page() -> None:
    """Each layer that lists public names; the command line is not for import."""
    layers = (ROOT / "src" / "detent").glob("*/__init__.py")
    packages = [path.parent for path in layers if "__all__" in path.read_text("utf-8")]
    names = {".".join(package.relative_to(ROOT / "src").parts) for package in packages} - {"detent.cli"}
    rendered = {name for page in PAGES for name in re.findall(r"^::: ([\w.]+)", page.read_text("utf-8"), re.MULTILINE)}
    assert names - rendered == set(), "add docs/api/NAME.md with a line `::: detent.NAME`, and its line in mkdocs.yml"


def test_every_page_has_its_place_in_the_site() -> None:
    def leaves(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, dict | list):
            for child in entry.values() if isinstance(entry, dict) else entry:
                yield from leaves(child)

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = [path.relative_to(DOCS).as_posix() for path in sorted(DOCS.rglob("*.md"))]
    assert sorted(leaves(site["nav"])) == pages, "the `nav` of mkdocs.yml lists every page of docs/ once"


def test_blocks_are_found_with_their_marks() -> None:
    page = (
        "Text\n\n```python\na = 1\n```\n\n<!-- no-test -->\n```python\nb\n```\n\n"
        "- item\n\n    ```python title='x'\n    c = 3\n    if c:\n        c = 4\n    ```\n\n"
        "<!-- run -->\n\n```console\n$ detent quantize \\\n    --json\noutput\n```\n\n"
        "````text\n```python\nno\n```\n````\n"
    )
    found = list(blocks(page))
    assert [(b.language, b.mark, b.line) for b in found] == [
        ("python", "", 4),
        ("python", "no-test", 9),
        ("python", "", 15),
        ("console", "run", 23),
        ("text", "", 29),
    ]
    assert found[2].code == "c = 3\nif c:\n    c = 4\n"
    assert commands(found[3]) == [["detent", "quantize", "--json"]]


def test_a_command_of_someone_else_is_refused() -> None:
    with pytest.raises(AssertionError, match="only `detent` commands"):
        commands(Block("console", "$ rm -rf x\n", 1, "run"))
