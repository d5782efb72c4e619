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

Codes of floats without a conversion in PyTorch are the upper bits of float16 numbers, whose bits are then rounded like
integers. float16 has few bits among its subnormals, so longer quotients are cut before, with a bit that says so.
"""

from __future__ import annotations

from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from detent.formats import float32
from detent.formats import tiles as tl
from detent.formats.elements import Element, Float, Integer, Table, power_of_two
from detent.formats.format import Format
from detent.formats.memory import in_parts
from detent.formats.scales import FloatScale, PowerOfTwoScale, SearchedScale
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
        value: the divisor, or for power-of-two scales the factor; for small floats in units of float16.
        zero_point: what is added to rounded quotients, or None.
        minimum: what is subtracted before, or None.
        regular: bool: whether float32 arithmetic is safe for the tile (its scale is neither tiny nor huge).
        check: whether quotients can be false ties.
        cut: whether quotients have more bits than `_small_float_codes` can take.
    """

    value: Tensor
    zero_point: Tensor | None
    minimum: Tensor | None
    regular: Tensor
    check: bool
    cut: bool

    def rows(self, rows: slice) -> Divisor:
        """The part of some tiles; what belongs to all of them stays."""
        value, zero_point, minimum, regular = (t if t is None or len(t) == 1 else t[rows] for t in self[:4])
        assert value is not None
        assert regular is not None
        return Divisor(value, zero_point, minimum, regular, self.check, self.cut)


def supports(fmt: Format) -> bool:
    """Whether `codes` can stand in for the definition."""
    element = fmt.element
    return float32.supports(fmt) and not (isinstance(element, Float) and element.mantissa_bits > 3)


def _is_small(element: Element) -> TypeGuard[Float]:
    """Whether PyTorch has no conversion to the element."""
    return isinstance(element, Float) and not element.storage_dtype.is_floating_point


class Scratch:
    """Memory for one piece after the other: fresh memory costs more than the arithmetic."""

    def __init__(self, count: int) -> None:
        self.floats = torch.empty(count, dtype=torch.float32, device="cpu")
        self.more = torch.empty(2 * count, dtype=torch.float32, device="cpu")
        self.codes = torch.empty(count, dtype=torch.int8, device="cpu")


def divisor_of(fmt: Format, scale: TileScale, dtype: torch.dtype, length: int) -> Divisor:
    """What tiles of `length` numbers of type `dtype` are divided by under `scale`."""
    element = fmt.element
    fold = 1.0 / _unit(element) if _is_small(element) else 1.0
    if isinstance(fmt.scale, PowerOfTwoScale):
        one = fmt.scale.unit_exponent(element)
        cut = _is_small(element) and _BITS[dtype] > 10 - element.mantissa_bits
        factor, regular = in_parts(
            lambda e: ((power_of_two(-one - e) / fold).float(), (e + one).abs() <= 100), scale.value
        )
        return Divisor(factor, None, None, regular, False, cut)
    unit = tl.multiplier(fmt, scale)
    regular = (unit >= 2.0**-60) & (unit <= 2.0**60)
    if isinstance(fmt.scale, SearchedScale):  # of any sign, and x / inf has the code of 0
        unit, regular = torch.where(unit == 0, torch.inf, unit), (unit == 0) | (unit.abs() >= 2.0**-60)
    zero_point, minimum = (None, scale.zero_point) if fmt.zero_point == "minimum" else (scale.zero_point, None)
    if minimum is not None:
        dtype = torch.float32  # of the difference
    tie_bits = _tie_bits(fmt)
    check = False
    if int((unit.view(torch.int32) & ((1 << (24 - _SHORT + tie_bits)) - 1)).amax()) != 0:
        together = tie_bits + _BITS[dtype]
        if together > _APART or isinstance(fmt.scale, SearchedScale):
            check = True
        elif scale.outer is not None:
            unit, check = _apart_by_code(fmt, scale, unit, tie_bits, together)
        elif length >= 2 ** (tie_bits + 1):
            unit = _apart(unit, tie_bits, together)
        else:  # more ties to look at than numbers
            check = True
    return Divisor(unit * fold, zero_point, minimum, regular, check, True)


