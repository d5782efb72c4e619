"""Scales of either sign, against both roundings computed by hand."""

from __future__ import annotations

import pytest
import torch

from detent.algorithms.gptq import Job, factorise, gptq
from detent.algorithms.objective import requantize
from detent.algorithms.scale_search import can_turn, weighted_range
from detent.formats import decode, encode, integer, nvfp4, per_group


def test_each_tile_takes_the_better_side() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(16, 24, generator=generator), torch.randn(50, 24, generator=generator)
    moment = x.T @ x
    fmt = integer(2, per_group(8))
    amax = weight.reshape(16, 3, 8).abs().amax(2)
    choice = weighted_range(weight, fmt, moment.diagonal(), [0.5, 0.7], turn=True)
    scales = choice.scales(fmt)

    def error(unit: torch.Tensor) -> torch.Tensor:
        spread = unit.double().repeat_interleave(8, 1)
        codes = torch.round(weight.double() / spread).clamp(-2, 1)
        squares = (codes * spread - weight.double()) ** 2 * moment.diagonal().double()
        return squares.reshape(16, 3, 8).sum(2)

    upright = torch.stack([error(amax / 1.5 * k) for k in (1, 0.5, 0.7)])
    turned = torch.stack([error(-amax / 1.5 * k) for k in (1, 0.5, 0.7)])
    least = torch.minimum(upright.amin(0), turned.amin(0))
    clear = (upright.amin(0) - turned.amin(0)).abs() > 1e-4 * least
    assert clear.sum() > 20
    assert torch.equal((scales.scale < 0)[clear], (turned.amin(0) < upright.amin(0))[clear])
    assert torch.allclose(error(scales.scale), least, rtol=1e-5)
    assert choice.before == pytest.approx(float(upright[0].sum()), rel=1e-5)
    assert choice.after == pytest.approx(float(least.sum()), rel=1e-5)
    q = encode(weight, fmt, scales)
    taken = ((decode(q).double() - weight.double()) ** 2 * moment.diagonal().double()).reshape(16, 3, 8).sum(2)
    assert torch.allclose(taken, least, rtol=1e-5)
    (rounded,) = gptq([Job(weight, fmt, scales)], factorise(moment))
    assert torch.equal(requantize(rounded.weight, fmt, scales), rounded.weight)


@pytest.mark.parametrize("bits", [3, 4])
def test_the_sign_of_the_largest_number_decides(bits: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, diagonal = torch.randn(64, 96, generator=generator), torch.rand(96, generator=generator)
    fmt, factors = integer(bits, per_group(16)), [0.6, 0.7, 0.8, 0.9, 1.0]
    choice = weighted_range(weight, fmt, diagonal, factors, turn=True)
    tiles = weight.reshape(64, 6, 16)
    unit = tiles.abs().amax(2) / (2**bits - 1) * 2

    def error(units: torch.Tensor) -> torch.Tensor:
        spread = units.double().unsqueeze(2)
        codes = torch.round(tiles.double() / spread).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return ((codes * spread - tiles.double()) ** 2 * diagonal.double().reshape(6, 16)).sum(2)

    least = torch.stack([error(sign * unit * k) for k in factors for sign in (1, -1)]).amin(0).sum()
    upright = torch.stack([error(unit * k) for k in factors]).amin(0).sum()
    assert choice.after == pytest.approx(float(error(choice.scales(fmt).scale).sum()), rel=1e-5)
    assert choice.after < float(least) * 1.01
    assert choice.after < float(upright) * 0.95


def test_formats_that_can_turn() -> None:
    assert can_turn(integer(4, per_group(8)))
    assert not can_turn(integer(4, per_group(8), narrow=True))
    assert not can_turn(integer(4, per_group(8), signed=False))
    assert not can_turn(integer(4, per_group(8), symmetric=False))
    assert not can_turn(nvfp4())
