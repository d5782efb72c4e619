"""Writing a GGUF file into a checkpoint folder, tensor by tensor.

What comes before the data is known last: which tensors there are. So room is left for it, and what isn't needed of that
is filled by a value of its own (`PADDING_KEY`); each tensor goes straight to its place.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from detent.checkpoints.folder import CheckpointWriter, clear_errors, digest
from detent.checkpoints.gguf.blocks import BLOCKS
from detent.checkpoints.gguf.container import gguf_package
from detent.checkpoints.gguf.names import TensorNames, stacks
from detent.errors import DetentError

FILE_NAME = "model.gguf"
PADDING_KEY = "detent.padding"
_ALIGNMENT = 32
#: Bytes that a tensor takes in the header besides its name.
_ABOUT_A_TENSOR = 64


@dataclass
class _Slot:
    """A tensor of the file: its type, its shape, and where its data begins; how many matrices are still to come."""

    kind: str
    shape: tuple[int, ...]
    start: int
    missing: set[int]


class GgufWriter(CheckpointWriter):
    """Streams tensors into one GGUF file; the other files of the folder are those of `CheckpointWriter`.

    Args:
        out_dir: the folder to appear.
        names: of the tensors. tensors: those that may come, by their names in the checkpoint.
        kinds: {tensor of the checkpoint: type} of those that come as bytes of codes.
        arch, values: what the file says before its data.
        extra: further tensors, by their names in the file.
        options: as for `CheckpointWriter`.
    """

    def __init__(
        self,
        out_dir: str | Path,
        *,
        names: TensorNames,
        tensors: list[str],
        kinds: dict[str, str],
        arch: str,
        values: dict[str, Any],
        extra: dict[str, Tensor],
        **options: Any,
    ) -> None:
        super().__init__(out_dir, **options)
        self._names, self._kinds, self._arch, self._values = names, kinds, arch, values
        self._stacks = stacks(names, tensors) | dict.fromkeys(extra, 0)
        self._slots: dict[str, _Slot] = {}
        self._file: BinaryIO | None = None
        self._end = self._written = 0
        with clear_errors(self.out_dir):
            room = sum(len(name) + _ABOUT_A_TENSOR for name in self._stacks)
            self._start = _aligned(len(self._header(0)) + room)
        for name, tensor in extra.items():
            self._put(name, None, tensor, "F32")

    def __exit__(self, *error: Any) -> None:
        if self._file is not None:
            self._file.close()
        super().__exit__(*error)

    @property
    def nbytes(self) -> int:
        return self._written

    def add(self, name: str, tensor: Tensor) -> None:
        """Write `tensor`, from any device, to its places; codes are bytes [rows, n]."""
        if name in self.digests:
            raise DetentError(f"tensor {name!r} was added to the checkpoint twice")
        tensor = tensor.detach().cpu()
        self.digests[name] = digest(tensor)
        kind = self._kinds.get(name)
        for place, part in zip(self._names.places(name), self._names.cut(name, tensor), strict=True):
            value = place.to_file(part, coded=kind is not None)
            self._put(place.name, place.expert, value, kind or _plain(name, value))

    def _put(self, name: str, expert: int | None, value: Tensor, kind: str) -> None:
        shape = tuple(value.shape)
        if BLOCKS[kind].format is not None:
            shape = (*shape[:-1], shape[-1] // BLOCKS[kind].bytes * BLOCKS[kind].elements)
        count = 0 if expert is None else self._stacks[name]
        shape = () if count and shape == (1,) else shape
        whole = (count, *shape) if count else shape
        slot = self._slots.get(name)
        if slot is None:
            slot = self._slots[name] = _Slot(kind, whole, self._end, set(range(max(1, count))))
            self._end = _aligned(self._end + value.nbytes * max(1, count))
        if (slot.kind, slot.shape) != (kind, whole) or (expert or 0) not in slot.missing:
            raise DetentError(
                f"{name} is made of matrices of different types or shapes ({slot.kind} {slot.shape}, {kind} {whole}),"
                " or of one that comes twice; a GGUF file holds all experts of a block in one tensor of one type"
            )
        slot.missing.discard(expert or 0)
        with clear_errors(self.out_dir):
            if self._file is None:
                self._file = (self._temporary / FILE_NAME).open("wb")
            self._file.seek(self._start + slot.start + value.nbytes * (expert or 0))
            value.contiguous().view(torch.uint8).numpy().tofile(self._file)
        self._written += value.nbytes

    def _write_shard(self, metadata: dict[str, str]) -> None:
        for name, slot in self._slots.items():
            if slot.missing:
                raise DetentError(f"{name}: {len(slot.missing)} of its {slot.shape[0]} matrices were not written")
        assert self._file is not None
        header = self._header(self._start - len(self._header(0)))
        with clear_errors(self.out_dir):
            self._file.truncate(self._start + self._end)
            self._file.seek(0)
            self._file.write(header)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def _name_shards(self) -> None:
        """The only file has its name."""

    def _header(self, padding: int) -> bytes:
        """What comes before the data, with so many bytes of padding."""
        gguf = gguf_package()
        writer = gguf.GGUFWriter(None, self._arch)
        for key, value in self._values.items():
            if not (isinstance(value, (list, bytes)) and not len(value)):
                writer.add_key_value(key, value, _type_of(value))
        writer.add_key_value(PADDING_KEY, " " * padding, gguf.GGUFValueType.STRING)
        for name, slot in self._slots.items():
            block = BLOCKS[slot.kind]
            nbytes = math.prod(slot.shape) // block.elements * block.bytes
            kind = gguf.GGMLQuantizationType(block.ggml_type)
            writer.add_tensor_info(name, slot.shape, np.dtype(np.float16), nbytes, raw_dtype=kind)
        path = self._temporary / "header"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.read_bytes()
        path.unlink()
        return header


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _type_of(value: Any) -> Any:
    gguf = gguf_package()
    if isinstance(value, int) and not isinstance(value, bool):
        return gguf.GGUFValueType.UINT32 if value >= 0 else gguf.GGUFValueType.INT32
    return gguf.GGUFValueType.ARRAY if isinstance(value, bytes) else gguf.GGUFValueType.get_type(value)


def _plain(name: str, value: Tensor) -> str:
    kind = str(value.dtype).removeprefix("torch.")
    known = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    if kind not in known:
        raise DetentError(f"{name} holds {kind} numbers, for which GGUF has no type that llama.cpp reads")
    return known[kind]