def codes(x: Tensor, fmt: Format, divisor: Divisor, room: Scratch, out: Tensor) -> None:
    """Write the codes of `x` [tiles, n], finite, into `out`: contiguous, of the element's storage dtype."""
    element, v = fmt.element, _quotients(x, fmt, divisor, room)
    if isinstance(element, Table):
        out.copy_(float32.table_codes(element, v))
    elif isinstance(element, Integer):
        _integer_codes(v, element, divisor.zero_point, out)
    elif _is_small(element):
        _small_float_codes(v, element, divisor.cut, room, out)
    else:
        out.copy_(v.clamp_(element.minimum, element.maximum))


def values(x: Tensor, fmt: Format, divisor: Divisor, room: Scratch) -> Tensor:
    """What the codes of `x` stand for before scaling, zero points included: float32, in the memory of `room`."""
    element, v = fmt.element, _quotients(x, fmt, divisor, room)
    if isinstance(element, Integer):
        # Adding the zero point, or 0, makes -0 a +0.
        zero_point = divisor.zero_point
        return v.round_().add_(0.0 if zero_point is None else zero_point).clamp_(element.minimum, element.maximum)
    if isinstance(element, Table):
        return float32.nearest(element, v, over=True)
    if _is_small(element):
        bits, _ = _rounded_bits(v, element, divisor.cut, room)
        bits.bitwise_and_(-1 << 10 - element.mantissa_bits)
        return v.copy_(bits.view(torch.float16)).mul_(1 / _unit(element))
    stored = room.codes[: x.numel()].view(x.shape).view(element.storage_dtype)
    small_float_values(stored.copy_(v.clamp_(element.minimum, element.maximum)), element, room, v)
    return v


def _quotients(x: Tensor, fmt: Format, divisor: Divisor, room: Scratch) -> Tensor:
    """`x` over its scales, on no other side of a tie than the exact quotients."""
    v = room.floats[: x.numel()].view(x.shape)
    v.copy_(x)
    if divisor.minimum is not None:
        v.sub_(divisor.minimum)
    if isinstance(fmt.scale, PowerOfTwoScale):
        v.mul_(divisor.value)
    else:
        v.div_(divisor.value)
    if divisor.check:
        _without_false_ties(v, x, divisor, _tie_bits(fmt), room)
    return v


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


def _unit(element: Float) -> float:
    """The float16 number whose bits, moved down, are the code of 1 in a small float."""
    return 2.0 ** (element.bias - 15)


def _small_float_codes(v: Tensor, element: Float, cut: bool, room: Scratch, out: Tensor) -> None:
    magnitude_bits = element.bits - 1
    bits, other = _rounded_bits(v, element, cut, room)
    torch.bitwise_right_shift(bits, 15 - magnitude_bits, out=other).bitwise_and_(1 << magnitude_bits)  # the sign
    bits.bitwise_right_shift_(10 - element.mantissa_bits).bitwise_and_((1 << magnitude_bits) - 1)
    out.view(torch.int8).copy_(bits.bitwise_or_(other))


def _rounded_bits(v: Tensor, element: Float, cut: bool, room: Scratch) -> tuple[Tensor, Tensor]:
    """(bits of float16 numbers of which the upper ones are codes, memory of the same form that was that of `v`).

    `v` is in units in which float16's subnormals are those of the element. Bits of floats are rounded like integers,
    carries into the exponent included: half a step is added, less one where the step below is even, and what lies under
    a step is then of no more use.
    """
    count, down = v.numel(), 10 - element.mantissa_bits
    if cut:
        _round_to_odd(v, 10 - element.mantissa_bits, room)
    top = element.maximum * _unit(element)
    bits = room.more.view(torch.int16)[:count].view(v.shape)
    bits.view(torch.float16).copy_(v.clamp_(-top, top))
    other = room.floats.view(torch.int16)[:count].view(v.shape)
    torch.bitwise_right_shift(bits, down, out=other).bitwise_and_(1).add_((1 << down - 1) - 1)
    return bits.add_(other), other


