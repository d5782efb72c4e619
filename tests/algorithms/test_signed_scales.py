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
    choice = weighted_range(weight, fmt, moment, [0.5, 0.7], turn=True)
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


def test_formats_that_can_turn() -> None:
    assert can_turn(integer(4, per_group(8)))
    assert not can_turn(integer(4, per_group(8), narrow=True))
    assert not can_turn(integer(4, per_group(8), signed=False))
    assert not can_turn(integer(4, per_group(8), symmetric=False))
    assert not can_turn(nvfp4())
