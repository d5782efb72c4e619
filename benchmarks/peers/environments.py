"""A virtual environment for each peer, made once: their pins contradict each other's and Detent's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

#: The same torch for everybody.
TORCH = "torch==2.13.0"
INSTALL_SECONDS = 3600
ROOT = Path(__file__).parents[2]


class InstallError(Exception):
    """The environment could not be made; the message is pip's last word."""


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "detent-peers"


def interpreter(folder: Path, name: str, packages: Sequence[str], log: Path) -> Path:
    """The interpreter of the environment called `name`, which is made if it is not there or has other packages.

    pip is used as it is configured: where packages come from is no business of this script.

    Raises:
        InstallError: pip failed.
    """
    python = folder / name / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp, wanted = folder / name / "installed.txt", "\n".join([TORCH, *packages])
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print(f"installing {', '.join(packages)} ...", file=sys.stderr, flush=True)
    start = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder / name)], check=True)
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", TORCH, *packages]
    with log.open("w", encoding="utf-8") as output:
        try:
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=INSTALL_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise InstallError(f"not installed within {INSTALL_SECONDS} s") from error
    if done.returncode != 0:
        raise InstallError(reason(log.read_text(encoding="utf-8", errors="replace")))
    stamp.write_text(wanted, encoding="utf-8")
    print(f"installed {name} in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return python


def reason(log: str) -> str:
    """Why pip gave up, in one line: the requirement that cannot be met, if it says so."""
    lines = [line.strip() for line in log.splitlines()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    conflicts = [line for line in lines if re.fullmatch(r"\S+ \S+ depends on .*", line)]
    return "; ".join(errors[:1] + conflicts[:1]) or "pip failed without an error message"


def environment(threads: int, *paths: Path) -> dict[str, str]:
    """For a runner's process: nobody looks anything up in a network, and everybody gets as many threads."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(path) for path in (ROOT, *paths)),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }
