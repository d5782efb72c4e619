"""The device that work runs on."""

from __future__ import annotations

from detent.errors import DetentError


def choose_device(name: str | None) -> str:
    """`name`, or by default CUDA where it is present, else the CPU. Raises DetentError if this machine lacks it."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DetentError(f"--device {name!r}: known are cpu, cuda and cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise DetentError(f"--device {name!r}: known are cpu, cuda and cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DetentError(f"--device {name}: this machine has no CUDA device; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DetentError(f"--device {name}: this machine has CUDA devices 0 to {torch.cuda.device_count() - 1}")
    return name
