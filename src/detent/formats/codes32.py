"""Codes of one piece of a tensor in float32 arithmetic, with the bits of the float64 definition in `tiles`.

This is what a CPU runs over large tensors: few passes, each over numbers that are in the cache, into memory that is
there already. Why the bits agree:

* A quotient y = x / s rounded to float32 lies on the same side of every tie of the grid as the exact one, or is that
  very tie (`float32` says why). Only the second is in danger, and only if the exact quotient isn't a tie: a false tie.
* A tie t has `p_t` significant bits, x has `p_x`, s has `p_s`. x and t s are multiples of one small number, so they
  are equal or differ by 2^-max(p_x, p_t + p_s) of their size. With ``p_t + p_s <= 21`` no quotient that differs
  from a tie comes near it: short scales (bfloat16, float16, powers of two) have no false ties.
* Two different ratios x / t of short numbers differ by 2^-(p_x + p_t) of their size, so at most one of them is near
  a given s. `_apart` looks for it, and moves s away from it without changing which side s lies on: dividing by what it
  returns gives each bfloat16 or float16 number the code of the exact quotient. It costs nothing per element.
* For float32 numbers under a long scale neither holds: `float32.off_false_ties` looks at each quotient.

Codes of floats without a conversion in PyTorch come from the piecewise linear function that gives each grid value its
code: the j-th binade contributes ``a 2^(M - e_j) + j 2^M``, and the least of them is the code of a, halves at ties.
"""

from __future__ import annotations

from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from detent.formats import tiles as tl
from detent.formats.elements import Element, Float, Integer, power_of_two
from detent.formats.float32 import off_false_ties
from detent.formats.format import Format
from detent.formats.scales import PowerOfTwoScale
from detent.formats.tiles import TileScale

#: Significant bits of what is quantized.
_BITS = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}
#: Significant bits of a tie and a scale, together, up to which their product has no neighbour that looks like it.
_SHORT = 21
#: The most bits of a tie and a number for which ratios are far enough apart.
_APART = 18


class Divisor(NamedTuple):
    """What a piece is divided by, float32 [tiles, 1] each.

    Attributes:
        value: the divisor, or for power-of-two scales the factor; for small floats in steps of the first binade.
        zero_point: what is added to rounded quotients, or None.
        regular: bool: whether float32 arithmetic is safe for the tile (its scale is neither tiny nor huge).
        check: whether quotients can be false ties.
        cut: whether quotients have more bits than `_small_float_codes` can take.
    """

    value: Tensor
    zero_point: Tensor | None
    regular: Tensor
    check: bool
    cut: bool

    def rows(self, rows: slice) -> Divisor:
        """The part of some tiles; what belongs to all of them stays."""
        value, zero_point, regular = (t if t is None or len(t) == 1 else t[rows] for t in self[:3])
        assert value is not None
        assert regular is not None
        return Divisor(value, zero_point, regular, self.check, self.cut)


class Scratch:
    """Memory for one piece after the other: fresh memory costs more than the arithmetic."""

    def __init__(self, count: int) -> None:
        self.floats = torch.empty(count, dtype=torch.float32, device="cpu")
        self.more = torch.empty(2 * count, dtype=torch.float32, device="cpu")
        self.codes = torch.empty(count, dtype=torch.int8, device="cpu")
        self.signs = torch.empty(count, dtype=torch.int8, device="cpu")


def divisor_of(fmt: Format, scale: TileScale, dtype: torch.dtype, length: int) -> Divisor:
    """What tiles of `length` numbers of type `dtype` are divided by under `scale`."""
    element = fmt.element
    fold = 2.0 ** (element.min_exponent - element.mantissa_bits) if _has_linear_codes(element) else 1.0
    wide = dtype == torch.float32
    if isinstance(fmt.scale, PowerOfTwoScale):
        exponent = scale.value + fmt.scale.unit_exponent(element)
        factor = power_of_two(-exponent) / fold
        regular = (exponent >= -100) & (exponent <= 100)
        return Divisor(factor.to(torch.float32), None, regular, False, wide)
    unit = tl.multiplier(fmt, scale)
    regular = (unit >= 2.0**-60) & (unit <= 2.0**60)
    tie_bits = _tie_bits(fmt)
    check = False
    if int((unit.view(torch.int32) & ((1 << (24 - _SHORT + tie_bits)) - 1)).amax()) != 0:
        together = tie_bits + _BITS[dtype]
        if together > _APART:
            check = True
        elif scale.outer is not None:
            unit, check = _apart_by_code(fmt, scale, unit, tie_bits, together)
        elif length >= 2 ** (tie_bits + 1):
            unit = _apart(unit, tie_bits, together)
        else:  # more ties to look at than numbers
            check = True
    return Divisor(unit * fold, scale.zero_point, regular, check, wide or check)


