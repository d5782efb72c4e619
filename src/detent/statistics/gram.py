"""`Gram`: the sum of x x^T over rows x."""

from __future__ import annotations

import torch
from torch import Tensor

from detent.statistics.products import fast_products

#: Channels from which on half of the matrix is computed, and the width of the strips that this is done in.
_WIDE, _STRIP = 1024, 512
#: Rows that are gathered for one product then.
_ROWS = 1024


class Gram:
    """A second moment while rows come in. The matrix is symmetric, so of wide ones the upper half is computed."""

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self._total = torch.zeros(channels, channels, dtype=torch.float32, device=device)
        self._waiting: Tensor | None = None
        self._count = 0

    @staticmethod
    def of(matrix: Tensor) -> Gram:
        """One that begins with a matrix [channels, channels]."""
        gram = Gram(0, matrix.device)
        gram._total = matrix
        return gram

    def add(self, rows: Tensor) -> None:
        """Take in float32 rows [n, channels]; they may change afterwards."""
        channels = rows.shape[1]
        if channels < _WIDE:
            with fast_products(rows.numel() * channels):
                self._total += rows.T @ rows
            return
        if self._waiting is None:
            self._waiting = torch.empty(_ROWS, channels, dtype=torch.float32, device=rows.device)
        for part in rows.split(_ROWS):
            if self._count + len(part) > _ROWS:
                self._take_in()
            self._waiting[self._count : self._count + len(part)] = part
            self._count += len(part)

    def matrix(self) -> Tensor:
        """The sum, float32 [channels, channels]."""
        if self._waiting is not None:
            self._take_in()
            for start in range(0, len(self._total), _STRIP):
                stop = start + _STRIP
                self._total[stop:, start:stop] = self._total[start:stop, stop:].T
            self._waiting = None
        return self._total

    def _take_in(self) -> None:
        assert self._waiting is not None
        rows, channels = self._waiting[: self._count], self._waiting.shape[1]
        with fast_products(rows.numel() * channels):
            for start in range(0, channels, _STRIP):
                stop = start + _STRIP
                self._total[start:stop, start:] += rows[:, start:stop].T @ rows[:, start:]
        self._count = 0
