"""Peak memory of this process."""

from __future__ import annotations

import re
import sys
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


def peak_device_memory_bytes() -> int | None:
    """The most memory that PyTorch has held on all CUDA devices together, in bytes; None where CUDA wasn't used."""
    import torch

    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