def codes(x: Tensor, fmt: Format, divisor: Divisor, room: Scratch, out: Tensor) -> None:
    """Write the codes of `x` [tiles, n], finite, into `out`: contiguous, of the element's storage dtype."""
    element = fmt.element
    v = room.floats[: x.numel()].view(x.shape)
    v.copy_(x)
    if isinstance(fmt.scale, PowerOfTwoScale):
        v.mul_(divisor.value)
    else:
        v.div_(divisor.value)
    if divisor.check:
        _without_false_ties(v, x, divisor.value, _tie_bits(fmt), room)
    if isinstance(element, Integer):
        _integer_codes(v, element, divisor.zero_point, out)
    elif _has_linear_codes(element):
        _small_float_codes(v, element, divisor.cut, room, out)
    else:
        out.copy_(v.clamp_(element.minimum, element.maximum))


def _integer_codes(v: Tensor, element: Integer, zero_point: Tensor | None, out: Tensor) -> None:
    v.round_()
    low, high = element.minimum, element.maximum
    if high <= 127:
        if zero_point is not None:
            v.add_(zero_point)
        out.view(torch.int8).copy_(v.clamp_(low, high))  # to uint8 it takes five times as long
        return
    v.add_(-128.0 if zero_point is None else zero_point - 128.0)
    out.view(torch.int8).copy_(v.clamp_(low - 128.0, high - 128.0))
    out.bitwise_xor_(0x80)


def _has_linear_codes(element: Element) -> TypeGuard[Float]:
    return isinstance(element, Float) and not element.storage_dtype.is_floating_point


def _small_float_codes(v: Tensor, element: Float, cut: bool, room: Scratch, out: Tensor) -> None:
    """`v` counts steps of the first binade, in which it is the code itself."""
    count, magnitude_bits = v.numel(), element.bits - 1
    if cut:
        _round_to_odd(v, room)
    least, other = (room.more[i * count : (i + 1) * count].view(v.shape) for i in (0, 1))
    shifted = torch.bitwise_right_shift(v.view(torch.int32), 31 - magnitude_bits, out=other.view(torch.int32))
    sign = room.signs[:count].view(v.shape).copy_(shifted)  # the sign's bit, among others
    torch.abs(v, out=least)
    v.abs_()
    for j in range(1, element.max_exponent - element.min_exponent + 1):
        torch.add(v.new_tensor(j * 2.0**element.mantissa_bits), v, alpha=2.0**-j, out=other)
        torch.minimum(least, other, out=least)
    steps = element.max_exponent - element.min_exponent + element.maximum * 2.0**-element.max_exponent
    top = steps * 2.0**element.mantissa_bits  # the code of the largest number
    code = out.view(torch.int8).copy_(least.clamp_max_(top).round_())
    code.bitwise_or_(sign.bitwise_and_((1 << magnitude_bits ^ 0x80) - 0x80))


