"""The scales of least squared error: what `SearchedScale` formats encode with."""

from __future__ import annotations

import torch
from torch import Tensor

from detent.formats.elements import Integer
from detent.formats.format import Format
from detent.formats.granularity import to_tiles
from detent.formats.scales import SearchedScale


def search_scales(
    x: Tensor, fmt: Format, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(scale, zero point, outer scale) of `x` as they are stored."""
    rule, element = fmt.scale, fmt.element
    assert isinstance(rule, SearchedScale)
    if rule.tiles:
        raise NotImplementedError
    grid = fmt.granularity.grid(tuple(x.shape))
    tiles = to_tiles(x.detach().to(torch.float32), fmt.granularity, repeat_edge=True)
    low, high = tiles.aminmax(dim=1)
    if fmt.zero_point == "minimum":
        scale = _half((high - low) / element.maximum)
        return scale.reshape(grid), _half(low).reshape(grid), None
    amax = torch.maximum(-low, high)
    if isinstance(element, Integer) and element.bits < 8 and not element.narrow:
        scale = torch.where(high > -low, -amax, amax) / -element.minimum
    else:
        scale = amax / element.maximum
    return _half(scale).reshape(grid), None, None


def _half(x: Tensor) -> Tensor:
    return x.clamp(-65504.0, 65504.0).to(torch.float16)
