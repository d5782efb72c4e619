"""What holds for every test: no network, one thread per worker, reproducible examples, no GPU tests without a GPU."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Set before anything imports torch or a Hugging Face library, and inherited by the commands that tests start.
# An empty cache of its own makes the outcome independent of what this machine's user has downloaded.
_HF_HOME = tempfile.mkdtemp(prefix="detent-tests-hf-")
os.environ.update(HF_HOME=_HF_HOME, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# No deadline: no test is about time. Derandomized: a failure is the change's fault, not the day's. `make quick` tries
# few examples, `make fuzz` looks for new ones; what it finds is kept in .hypothesis/ and tried first the next time.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.register_profile("quick", deadline=None, derandomize=True, max_examples=20)
hypothesis.settings.register_profile(
    "fuzz",
    deadline=None,
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "2000")),
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("suite")

#: Cases of one test that `make quick` runs at most.
_CASES = 4


def pytest_unconfigure() -> None:
    shutil.rmtree(_HF_HOME, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _thin_out(items)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _thin_out(items: list[pytest.Item]) -> None:
    """Of a test with many cases (every scheme, every architecture), `make quick` runs an even sample.

    Those of the repository itself, directly below tests/, are quick, and each case is a file of its own.
    """
    families: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.path.parent != Path(__file__).parent:
            families[item.nodeid.partition("[")[0]].append(item)
    for family in families.values():
        step = -(-len(family) // _CASES)
        for index, item in enumerate(family):
            if index % step:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs as on a machine without a network: connections other than to this machine fail at once."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"network access from a test: {address!r}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)