def small_float_values(codes: Tensor, element: Float, room: Scratch, out: Tensor) -> bool:
    """Write the float32 values of the codes of a small float with at most 5 exponent bits into `out`.

    Returns:
        False, with nothing of use in `out`, where a code is set aside for NaN or infinity.

    The bits of a code, moved to where float16 has exponent and mantissa, are the number times a power of two: both have
    subnormals, and float16 has at least as many exponents.
    """
    bits = room.more[: codes.numel()].view(torch.int16)[: codes.numel()].view(codes.shape)
    up, magnitude_bits = 10 - element.mantissa_bits, element.bits - element.signed
    if element.bits == 8 and element.signed:  # widening repeats the sign: it is in its place, and above the exponent
        bits.copy_(codes.view(torch.int8)).bitwise_left_shift_(up)
        if element.exponent_bits < 5:
            bits.bitwise_and_(-1 << 15 | (1 << magnitude_bits + up) - 1)
    else:
        bits.copy_(codes.view(torch.uint8))
        sign = room.more.view(torch.int16)[codes.numel() : 2 * codes.numel()].view(codes.shape)
        torch.bitwise_right_shift(bits, magnitude_bits, out=sign)
        bits.bitwise_and_((1 << magnitude_bits) - 1).bitwise_left_shift_(up)
        bits.bitwise_or_(sign.bitwise_left_shift_(15))
    out.copy_(bits.view(torch.float16)).mul_(2.0 ** (15 - element.bias))
    largest = element.reserved_maximum
    return largest is None or bool((torch.stack(torch.aminmax(out)).abs() <= largest).all())


def _round_to_odd(v: Tensor, room: Scratch) -> None:
    """Keep 12 significant bits, the last one set where anything was lost: on no other side of a tie than before."""
    bits = v.view(torch.int32)
    lost = room.more[: v.numel()].view(v.shape).view(torch.int32)
    torch.bitwise_and(bits, 0xFFF, out=lost)
    bits.bitwise_or_(lost.add_(0xFFF)).bitwise_and_(~0xFFF)


def _without_false_ties(v: Tensor, x: Tensor, divisor: Tensor, tie_bits: int, room: Scratch) -> None:
    low = room.more[: v.numel()].view(v.shape).view(torch.int32)
    torch.bitwise_and(v.view(torch.int32), (1 << (24 - tie_bits)) - 1, out=low)
    if int(low.amin()) == 0:  # numbers with as few bits as a tie are rare, but for the largest of a tile
        rows, columns = (low == 0).nonzero(as_tuple=True)
        own = divisor.view(-1)[rows if len(divisor) > 1 else torch.zeros_like(rows)]
        v[rows, columns] = off_false_ties(v[rows, columns], x[rows, columns].to(torch.float32), own)


def _tie_bits(fmt: Format) -> int:
    """Significant bits of the middle between two neighbours of the grid."""
    if isinstance(fmt.element, Integer):
        return fmt.element.bits + (fmt.zero_point != "none")
    assert isinstance(fmt.element, Float)
    return fmt.element.mantissa_bits + 2


def _apart(unit: Tensor, tie_bits: int, together: int) -> Tensor:
    """`unit`, moved by 2^-(together + 2) of itself where a ratio (short number) / tie is closer than half of that.

    It moves away from the ratio. The next one is at least 2^-together away.
    """
    out = torch.empty_like(unit)
    odd = torch.arange(1, 2**tie_bits, 2, dtype=torch.float64, device=unit.device)
    split = 2.0 ** (53 - (together - tie_bits)) + 1  # Veltkamp's constant, as in `float32`
    step = max(1, (1 << 15) // len(odd))
    for start in range(0, len(unit), step):
        part = unit[start : start + step]
        product = part.double() * odd  # exact: 24 + 9 bits
        wide = product * split
        rest = (wide - (wide - product)) - product  # what the nearest short number has more than the product
        near = rest.abs() < product * 2.0 ** -(together + 3)
        away = -torch.sign(rest.mul_(near).sum(1, keepdim=True))  # one ratio at most, so one sign
        torch.mul(part, (1 + away * 2.0 ** -(together + 2)).to(torch.float32), out=out[start : start + step])
    return out


def _apart_by_code(fmt: Format, scale: TileScale, unit: Tensor, tie_bits: int, together: int) -> tuple[Tensor, bool]:
    """The same for scales of 8 bits under an outer one, which are few: (divisors, whether quotients need a check)."""
    assert scale.outer is not None
    stored = fmt.scale.store(scale.value).view(torch.uint8)
    every = torch.arange(256, dtype=torch.uint8, device=unit.device).view(fmt.scale.stored_dtype).reshape(-1, 1)
    values = fmt.scale.load(every)
    index = stored.reshape(-1).to(torch.int32)
    if not torch.equal(values.index_select(0, index), scale.value):
        return unit, True  # not what can be stored
    return _apart(values * scale.outer, tie_bits, together).index_select(0, index), False
