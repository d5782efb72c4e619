"""What commands that run a model have in common: loading libraries, the device, and how much to evaluate at once."""

from __future__ import annotations

import importlib
import os
import re
from dataclasses import dataclass

from detent.cli.imports import nothing_to_clean_up
from detent.errors import DetentError
from detent.progress import track


@dataclass(frozen=True)
class Invocation:
    """What was typed, and when, by the monotonic clock: a report counts the seconds from there."""

    command: list[str]
    started: float


#: Most of the time before anything happens goes into these.
_LIBRARIES = ("torch", "transformers", "transformers.modeling_utils", "detent.runs.quantize")


def first_process() -> bool:
    """Whether this is the process that shows things, of those that torchrun started."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def load_libraries() -> None:
    """Import what takes long, with progress."""
    with nothing_to_clean_up():
        for name in track(_LIBRARIES, "Loading libraries", len(_LIBRARIES)):
            importlib.import_module(name)


def check_early(
    model_dir: str | None,
    texts: list[str | None],
    output_dir: str | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
) -> list[str]:
    """What can be said before libraries are loaded, which takes seconds: about the model's folder, the texts and the
    output folder. Returns notices for the user. Raises DetentError."""
    from detent.data import check_source
    from detent.external.model_folder import check_folder, local_folder, read_config
    from detent.external.output import check_target, may_be_finished

    source = None if model_dir is None else local_folder(model_dir)
    if source is not None:
        check_folder(source)
        read_config(source)
    for text in texts:
        if text is not None:
            check_source(text)
    if output_dir is None or (resume and may_be_finished(output_dir)):
        return []
    return check_target(output_dir, source=source, overwrite=overwrite)


def choose_device(name: str | None) -> str:
    """`name`, or by default CUDA where it is present, else the CPU. Raises DetentError if this machine lacks it."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise DetentError(f"--device {name!r}: known: cpu, cuda, cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DetentError(f"--device {name}: this machine has no CUDA device; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DetentError(f"--device {name}: this machine has CUDA devices 0 to {torch.cuda.device_count() - 1}")
    return name


def windows(number: int) -> int | None:
    """The number of windows that --num_eval_data asks for, or None for all."""
    if number == 0:
        raise DetentError("--num_eval_data 0: there is nothing to evaluate; pass --skip_evaluation, or -1 for all")
    return None if number == -1 else number


def batch_size_of(text: str | None) -> int | None:
    """What --eval_batch_size asks for: a number, or None for the most that memory allows (``auto``, ``auto:N``)."""
    if text is None or re.fullmatch(r"auto(:[1-9]\d*)?", text):
        return None
    if not re.fullmatch(r"[1-9]\d*", text):
        raise DetentError(f"--eval_batch_size {text!r}: a positive number, auto or auto:N")
    return int(text)
