"""The layers that read one activation, what data left behind there, and what statistics algorithms want."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from detent.algorithms.layer import Layer
from detent.statistics import SiteStatistics

#: Samples for estimating second moments: `SAMPLE_ELEMENTS` numbers (8 MiB), at least `LEAST_ROWS` rows.
SAMPLE_ELEMENTS, LEAST_ROWS = 1 << 21, 1024


@dataclass(frozen=True)
class Wanted:
    """The statistics that a run needs beyond channel ranges.

    Attributes:
        second_moment, cross_moment: see `SiteStatistics`.
        sample_size: rows of a sample.
        estimate: whether second moments are to be estimated from the sample.
        references: whether the float model runs too.
    """

    second_moment: bool = False
    cross_moment: bool = False
    sample_size: int = 0
    estimate: bool = False
    references: bool = False

    def __or__(self, other: Wanted) -> Wanted:
        return Wanted(
            self.second_moment or other.second_moment,
            self.cross_moment or other.cross_moment,
            max(self.sample_size, other.sample_size),
            self.estimate or other.estimate,
            self.references or other.references,
        )

    def rows(self, channels: int) -> int:
        """How many rows a sample has where each has `channels` channels."""
        return max(self.sample_size, LEAST_ROWS, SAMPLE_ELEMENTS // channels) if self.estimate else self.sample_size


@dataclass
class ObservedSite:
    """Attributes: layers: that read the activation, in call order. statistics: of its rows, transformed as the layers'
    input quantizers do, before rounding."""

    layers: list[Layer]
    statistics: SiteStatistics
    #: The last tensor seen, to recognise it when another layer reads it too.
    _last: Tensor | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """What messages call the site."""
        return f"the input of {self.layers[0].name}"

    @property
    def device(self) -> torch.device:
        return self.layers[0].module.weight.device

    def divide(self, scale: Tensor) -> None:
        """Note that the activation is divided by `scale` [channels] from now on."""
        self.statistics = self.statistics.divided(self.layers[0].columns(scale))
