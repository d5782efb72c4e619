"""Scales of either sign, against both roundings computed by hand."""

from __future__ import annotations

import torch

from detent.algorithms.gptq import gptq
from detent.algorithms.objective import requantize
from detent.algorithms.signed_scales import can_turn, signed_scales
from detent.formats import decode, encode, integer, nvfp4, per_group, scales_from_range


def test_each_tile_takes_the_better_side() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(16, 24, generator=generator), torch.randn(50, 24, generator=generator)
    moment = x.T @ x
    fmt = integer(2, per_group(8))
    amax = weight.reshape(16, 3, 8).abs().amax(2)
    upright = mirrored = scales_from_range(fmt, -amax, amax)
    scales = signed_scales(weight, fmt, moment, upright, mirrored)

    unit = (amax / 1.5).double().repeat_interleave(8, 1)
    errors = []
    for sign in (1, -1):
        codes = torch.round(weight.double() / (sign * unit)).clamp(-2, 1)
        squares = (codes * sign * unit - weight.double()) ** 2 * moment.diagonal().double()
        errors.append(squares.reshape(16, 3, 8).sum(2))
    assert torch.equal(scales.scale < 0, errors[1] < errors[0])
    assert torch.equal(scales.scale.abs(), upright.scale)

    q = encode(weight, fmt, scales)
    taken = ((decode(q).double() - weight.double()) ** 2 * moment.diagonal().double()).reshape(16, 3, 8).sum(2)
    assert torch.allclose(taken, torch.minimum(*errors), rtol=1e-5)
    rounded = gptq(weight, moment, fmt, scales)
    assert torch.equal(requantize(rounded.weight, fmt, scales), rounded.weight)


def test_formats_that_can_turn() -> None:
    assert can_turn(integer(4, per_group(8)))
    assert not can_turn(integer(4, per_group(8), narrow=True))
    assert not can_turn(integer(4, per_group(8), signed=False))
    assert not can_turn(integer(4, per_group(8), symmetric=False))
    assert not can_turn(nvfp4())
