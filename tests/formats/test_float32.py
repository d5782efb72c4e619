"""Rounding in float32 alone has the bits of the float64 definition, ties and near-ties included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from detent import formats as df
from detent.formats import Format, float32
from detent.formats import tiles as tl

FORMATS = [
    *(df.integer(bits, rule="qmax") for bits in (2, 4, 8)),
    df.integer(8, narrow=True),
    df.integer(4, signed=False),
    df.integer(4, signed=False, symmetric=False),
    *(df.small_float(kind, df.per_tensor()) for kind in ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1")),
    *(df.mx(kind) for kind in ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "int8")),
    df.nvfp4(),
    df.bfp16(),
]


def scales(fmt: Format, count: int) -> tl.TileScale:
    """[count, 1]: scales of all magnitudes of float32, many with few significant bits, so that ties are common."""
    generator = torch.Generator().manual_seed(1)
    exponent = torch.randint(-140, 118, (count, 1), generator=generator)
    if isinstance(fmt.scale, df.PowerOfTwoScale):
        return tl.TileScale(exponent.clamp(-127, 127))
    bits = torch.randint(1, 25, (count, 1), generator=generator)
    mantissa = 1 + torch.floor(torch.rand(count, 1, generator=generator) * 2.0**bits) * 2.0**-bits
    value = (mantissa.double() * torch.exp2(exponent.double())).float().clamp_min(2.0**-149)
    zero_point = None
    if fmt.zero_point != "none":
        zero_point = torch.randint(0, 16, (count, 1), generator=generator).float()
    return tl.TileScale(value, zero_point)


def beside_ties(fmt: Format, scale: tl.TileScale) -> Tensor:
    """[tiles, n] float32: the numbers around every middle of two grid values, times the scale, both signs."""
    element = fmt.element
    if isinstance(element, df.Integer):
        grid = torch.arange(0, 2.0**element.bits + 1, dtype=torch.float64)
    else:
        grid = torch.tensor(element.values(), dtype=torch.float64).abs().unique()
        grid = grid[grid <= element.maximum]
    middle = torch.cat([(grid[1:] + grid[:-1]) / 2, grid, grid[-1:] * 4])
    x = (middle * tl.multiplier(fmt, scale).double()).float().clamp_max(torch.finfo(torch.float32).max)
    beside = [x, torch.nextafter(x, torch.tensor(0.0)), torch.nextafter(x, torch.tensor(3e38))]
    return torch.cat([*beside, *(-b for b in beside)], 1)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_bits_are_those_of_the_definition(fmt: Format) -> None:
    assert float32.supports(fmt)
    scale = scales(fmt, 300)
    x = beside_ties(fmt, scale)
    unit = tl.multiplier(fmt, scale).float()
    got = float32.values(x, fmt, unit, scale.zero_point)
    assert torch.equal(tl.narrow(got, torch.float32).view(torch.int32), tl.simulate(x, fmt, scale).view(torch.int32))


def test_a_scale_that_underflows_gives_zeros() -> None:
    x = torch.tensor([[3.0, -3.0, 0.0, -0.0]])
    got = float32.values(x, df.nvfp4(), torch.zeros(1, 1), None)
    assert got.view(torch.int32).tolist() == torch.tensor([[0.0, -0.0, 0.0, -0.0]]).view(torch.int32).tolist()


@pytest.mark.parametrize("state", ["inference", "autocast", "compile"])
def test_large_tensors_in_every_mode(state: str) -> None:
    fmt = df.integer(8)
    x = torch.randn(64, 600)
    want = df.fake_quantize(x, fmt)
    if state == "compile":
        assert torch.equal(torch.compile(lambda x: df.fake_quantize(x, fmt), backend="eager")(x), want)
        return
    with torch.inference_mode() if state == "inference" else torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(df.fake_quantize(x, fmt), want)
        assert torch.equal(df.fake_quantize(x.clone(), fmt), want)
