"""Tensors in memory or on disk, in the order in which they came."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from detent.errors import DetentError


class TensorStore:
    """Tensors by number, in memory or, with `folder`, in one file each there."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._held: list[Tensor] = []
        self._count = 0
        self._borrowed = False

    def __len__(self) -> int:
        return self._count

    def append(self, tensor: Tensor) -> None:
        """Add a tensor behind the others.

        Raises:
            DetentError: the folder takes no more.
        """
        if self._folder is None:
            self._held.append(tensor)
        else:
            try:
                save_file({"x": tensor.contiguous().cpu()}, self._path(self._count))
            except (OSError, SafetensorError) as error:
                raise DetentError(
                    f"spill: the inputs of blocks can't be written to {self._folder.parent} ({error}); have TMPDIR name"
                    " a folder with more space, or leave spill out"
                ) from None
        self._count += 1

    def get(self, index: int, device: torch.device) -> Tensor:
        if self._folder is None:
            return self._held[index]
        return load_file(self._path(index))["x"].to(device)

    def _path(self, index: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{index}.safetensors"

    def saved(self, folder: Path) -> None:
        """Have all tensors in a new folder too, from which `opened` reads them.

        Raises:
            OSError: the folder takes no more.
        """
        folder.mkdir()
        for index in range(self._count):
            target = folder / f"{index}.safetensors"
            if self._folder is None:
                save_file({"x": self._held[index].contiguous().cpu()}, target)
            else:
                try:
                    os.link(self._path(index), target)
                except OSError:  # another file system, or one without links
                    shutil.copyfile(self._path(index), target)

    @staticmethod
    def opened(folder: Path) -> TensorStore:
        """What was `saved`; `clear` leaves it there."""
        store = TensorStore(folder)
        store._borrowed = True
        store._count = sum(1 for _ in folder.glob("*.safetensors"))
        return store

    def clear(self) -> None:
        if self._folder is not None and not self._borrowed:
            for index in range(self._count):
                self._path(index).unlink(missing_ok=True)
        self._held, self._count = [], 0
