"""Peak memory of this process."""

from __future__ import annotations

import re
import sys
import threading
from contextlib import suppress
from pathlib import Path


def peak_memory_bytes() -> int:
    """The most main memory that this process has held at one time, in bytes; 0 where the system doesn't report it."""
    status = Path("/proc/self/status")
    if status.exists():
        # Preferred to getrusage, whose figure a process on Linux inherits from the larger one that started it.
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
        if found:
            return int(found.group(1)) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, the others KiB.


def available_memory_bytes() -> int | None:
    """The memory that is left for this process, of the machine or its control group; None where that isn't known."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text("ascii"), re.MULTILINE)
    except OSError:
        return None
    left = [int(found.group(1)) * 1024] if found else []
    group = Path("/sys/fs/cgroup")
    older = group / "memory"
    for most, used in (
        (group / "memory.max", group / "memory.current"),
        (older / "memory.limit_in_bytes", older / "memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # no control group of this version, or one without a limit
            left.append(int(most.read_text()) - int(used.read_text()))
    return max(0, min(left)) if left else None


class AnonymousMemory(threading.Thread):
    """Watches how much memory this process holds that no file backs: what counts against a limit.

    ::

        with AnonymousMemory() as memory:
            work()
        memory.peak

    Attributes:
        peak: the most seen so far, in bytes; 0 where the system doesn't report it.
    """

    SECONDS = 0.02

    def __init__(self) -> None:
        super().__init__(daemon=True, name="detent-memory")
        self.peak = 0
        self._over = threading.Event()

    def __enter__(self) -> AnonymousMemory:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def run(self) -> None:
        while not self._over.wait(self.SECONDS):
            self.look()

    def look(self) -> int:
        """Look now; returns the peak."""
        try:
            status = Path("/proc/self/status").read_text("ascii", "replace")
        except OSError:
            self._over.set()
            return self.peak
        found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
        self.peak = max(self.peak, int(found.group(1)) * 1024 if found else 0)
        return self.peak


def peak_device_memory_bytes() -> int | None:
    """The most memory that PyTorch has held on all CUDA devices together, in bytes; None where CUDA wasn't used."""
    import torch

    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
