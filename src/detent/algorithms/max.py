"""`max`: the range of a tensor is what it holds. Nothing is clipped."""

from __future__ import annotations

from torch import Tensor

from detent.algorithms.registry import Handler, register
from detent.config.algorithm import MaxCalibConfig
from detent.formats import Format
from detent.formats.granularity import to_tiles
from detent.formats.kernels import ranges


def weight_range(weight: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """(low, high) of each tile of `weight`, float32 in the shape of the scales."""
    tiles = to_tiles(weight.detach(), fmt.granularity, repeat_edge=True)
    low, high = ranges(tiles, fmt)
    grid = fmt.granularity.grid(tuple(weight.shape))
    return low.reshape(grid), high.reshape(grid)


@register(MaxCalibConfig)
class MaxHandler(Handler[MaxCalibConfig]):
    """Round-to-nearest under the largest magnitude."""

    scope = "weight"
