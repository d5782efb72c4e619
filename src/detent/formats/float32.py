"""Rounding to small grids in float32 arithmetic alone, with the bits of the float64 definition in `tiles`.

On a CPU this compiles to about a fifth of the time: every vector holds twice the numbers, and torch.compile has no
vector instructions for float64 conversions or for the bit patterns of floats. So nothing here uses either.

Why the bits agree. Let y be x / s rounded to float32. Rounding never passes a float32 number, and every tie of a grid
is one (it has at most 10 significant bits). So y lies on the same side of each tie as the exact quotient does, or is
that very tie; only then could the wrong neighbour be chosen. `off_false_ties` computes the sign of x - y s exactly for
such a y and moves it to the side where the exact quotient lies. A quotient by a power of two is exact anyway.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from detent.formats.elements import E4M3, E5M2, Element, Float, Integer, Table
from detent.formats.format import Format
from detent.formats.scales import PowerOfTwoScale

#: v + 1.5 * 2^23 has steps of 1: adding and subtracting it rounds v (below 2^22) to an integer, ties to even, 0 to +0.
_TO_INTEGER = 1.5 * 2.0**23
#: Veltkamp's constant: splits off the upper 12 of 24 bits (Dekker, Numer. Math. 18, 1971).
_SPLIT = 2.0**12 + 1
_CASTS = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}


def supports(fmt: Format) -> bool:
    """Whether `values` can stand in for the definition."""
    element = fmt.element
    if isinstance(fmt.scale, PowerOfTwoScale) and (
        fmt.scale.micro or (fmt.scale.rounding == "carry" and fmt.scale.unit_exponent(element) > -1)
    ):  # steps that differ inside a tile; a step of 2^128
        return False
    if isinstance(element, Integer):
        return fmt.zero_point != "float"
    if isinstance(element, Table):
        return element.whole
    return isinstance(element, Float) and element.signed and (element in _CASTS or 1 <= element.exponent_bits <= 3)


def values(x: Tensor, fmt: Format, unit: Tensor, zero_point: Tensor | None) -> Tensor:
    """The float32 values that the codes of `x` stand for.

    Args:
        x: float32, bfloat16 or float16, finite.
        fmt: a format that `supports` accepts.
        unit: float32, broadcasts with `x`: what one unit of the element stands for; 0 makes every value 0.
        zero_point: float32 integers shaped like `unit`, or None.
    """
    # Moved towards 1, so that no product below overflows or loses bits. Quotients that underflow round to 0 anyway.
    magnitude = unit.abs()
    factor = torch.where(magnitude < 2.0**-60, 2.0**100, torch.where(magnitude > 2.0**60, 2.0**-100, 1.0))
    scaled, divisor = x.to(torch.float32) * factor, torch.where(unit == 0, torch.inf, unit * factor)
    quotient = scaled / divisor
    if not isinstance(fmt.scale, PowerOfTwoScale):
        quotient = off_false_ties(quotient, scaled, divisor)
    if zero_point is None:
        return nearest(fmt.element, quotient) * unit
    bounded = quotient.clamp(-1024.0, 1024.0)  # beyond any distance from the zero point
    steps = (bounded + _TO_INTEGER) - _TO_INTEGER
    low, high = fmt.element.minimum - zero_point, fmt.element.maximum - zero_point
    return torch.minimum(torch.maximum(steps, low), high) * unit


def nearest(element: Element, v: Tensor, *, over: bool = False) -> Tensor:
    """`element.nearest` in float32, for the elements that `supports` accepts. `over`: `v` may be written over."""
    if isinstance(element, Integer):
        bounded = (v.clamp_ if over else v.clamp)(element.minimum, element.maximum)
        return bounded.add_(_TO_INTEGER).sub_(_TO_INTEGER)
    if isinstance(element, Table):
        table = element.table(v.device).index_select(0, table_codes(element, v).reshape(-1))
        return table.view(v.shape) if not over else v.copy_(table.view(v.shape))
    assert isinstance(element, Float)
    if element in _CASTS:  # conversion instructions, or code as good, exist; they round to even but don't saturate
        return v.clamp(element.minimum, element.maximum).to(_CASTS[element]).to(torch.float32)
    magnitude = v.abs().clamp_max(element.maximum)
    top = element.max_exponent
    magic = torch.full_like(magnitude, _TO_INTEGER * 2.0 ** (top - element.mantissa_bits))
    for exponent in range(top, element.min_exponent, -1):  # below 2^exponent, the step is that of the binade below
        below = _TO_INTEGER * 2.0 ** (exponent - 1 - element.mantissa_bits)
        magic = torch.where(magnitude < 2.0**exponent, below, magic)
    return torch.copysign((magnitude + magic) - magic, v)


def table_codes(element: Table, v: Tensor) -> Tensor:
    """The codes of numbers in a table of whole ones, int32 in the shape of `v`; see `Table.places`."""
    first, codes = _places(element)
    doubled = v.clamp(element.minimum, element.maximum).mul_(2.0)
    index = doubled.ceil().add_(doubled.floor_()).sub_(first).to(torch.int32)
    return torch.tensor(codes, dtype=torch.int32, device=v.device).index_select(0, index.reshape(-1)).view(v.shape)


@cache
def _places(element: Table) -> tuple[int, list[int]]:
    return element.places()


def off_false_ties(quotient: Tensor, x: Tensor, divisor: Tensor) -> Tensor:
    """`quotient`, the rounded x / divisor, moved towards the exact one where it has 12 significant bits or fewer.

    For such a quotient both products below are exact (12 + 12 bits), the first difference is exact because the operands
    are close and lie on a common grid of at most 24 bits, and the second has the right sign because rounding keeps
    signs. The move, 2^-20 of the quotient, falls far short of the next number of 12 bits, and a tie is such a number.
    """
    short = quotient == _upper_half(quotient)
    upper = _upper_half(divisor)
    rest = (x - quotient * upper) - quotient * (divisor - upper)
    move = quotient.abs() * torch.copysign(quotient.new_full((), 2.0**-20), divisor)
    moved = torch.where(rest > 0, quotient + move, torch.where(rest < 0, quotient - move, quotient))
    return torch.where(short, moved, quotient)


def _upper_half(v: Tensor) -> Tensor:
    """`v` rounded to 12 significant bits; NaN where v * 4097 overflows."""
    wide = v * _SPLIT
    return wide - (wide - v)
