"""One of several processes: runs commands, the same in all of them, and writes what came of each.

python one_process.py CASES.json RESULTS.json, with the environment that torchrun gives (RANK, WORLD_SIZE, MASTER_ADDR).
A case: {"arguments": [...], "port": N, "counted": whether its work is counted, "fails": null, or the number of a
process and the function that fails there, as a module and a name}.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from detent.cli.app import run
from detent.errors import DetentError


class Work(TorchDispatchMode):
    """Counts what matrix products multiply, by PyTorch's own formulas (its counter takes several times as long)."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def fails(*_: Any) -> None:
    raise DetentError("the disk is full")


def outcome(case: dict[str, Any]) -> dict[str, Any]:
    os.environ["MASTER_PORT"] = str(case["port"])
    out, err = io.StringIO(), io.StringIO()
    counter = Work()
    with pytest.MonkeyPatch.context() as patch, counter if case["counted"] else contextlib.nullcontext():
        if case["fails"] and os.environ["RANK"] == str(case["fails"][0]):
            patch.setattr(importlib.import_module(case["fails"][1]), case["fails"][2], fails)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(case["arguments"])
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "work": counter.total}


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    Path(sys.argv[2]).write_text(json.dumps([outcome(case) for case in cases]), "utf-8")
