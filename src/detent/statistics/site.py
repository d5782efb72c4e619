"""`SiteStatistics`: what the activations at one site leave behind. A site is one tensor that one or more weights read.

Invariant: merging is associative and commutative (up to float32 rounding, and to which rows a sample holds), so shards
of data can be observed apart.

Second moments are sums of float32 products. Each update adds one matrix product, itself a float32 sum over the tokens
of a batch, to a float32 total: after n updates an entry is off by at most about n * 2^-24 of ``sum |x_i x_j|``, far
below the sampling error of any calibration set. For what the factors lose before that see `statistics.products`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from detent.errors import DetentError
from detent.statistics.gram import Gram
from detent.statistics.products import fast_products
from detent.statistics.sample import Sample


@dataclass
class SiteStatistics:
    """Statistics of the rows x of an activation [tokens, channels].

    Attributes:
        tokens: how many rows were seen.
        low, high: float32 [channels], the smallest and the largest value of each channel, and 0.
        abs_sum: float64 [channels], the sum of magnitudes. So its float32 mean doesn't depend on the order of batches:
            scales that are made of it put the largest weight of a group half way between two codes.
        second_moment: the sum of x x^T, or None where it wasn't asked for.
        cross_moment: float32 [channels, channels], the sum of r x^T with r the same token's row in the float model, or
            None where it wasn't asked for.
        sample: rows drawn from all that were seen, or None where none were asked for.
    """

    tokens: int
    low: Tensor
    high: Tensor
    abs_sum: Tensor
    second_moment: Gram | None = None
    cross_moment: Tensor | None = None
    sample: Sample | None = None
    #: What `moment` made of the sample.
    _estimate: Tensor | None = field(default=None, init=False, repr=False)

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
            zeros(channels).double(),
            Gram(channels, device) if second_moment else None,
            zeros(channels, channels) if cross_moment else None,
            Sample(sample_size, channels, device) if sample_size else None,
        )

    def update(
        self,
        x: Tensor,
        name: str = "activation",
        reference: Tensor | None = None,
        most: int | None = None,
        first: int | None = None,
    ) -> None:
        """Take in an activation.

        Args:
            x: [..., channels].
            name: of the activation, for messages.
            reference: what the float model has in its place, for the cross moment.
            most: rows that go into the moments: evenly spread ones, which count for all.
            first: number of its first row in the data, for the sample; None: the rows so far are all before it.

        Raises:
            DetentError: NaN or infinity in it.
        """
        rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
        if not rows.shape[0]:
            return
        low, high = rows.amin(0), rows.amax(0)
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            raise DetentError(f"{name}: NaN or infinity in an activation during calibration")
        if self.sample is not None:
            self.sample.add(rows, self.tokens if first is None else first)
            self._estimate = None
        self.tokens += rows.shape[0]
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.abs_sum = self.abs_sum + rows.abs().sum(0)
        chosen, weight = _evenly(rows, most)
        if self.second_moment is not None:
            self.second_moment.add(chosen if weight == 1 else chosen * math.sqrt(weight))
        if self.cross_moment is not None:
            other = chosen
            if reference is not None:
                other, _ = _evenly(reference.detach().reshape(rows.shape).to(torch.float32), most)
            with fast_products(chosen.numel() * chosen.shape[1]):
                self.cross_moment += (other.T @ chosen).mul_(weight)

    def merge(self, other: SiteStatistics) -> SiteStatistics:
        """The statistics of what both have seen; moments and samples only where both have them."""

        def added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else a + b

        return SiteStatistics(
            self.tokens + other.tokens,
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
            self.abs_sum + other.abs_sum,
            None
            if self.second_moment is None or other.second_moment is None
            else Gram.of(self.second_moment.matrix() + other.second_moment.matrix()),
            added(self.cross_moment, other.cross_moment),
            None if self.sample is None or other.sample is None else self.sample.merged(other.sample),
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
            second_moment=None if self.second_moment is None else Gram.of(self.second_moment.matrix() * outer),
            cross_moment=None if self.cross_moment is None else self.cross_moment * outer,
            sample=None if self.sample is None else self.sample.scaled(inverse),
        )

    @property
    def amax(self) -> Tensor:
        """The largest magnitude of each channel, float32 [channels]."""
        return torch.maximum(-self.low, self.high)

    @property
    def mean_abs(self) -> Tensor:
        """The mean magnitude of each channel, float32 [channels]."""
        return (self.abs_sum / max(1, self.tokens)).float()

    @property
    def sampled(self) -> str:
        """How many of the tokens `moment` is estimated from, in words; "" for all."""
        if self.second_moment is not None or self.sample is None or self.tokens <= self.sample.size:
            return ""
        return f"{self.sample.size} of {self.tokens} tokens"

    def moment(self) -> Tensor:
        """G = sum x x^T, estimated from the sample where it wasn't collected.

        Raises:
            DetentError: there is no sample either, or no token was seen.
        """
        if self.tokens == 0 or (self.second_moment is None and self.sample is None):
            raise DetentError("no second moment was collected at this site")
        if self.second_moment is not None:
            return self.second_moment.matrix()
        if self._estimate is None:
            rows = self.drawn()
            with fast_products(rows.numel() * rows.shape[1]):
                self._estimate = (rows.T @ rows).mul_(self.tokens / len(rows))
        return self._estimate

    def diagonal(self) -> Tensor:
        """The diagonal of G, float32 [channels]. Raises as `moment` does."""
        if self.second_moment is None and self.sample is not None and self.tokens:
            rows = self.drawn()
            return rows.square().sum(0) * (self.tokens / len(rows))
        return self.moment().diagonal()

    def blocks(self, size: int) -> Tensor:
        """The blocks of G on its diagonal, float32 [groups, size, size]; the last one filled up with zeros. Raises as
        `moment` does."""
        groups = -(-len(self.low) // size)
        pad = groups * size - len(self.low)
        if self.second_moment is None and self.sample is not None and self.tokens:
            rows = torch.nn.functional.pad(self.drawn(), (0, pad)).reshape(-1, groups, size).transpose(0, 1)
            return torch.bmm(rows.transpose(1, 2), rows).mul_(self.tokens / rows.shape[1])
        moment = self.moment()
        moment = torch.nn.functional.pad(moment, (0, pad, 0, pad)) if pad else moment
        return torch.stack([moment[i : i + size, i : i + size] for i in range(0, groups * size, size)])

    def drawn(self) -> Tensor:
        """The rows of the sample, float32 [n, channels]. Raises DetentError where there is none."""
        if self.sample is None or not self.tokens:
            raise DetentError("no sample of tokens was drawn at this site")
        return self.sample.rows()


def _evenly(rows: Tensor, most: int | None) -> tuple[Tensor, float]:
    """At most `most` rows, evenly spaced, and how many rows each counts for."""
    if most is None or len(rows) <= most:
        return rows, 1.0
    at = torch.linspace(0, len(rows) - 1, most, device=rows.device).round().long()
    return rows[at], len(rows) / most
