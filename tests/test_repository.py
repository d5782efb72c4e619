"""The repository as a whole: nothing machine-specific in it, the pins cover the dependencies, the wheel is complete."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import detent

ROOT = Path(__file__).parents[1]

# Composed, so that this file does not contain what it looks for.
_HOSTS = (
    ("py" + "pi", "org"),
    ("python" + "hosted", "org"),
    ("download.py" + "torch", "org"),
    ("ana" + "conda", "org"),
    ("conda.ana" + "conda", "org"),
    ("registry.npm" + "js", "org"),
    ("crates", "io"),
    ("proxy.go" + "lang", "org"),
)
#: What ties a file to one machine, workplace or package index, as patterns over its bytes.
FORBIDDEN = {
    **{".".join(host): re.escape(".".join(host)) for host in _HOSTS},
    # An absolute path; "network/" and "some/work/dir" are words of other things.
    "an absolute path into " + "/wor" + "k": r"(?<![\w.~-])/wor" + r"k/",
    "a path into " + "/tmp/" + "env": r"/tmp/" + r"env\b",
    "a path out of the repository": r"\.\./sha" + r"red\b",
    "a choice of package index": r"--(extra-)?in" + r"dex-url|--find-li" + r"nks",
}


def git_files() -> list[Path]:
    """Every file that is, or is about to be, under version control."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in run.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def pins(file: str = "constraints.txt") -> dict[str, str]:
    """Package name to the version that a file of constraints pins."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    found = {}
    for line in lines:
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9A-Za-z.]+)", line)
            assert match is not None, f"{file} holds plain pins only (name==version), not {line!r}"
            name = canonicalize_name(match[1])
            assert name not in found, f"{name} is pinned twice"
            found[name] = match[2]
    return found


def forbidden_in(content: bytes) -> list[str]:
    return [what for what, pattern in FORBIDDEN.items() if re.search(pattern.encode(), content)]


def test_nothing_names_a_machine_or_a_package_index() -> None:
    found = {str(path.relative_to(ROOT)): what for path in git_files() if (what := forbidden_in(path.read_bytes()))}
    assert found == {}


@pytest.mark.parametrize(
    "text", ["see /wor" + "k/x", "open('../sha" + "red/data')", "py" + "pi.org", "/tmp/" + "env/bin"]
)
def test_machine_specific_text_is_seen(text: str) -> None:
    assert len(forbidden_in(text.encode())) == 1


@pytest.mark.parametrize("text", ["framework/x", "some/wor" + "k/dir", "/tmp/" + "environment", "py" + "pi"])
def test_harmless_text_passes(text: str) -> None:
    assert forbidden_in(text.encode()) == []


def check_files(*files: Path) -> list[str]:
    command = [sys.executable, str(ROOT / "tools" / "check_files.py"), *map(str, files)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()


def test_files_are_tidy() -> None:
    assert check_files(*git_files()) == []


def test_untidy_files_are_named(tmp_path: Path) -> None:
    untidy = {
        "end": b"a",
        "lines": b"a\n\n",
        "spaces": b"a\nb \n",
        "returns": b"a\r\n",
        "large": b"a" * (1 << 19) + b"\n",
        "conflict": b"<" * 7 + b" HEAD\n",
    }
    for name, content in untidy.items():
        (tmp_path / name).write_bytes(content)
    found = check_files(*(tmp_path / name for name in untidy))
    faults = [
        "doesn't end with one newline",
        "doesn't end with one newline",
        "trailing spaces in line 2",
        "has carriage returns",
        "524289 bytes, and 524288 is the limit",
        "has conflict marks",
    ]
    assert found == [f"{tmp_path / name}: {fault}" for name, fault in zip(untidy, faults, strict=True)]


def test_templates_are_well_formed() -> None:
    """Issue forms, commit hooks and citation are YAML; each hook's tool is in the repository or among the pins."""
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    forms = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in folder.glob("*.yml")}
    assert {"bug", "feature", "new_model"} <= set(forms)
    for name in set(forms) - {"config"}:
        assert {"name", "description", "body"} <= set(forms[name])
        ids = [field["id"] for field in forms[name]["body"] if field["type"] != "markdown"]
        assert ids
        assert len(ids) == len(set(ids))
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    for hook in (hook for repository in hooks["repos"] for hook in repository["hooks"]):
        python, *arguments = hook["entry"].split()
        assert python == ".venv/bin/python"
        assert hook["language"] == "system"
        assert arguments[0] == "-m" and arguments[1] in pins() or (ROOT / arguments[0]).is_file()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["license"] == pyproject()["project"]["license"]


@pytest.mark.parametrize("group", ["", "dev", "docs", "test", "accelerate", "compressed-tensors", "datasets"])
def test_pins_satisfy_the_ranges(group: str) -> None:
    project = pyproject()["project"]
    pinned = pins()
    for line in project["optional-dependencies"][group] if group else project["dependencies"]:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name != project["name"]:
            assert name in pinned, f"{name} has no pin in constraints.txt"
            assert requirement.specifier.contains(pinned[name]), f"the pin of {name} is outside {requirement.specifier}"


def test_lowest_pins_are_the_lower_bounds() -> None:
    """What `make lowest` installs is what pyproject.toml promises."""
    project = pyproject()["project"]
    extras = [project["optional-dependencies"][name] for name in ("accelerate", "datasets")]
    wanted = {}
    for line in [*project["dependencies"], *(line for extra in extras for line in extra)]:
        requirement = Requirement(line)
        (lower,) = [s.version for s in requirement.specifier if s.operator == ">="]
        wanted[canonicalize_name(requirement.name)] = Version(lower)
    assert {name: Version(version) for name, version in pins("constraints-lowest.txt").items()} == wanted


def test_continuous_integration_is_runnable() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")


def test_make_knows_what_the_documents_promise() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):(?!=)", makefile, flags=re.MULTILINE))
    documents = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").rglob("*.md"))
    promised = {t for d in documents for t in re.findall(r"(?:`|^|\$ )make ([a-z-]+)\b", d.read_text("utf-8"), re.M)}
    assert {"demo", "test"} <= targets
    assert promised <= targets


def test_version_is_told_once() -> None:
    """In the package; the build takes it from there, and the change log has an entry for it."""
    project = pyproject()
    assert "version" not in project["project"]
    assert project["project"]["dynamic"] == ["version"]
    told = (ROOT / project["tool"]["hatch"]["version"]["path"]).read_text(encoding="utf-8")
    (version,) = re.findall(r'^__version__ = "(.+)"$', told, flags=re.MULTILINE)
    assert detent.__version__ == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    """Code and data alike: the sample model and the built-in texts must work from an installed package."""
    pytest.importorskip("hatchling", reason="the build backend is not installed (it is among the dev extras)")
    expected = {str(path.relative_to(ROOT / "src")) for path in git_files() if (ROOT / "src") in path.parents}
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob(f"detent-{detent.__version__}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("detent/")}
    assert held == expected