def small_float_values(codes: Tensor, element: Float, room: Scratch, out: Tensor) -> bool:
    """Write the float32 values of the codes of a small float with at most 5 exponent bits into `out`.

    Returns:
        False, with nothing of use in `out`, where a code is set aside for NaN or infinity.

    The bits of a code, moved to where float16 has exponent and mantissa, are the number times a power of two: both have
    subnormals, and float16 has at least as many exponents.
    """
    halves = room.more.view(torch.int16)
    bits, other = (halves[i * codes.numel() : (i + 1) * codes.numel()].view(codes.shape) for i in (0, 1))
    up, magnitude_bits = 10 - element.mantissa_bits, element.bits - element.signed
    if element.bits == 8 and element.signed:  # widening repeats the sign: it is in its place, and above the exponent
        bits.copy_(codes.view(torch.int8)).bitwise_left_shift_(up)
        if element.exponent_bits < 5:
            bits.bitwise_and_(-1 << 15 | (1 << magnitude_bits + up) - 1)
    else:
        bits.copy_(codes.view(torch.uint8))
        torch.bitwise_right_shift(bits, magnitude_bits, out=other)
        bits.bitwise_and_((1 << magnitude_bits) - 1).bitwise_left_shift_(up)
        bits.bitwise_or_(other.bitwise_left_shift_(15))
    out.copy_(bits.view(torch.float16)).mul_(1 / _unit(element))
    largest = element.reserved_maximum
    if largest is None:
        return True
    top = torch.tensor(largest * _unit(element), dtype=torch.float16).view(torch.int16)
    return int(torch.bitwise_and(bits, 0x7FFF, out=other).amax()) <= int(top)


def _round_to_odd(v: Tensor, keep: int, room: Scratch) -> None:
    """Keep some significant bits, the last one set where anything was lost: on no other side of a tie than before."""
    bits, low = v.view(torch.int32), (1 << 24 - keep) - 1
    lost = room.more[: v.numel()].view(v.shape).view(torch.int32)
    torch.bitwise_and(bits, low, out=lost)
    bits.bitwise_or_(lost.add_(low)).bitwise_and_(~low)


def _without_false_ties(v: Tensor, x: Tensor, divisor: Divisor, tie_bits: int, room: Scratch) -> None:
    low = room.more[: v.numel()].view(v.shape).view(torch.int32)
    torch.bitwise_and(v.view(torch.int32), (1 << (24 - tie_bits)) - 1, out=low)
    if int(low.amin()) == 0:  # numbers with as few bits as a tie are rare, but for the largest of a tile
        rows, columns = (low == 0).nonzero(as_tuple=True)
        tile = rows if len(divisor.value) > 1 else torch.zeros_like(rows)
        own = x[rows, columns].to(torch.float32)
        if divisor.minimum is not None:
            own = own - divisor.minimum.view(-1)[tile]
        v[rows, columns] = float32.off_false_ties(v[rows, columns], own, divisor.value.view(-1)[tile])


def _tie_bits(fmt: Format) -> int:
    """Significant bits of the middle between two neighbours of the grid."""
    if isinstance(fmt.element, Integer):
        return fmt.element.bits + (fmt.zero_point != "none")
    if isinstance(fmt.element, Table):
        return int(max(-2 * fmt.element.minimum, 2 * fmt.element.maximum)).bit_length()
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
    assert isinstance(fmt.scale, FloatScale)
    stored = fmt.scale.store(scale.value).view(torch.uint8)
    every = torch.arange(256, dtype=torch.uint8, device=unit.device).view(fmt.scale.stored_dtype).reshape(-1, 1)
    values = fmt.scale.load(every)
    index = stored.reshape(-1).to(torch.int32)
    if not torch.equal(values.index_select(0, index), scale.value):
        return unit, True  # not what can be stored
    return _apart(values * scale.outer, tie_bits, together).index_select(0, index), False
