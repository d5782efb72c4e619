"""`Sample`: rows drawn at random from all that were seen, in a bounded amount of memory."""

from __future__ import annotations

import torch
from torch import Tensor


class Sample:
    """The rows whose numbers have the smallest hashes, of all that were added. The rows of any two sites that read
    the same tokens are of the same tokens.

    Memory: at most twice as many rows as are kept in the end.
    """

    def __init__(self, size: int, channels: int, device: torch.device | str = "cpu") -> None:
        """Args: size: the most rows that are kept."""
        self.size = size
        self._rows = [torch.zeros(0, channels, device=device)]
        self._hashes = [torch.zeros(0, dtype=torch.int64)]
        #: Rows that hash to this or more have no place any more.
        self._limit = 1 << 32

    def add(self, rows: Tensor, first: int) -> None:
        """Take in rows [n, channels], numbered from `first` on."""
        hashes = _hashes(first, len(rows))
        fits = hashes < self._limit
        self._hashes.append(hashes[fits])
        self._rows.append(rows[fits.to(rows.device)].to(torch.float32))
        if sum(map(len, self._rows)) > 2 * self.size:
            self._compact()

    def rows(self) -> Tensor:
        """The rows, float32 [at most size, channels], in random order."""
        self._compact()
        return self._rows[0]

    def numbered(self) -> tuple[Tensor, Tensor]:
        """The rows, and their hashes, int64 [n]: all that `of` needs."""
        return self.rows(), self._hashes[0]

    @staticmethod
    def of(size: int, rows: Tensor, hashes: Tensor) -> Sample:
        """One that has these rows."""
        sample = Sample(size, rows.shape[1])
        sample._rows, sample._hashes = [rows], [hashes]
        return sample

    def merged(self, other: Sample) -> Sample:
        """A sample of what both have seen."""
        both = Sample(min(self.size, other.size), self._rows[0].shape[1])
        both._rows, both._hashes = self._rows + other._rows, self._hashes + other._hashes
        both._compact()
        return both

    def scaled(self, factor: Tensor) -> Sample:
        """The same rows multiplied by `factor` [channels]."""
        copy = Sample(self.size, len(factor))
        copy._rows, copy._hashes, copy._limit = [rows * factor for rows in self._rows], self._hashes, self._limit
        return copy

    def _compact(self) -> None:
        if len(self._rows) == 1:
            return
        hashes, rows = torch.cat(self._hashes), torch.cat(self._rows)
        order = hashes.argsort(stable=True)[: self.size]
        self._hashes, self._rows = [hashes[order]], [rows[order.to(rows.device)]]
        if len(order) == self.size:
            self._limit = int(self._hashes[0][-1])


def _hashes(first: int, count: int) -> Tensor:
    """A hash of 32 bits of each number from `first` on, int64 [count]."""
    h = torch.arange(first, first + count, dtype=torch.int64) * 2654435761 & 0xFFFFFFFF
    h = (h ^ (h >> 15)) * 2246822519 & 0xFFFFFFFF
    h = (h ^ (h >> 13)) * 3266489917 & 0xFFFFFFFF
    return h ^ (h >> 16)
