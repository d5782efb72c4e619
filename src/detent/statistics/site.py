"""`SiteStatistics`: what the activations at one site leave behind. A site is one tensor that one or more weights read.

Invariant: merging is associative and commutative (up to float32 rounding), so shards of data can be observed apart.

Second moments are sums of float32 products. Each update adds one matrix product, itself a float32 sum over the tokens
of a batch, to a float32 total: after n updates an entry is off by at most about n * 2^-24 of ``sum |x_i x_j|``, far
below the sampling error of any calibration set. What the factors may lose before that is said in `statistics.products`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detent.errors import DetentError
from detent.statistics.products import fast_products


@dataclass
class SiteStatistics:
    """Statistics of the rows x of an activation [tokens, channels].

    Attributes:
        tokens: how many rows were seen.
        low, high: float32 [channels], the smallest and the largest value of each channel, and 0.
        abs_sum: float32 [channels], the sum of magnitudes.
        second_moment: float32 [channels, channels], the sum of x x^T, or None where it wasn't asked for.
        cross_moment: float32 [channels, channels], the sum of r x^T with r the same token's row in the float model, or
            None where it wasn't asked for.
        sample: float32 [at most sample_size, channels], rows drawn from all that were seen. Which ones depends on their
            values alone, so that the draw doesn't depend on the order.
        sample_size: the most rows in `sample`.
    """

    tokens: int
    low: Tensor
    high: Tensor
    abs_sum: Tensor
    second_moment: Tensor | None = None
    cross_moment: Tensor | None = None
    sample: Tensor | None = None
    sample_size: int = 0

    @staticmethod
    def empty(
        channels: int,
        *,
        second_moment: bool,
        cross_moment: bool = False,
        sample_size: int = 0,
        device: torch.device | str = "cpu",
    ) -> SiteStatistics:
        """Nothing seen yet."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float32, device=device)

        return SiteStatistics(
            0,
            zeros(channels),
            zeros(channels),
            zeros(channels),
            zeros(channels, channels) if second_moment else None,
            zeros(channels, channels) if cross_moment else None,
            zeros(0, channels) if sample_size else None,
            sample_size,
        )

    def update(self, x: Tensor, name: str = "activation", reference: Tensor | None = None) -> None:
        """Take in an activation [..., channels], and, for the cross moment, what the float model has in its place.

        Raises:
            DetentError: NaN or infinity in it.
        """
        rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
        if not rows.shape[0]:
            return
        low, high = rows.amin(0), rows.amax(0)
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            raise DetentError(f"{name}: NaN or infinity in an activation during calibration")
        self.tokens += rows.shape[0]
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.abs_sum = self.abs_sum + rows.abs().sum(0)
        with fast_products(rows.numel() * rows.shape[1]):
            if self.second_moment is not None:
                self.second_moment += rows.T @ rows
            if self.cross_moment is not None:
                other = rows if reference is None else reference.detach().reshape(rows.shape).to(torch.float32)
                self.cross_moment += other.T @ rows
        if self.sample is not None:
            self.sample = _drawn(torch.cat([self.sample, rows]), self.sample_size)

    def merge(self, other: SiteStatistics) -> SiteStatistics:
        """The statistics of what both have seen; moments and samples only where both have them."""

        def added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else a + b

        size = min(self.sample_size, other.sample_size)
        both = self.sample is not None and other.sample is not None
        return SiteStatistics(
            self.tokens + other.tokens,
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
            self.abs_sum + other.abs_sum,
            added(self.second_moment, other.second_moment),
            added(self.cross_moment, other.cross_moment),
            _drawn(torch.cat([self.sample, other.sample]), size) if both else None,  # type: ignore[list-item]
            size if both else 0,
        )

    def divided(self, scale: Tensor) -> SiteStatistics:
        """The statistics of x / scale, for positive float32 [channels]."""
        inverse = 1 / scale
        outer = inverse[:, None] * inverse
        return replace(
            self,
            low=self.low * inverse,
            high=self.high * inverse,
            abs_sum=self.abs_sum * inverse,
            second_moment=None if self.second_moment is None else self.second_moment * outer,
            cross_moment=None if self.cross_moment is None else self.cross_moment * outer,
            sample=None if self.sample is None else self.sample * inverse,
        )

    @property
    def amax(self) -> Tensor:
        """The largest magnitude of each channel, float32 [channels]."""
        return torch.maximum(-self.low, self.high)

    @property
    def mean_abs(self) -> Tensor:
        """The mean magnitude of each channel, float32 [channels]."""
        return self.abs_sum / max(1, self.tokens)

    def moment(self) -> Tensor:
        """G = sum x x^T. Raises DetentError where it wasn't collected or no token was seen."""
        if self.second_moment is None or self.tokens == 0:
            raise DetentError("no second moment was collected at this site")
        return self.second_moment


def _drawn(rows: Tensor, size: int) -> Tensor:
    """The `size` rows with the smallest hashes of their values."""
    if rows.shape[0] <= size:
        return rows
    generator = torch.Generator().manual_seed(0)
    direction = torch.rand(rows.shape[1], generator=generator).to(rows.device)
    bits = (rows @ direction).view(torch.int32).long()
    hashes = (bits * 2654435761) & 0xFFFFFFFF
    hashes = (hashes ^ (hashes >> 15)) * 2246822519 & 0xFFFFFFFF
    return rows[hashes.argsort(stable=True)[:size]]
