"""Importances of weights' columns, in the files of llama.cpp ("importance matrix").

For each matrix the mean square of each of its inputs, as data has shown them: the diagonal of the second moment, over
the number of tokens. Two forms are read: GGUF files with tensors ``NAME.in_sum2`` and ``NAME.counts``, and the older
binary form. Names are those that weights have in a GGUF file.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from detent.checkpoints.gguf.container import MAGIC, gguf_package, read_header
from detent.errors import DetentError
from detent.external.files import unreadable

_SUMS, _COUNTS = ".in_sum2", ".counts"


def read_imatrix(path: Path) -> dict[str, Tensor]:
    """{weight: float32 [columns], or [experts, columns] of a stack of matrices}.

    Raises:
        DetentError: the file can't be read, is truncated, or holds numbers that are no mean squares.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
        found = _from_gguf(path) if start == MAGIC else _from_binary(path, path.read_bytes())
    except OSError as error:
        raise unreadable(path, error) from error
    if not found:
        raise DetentError(f"{path} holds no importances")
    for name, values in found.items():
        if not bool((torch.isfinite(values) & (values >= 0)).all()):
            raise DetentError(f"{path}: the importances of {name} are not finite, or negative")
    return found


def write_imatrix(path: Path, sums: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
    """Write importances as llama.cpp's GGUF form has them.

    Args:
        path: of the file to write.
        sums: {weight: float32 [columns], the sum of the squares of its inputs}.
        counts: {weight: over how many tokens}.
    """
    gguf = gguf_package()
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()  # it has no architecture
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["detent"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", max(counts.values(), default=1))
    for name, values in sums.items():
        writer.add_tensor(name + _SUMS, values.detach().float().reshape(1, -1).cpu().numpy())
        writer.add_tensor(name + _COUNTS, np.full((1, 1), counts[name], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _from_gguf(path: Path) -> dict[str, Tensor]:
    entries = read_header(path).tensors
    data = np.memmap(path, mode="r")

    def values(name: str) -> Tensor:
        entry = entries.get(name)
        if entry is None or entry.kind != "F32":
            raise DetentError(f"{path}: {name} is missing, or doesn't hold float32 numbers")
        raw = np.array(data[entry.start : entry.start + entry.nbytes])
        return torch.from_numpy(raw).view(torch.float32).reshape(entry.shape)

    found = {}
    for name in (name.removesuffix(_SUMS) for name in entries if name.endswith(_SUMS)):
        sums, counts = values(name + _SUMS), values(name + _COUNTS)
        if counts.numel() not in (1, sums.reshape(-1, sums.shape[-1]).shape[0]):
            raise DetentError(f"{path}: {name} has {counts.numel()} counts for {tuple(sums.shape)} sums")
        found[name] = _means(sums, counts.reshape(-1, 1))
    return found


def _means(sums: Tensor, counts: Tensor) -> Tensor:
    rows = sums.reshape(-1, sums.shape[-1])
    means = rows / counts.clamp_min(1.0)
    return means[0] if len(means) == 1 else means


def _from_binary(path: Path, data: bytes) -> dict[str, Tensor]:
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        if count < 0 or at + count > len(data):
            raise DetentError(
                f"{path} is no file of importances, or truncated: a length in it ends past its {len(data)} bytes"
            )
        at += count
        return data[at - count : at]

    def number() -> int:
        return int(struct.unpack("<i", take(4))[0])

    found = {}
    for _ in range(number()):
        name = take(number()).decode(errors="replace")
        calls, count = number(), number()
        values = torch.frombuffer(bytearray(take(4 * count)), dtype=torch.float32) if count > 0 else torch.empty(0)
        found[name] = values / max(1, calls)
    return found
