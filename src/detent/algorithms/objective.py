"""The objective that weight algorithms share, and the scales of a weight spread over its elements.

``loss(W, W^) = tr((W - W^) G (W - W^)^T)`` with ``G = sum x x^T``: the squared error of the layer's outputs summed over
the calibration tokens, exactly, computed from G alone in ``out * in^2`` operations however many tokens there were.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from detent.errors import DetentError
from detent.formats import Format, PowerOfTwoScale, QTensor, Scales, decode, encode, float32
from detent.formats.granularity import from_tiles, to_tiles
from detent.formats.kernels import simulate_static
from detent.formats.qtensor import _tile_scale
from detent.formats.tiles import TileScale, multiplier
from detent.statistics.products import fast_products


def output_error(difference: Tensor, moment: Tensor) -> Tensor:
    """tr(D G D^T) of D [out, in] and G [in, in], a float64 scalar."""
    return rows_error(difference, moment).sum()


def rows_error(difference: Tensor, moment: Tensor, *, exact: bool = False) -> Tensor:
    """The same for each output row, float64 [out], never negative. `exact`: without `fast_products`."""
    d = difference.to(torch.float32)
    with nullcontext() if exact else fast_products(d.numel() * d.shape[1]):
        product = d @ moment
    return (product * d).sum(1, dtype=torch.float64).clamp_min(0.0)


def check_elementwise(fmt: Format, algorithm: str) -> None:
    """Refuse formats in which a code depends on its neighbours' codes.

    Raises:
        DetentError: micro-exponents or a base format.
    """
    micro = isinstance(fmt.scale, PowerOfTwoScale) and fmt.scale.micro
    if micro or fmt.base is not None:
        raise DetentError(f"{algorithm}: {fmt} chooses codes together, not one by one; use 'max' or 'mse'")


def spread(fmt: Format, scales: Scales, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """(unit, zero point) of every element of a weight of this shape: float32, the latter None without one.

    ``element.nearest(w / unit + zero_point)`` is then the code of w, and ``(code - zero_point) * unit`` its value.
    """
    tile_scale: TileScale = _tile_scale(fmt, scales)
    tiles = to_tiles(torch.empty(shape, device=scales.scale.device), fmt.granularity)

    def expand(values: Tensor) -> Tensor:
        return from_tiles(values.expand(tiles.shape), fmt.granularity, shape)

    unit = expand(multiplier(fmt, tile_scale).float())
    zero_point = None if tile_scale.zero_point is None else expand(tile_scale.zero_point)
    return unit, zero_point


def nearest_values(weight: Tensor, fmt: Format, unit: Tensor, zero_point: Tensor | None) -> Tensor:
    """The values of the codes nearest to float32 `weight`, for units from `spread`; float32."""
    quotient = weight.double() / unit
    if zero_point is None:
        return fmt.element.nearest(quotient).float() * unit
    return (fmt.element.nearest(quotient + zero_point) - zero_point).float() * unit


def tile_values(tiles: Tensor, fmt: Format, scale: TileScale) -> Tensor:
    """What the codes of float32 tiles [tiles, elements] stand for, under the scale of each."""
    return simulate_static(tiles, fmt, scale)[0]


def quick_tile_values(tiles: Tensor, fmt: Format, scale: TileScale) -> Tensor:
    """The same in float32 alone, several times as fast, for comparing many candidates.

    A quotient that float32 rounds onto the middle between two codes may take either: the value is then as far off as
    the nearest one, to 7 digits.
    """
    if not float32.supports(fmt):
        return tile_values(tiles, fmt, scale)
    unit = multiplier(fmt, scale).float()
    quotient = tiles / torch.where(unit == 0, torch.inf, unit)
    if scale.zero_point is None:
        return float32.nearest(fmt.element, quotient).mul_(unit)
    return float32.nearest(fmt.element, quotient.add_(scale.zero_point)).sub_(scale.zero_point).mul_(unit)


def requantize(weight: Tensor, fmt: Format, scales: Scales) -> Tensor:
    """decode(encode(weight)) under given scales, float32."""
    q: QTensor = encode(weight.float(), fmt, scales)
    return decode(q)
