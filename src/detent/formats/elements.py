"""Elements: the finite set of values that one code can stand for.

Invariants, for every element ``e`` and float64 tensor ``v``:

* ``e.nearest(v)`` is the grid value nearest to ``v`` (ties to the even code, saturating at both
  ends), and ``e.nearest(e.nearest(v)) == e.nearest(v)``. Floats without mantissa bits have no even significand to
  choose: they round a tie between powers of two up, as IEEE 754-2019 4.3.1 has it;
* ``e.decode(e.encode(g)) == g`` for every grid value ``g``, bit for bit.

`nearest` works in float64 because the quotient of two float32 numbers, rounded to float64, never lands on a tie that
the exact quotient doesn't have (24 + 24 < 53 bits): the choice is the one that exact arithmetic would make.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from detent.errors import DetentError
from detent.formats.exporting import exporting, floor_log2_by_arithmetic

_F64_EXPONENT = 0x7FF0000000000000


def power_below(v: Tensor) -> Tensor:
    """2^floor(log2|v|) of a float64 tensor, 0 where v is 0: the mantissa and sign bits cleared."""
    if exporting():
        return torch.where(v == 0, 0.0, 2.0 ** floor_log2_by_arithmetic(v))
    return (v.view(torch.int64) & _F64_EXPONENT).view(torch.float64)


def floor_log2(v: Tensor) -> Tensor:
    """floor(log2|v|) of a float64 tensor as int64; -1023 where v is 0 (float32 subnormals are normal in float64)."""
    if exporting():
        return floor_log2_by_arithmetic(v).to(torch.int64)
    return ((v.view(torch.int64) >> 52) & 0x7FF) - 1023


def power_of_two(e: Tensor) -> Tensor:
    """2^e as float64, exactly, for an int64 tensor e in [-1022, 1023]."""
    if exporting():
        return 2.0 ** e.to(torch.float64)
    return ((e + 1023) << 52).view(torch.float64)


def round_to_even(v: Tensor, step: Tensor | float = 1.0) -> Tensor:
    """The multiple of `step`, a power of two, nearest to a float64 `v`; ties to even multiples, zero always +0.

    Adding 1.5 * 2^52 steps leaves float64 no finer bits. Exact up to 2^51 steps; larger numbers stay about as large.
    (torch.round wakes all threads for every tensor: on a small one that takes a hundred times as long.)
    """
    magic = step * (1.5 * 2.0**52)
    return (v + magic) - magic


@dataclass(frozen=True)
class Integer:
    """Integers of `bits` bits: [-2^(b-1), 2^(b-1)-1], or [0, 2^b-1] unsigned; `narrow` drops the most negative one."""

    bits: int
    signed: bool = True
    narrow: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise DetentError(f"an integer element has 2 to 8 bits, not {self.bits}")
        if self.narrow and not self.signed:
            raise DetentError("narrow_range belongs to signed integers; unsigned ones have no extra negative value")

    @property
    def name(self) -> str:
        return f"{'int' if self.signed else 'uint'}{self.bits}{'_narrow' if self.narrow else ''}"

    @property
    def minimum(self) -> float:
        return float(-(2 ** (self.bits - 1)) + self.narrow) if self.signed else 0.0

    @property
    def maximum(self) -> float:
        return float(2 ** (self.bits - 1) - 1) if self.signed else float(2**self.bits - 1)

    @property
    def storage_dtype(self) -> torch.dtype:
        return torch.int8 if self.signed else torch.uint8

    def nearest(self, v: Tensor) -> Tensor:
        return torch.clamp(round_to_even(v), self.minimum, self.maximum)

    def encode(self, grid: Tensor) -> Tensor:
        return grid.to(self.storage_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32)


@dataclass(frozen=True)
class Float:
    """Small floats: sign, `exponent_bits`, `mantissa_bits`, subnormals, no infinity used; saturating at `maximum`.

    `bias` is 2^(E-1)-1 as in IEEE 754. `maximum` is given where the top codes are set aside for NaN or infinity (E4M3FN
    and E5M2, as in OCP "OFP8" 1.0); otherwise every code is a number (OCP MX 1.0: E3M2, E2M3, E2M1).
    """

    exponent_bits: int
    mantissa_bits: int
    reserved_maximum: float | None = None
    signed: bool = True

    def __post_init__(self) -> None:
        magnitude = self.exponent_bits + self.mantissa_bits
        if self.exponent_bits < 0 or self.mantissa_bits < 0 or magnitude < 1 or self.bits > 8:
            raise DetentError(
                f"a float element has at most 8 bits, at least one besides its sign, not {self.name} ({self.bits} bits)"
            )

    @property
    def name(self) -> str:
        return f"{'' if self.signed else 'u'}e{self.exponent_bits}m{self.mantissa_bits}"

    @property
    def bits(self) -> int:
        return self.exponent_bits + self.mantissa_bits + self.signed

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent_bits - 1) - 1 if self.exponent_bits else 0

    @property
    def min_exponent(self) -> int:
        """The exponent of the smallest normal number, shared by the subnormals."""
        return 1 - self.bias

    @property
    def maximum(self) -> float:
        if self.reserved_maximum is not None:
            return self.reserved_maximum
        return float(self._magnitude(2 ** (self.exponent_bits + self.mantissa_bits) - 1))

    @property
    def minimum(self) -> float:
        return -self.maximum if self.signed else 0.0

    @property
    def smallest(self) -> float:
        """The smallest positive number, a subnormal."""
        return 2.0 ** (self.min_exponent - self.mantissa_bits)

    @property
    def max_exponent(self) -> int:
        """floor(log2(maximum)): `emax` of the OCP MX specification."""
        return math.frexp(self.maximum)[1] - 1

    @property
    def storage_dtype(self) -> torch.dtype:
        return _NATIVE.get(self, torch.uint8)

    def nearest(self, v: Tensor) -> Tensor:
        v = torch.clamp(v, self.minimum, self.maximum)
        step = torch.clamp_min(power_below(v), 2.0**self.min_exponent) * 2.0**-self.mantissa_bits
        magnitude = round_to_even(v.abs(), step)
        return torch.where(v < 0, -magnitude, magnitude) if exporting() else torch.copysign(magnitude, v)

    def encode(self, grid: Tensor) -> Tensor:
        """Codes of grid values: sign, then the magnitude's index, as an 8-bit pattern of the storage dtype."""
        if self in _NATIVE:
            return grid.to(torch.float32).to(self.storage_dtype)  # exact: the values are on the grid
        power = torch.clamp_min(power_below(grid), 2.0**self.min_exponent)
        mantissa = (grid.abs() / power * 2**self.mantissa_bits).to(torch.int64)  # with the hidden bit where normal
        exponent = floor_log2(power) - self.min_exponent  # 0 for subnormals and for the first normal binade
        magnitude = (exponent << self.mantissa_bits) + mantissa
        negative = torch.signbit(grid).to(torch.int64) << (self.exponent_bits + self.mantissa_bits)
        bits: Tensor = negative | magnitude if self.signed else magnitude
        return bits.to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        if self in _NATIVE and (codes.is_cuda or codes.numel() < 1024):
            return codes.to(torch.float32)
        return _look_up(self.table(codes.device), codes.view(torch.uint8))  # for E4M3 on a CPU, six times as fast

    def table(self, device: torch.device) -> Tensor:
        """The float32 value of every code, in code order; NaN or infinity where a code is set aside for them."""
        if self in _NATIVE:
            return torch.arange(256, dtype=torch.uint8, device=device).view(self.storage_dtype).to(torch.float32)
        return torch.tensor(self.values(), dtype=torch.float32, device=device)

    def values(self) -> list[float]:
        """The value of every code, in code order (negative codes last, as sign and magnitude)."""
        positive = [self._magnitude(i) for i in range(2 ** (self.exponent_bits + self.mantissa_bits))]
        return positive + [-p for p in positive] if self.signed else positive

    def _magnitude(self, index: int) -> float:
        # Not divmod, which torch.compile can't trace.
        exponent, mantissa = index >> self.mantissa_bits, index & (2**self.mantissa_bits - 1)
        if exponent == 0:
            return float(mantissa * self.smallest)
        return float((1 + mantissa / 2**self.mantissa_bits) * 2.0 ** (exponent - self.bias))


@dataclass(frozen=True)
class Table:
    """A sorted list of values, found by lookup: the code is the index."""

    name: str
    entries: tuple[float, ...]

    @property
    def bits(self) -> int:
        return (len(self.entries) - 1).bit_length()

    @property
    def minimum(self) -> float:
        return self.entries[0]

    @property
    def maximum(self) -> float:
        return self.entries[-1]

    @property
    def storage_dtype(self) -> torch.dtype:
        return torch.uint8

    @property
    def whole(self) -> bool:
        """Whether all entries are whole numbers, so that twice every middle is one too."""
        return all(entry == round(entry) for entry in self.entries)

    def places(self) -> tuple[int, list[int]]:
        """For whole entries: (first, codes), ``codes[floor(2 v) + ceil(2 v) - first]`` being the code of v within the
        range, in float32 too: that index tells a middle from the numbers on either side of it."""
        first = math.floor(4 * self.minimum)
        points = torch.arange(first, math.ceil(4 * self.maximum) + 1, dtype=torch.float64) / 4
        return first, [int(code) for code in self._index(points)]

    def _index(self, v: Tensor) -> Tensor:
        """Index of the nearest entry; a value just between two entries goes to the even index."""
        entries = torch.tensor(self.entries, dtype=torch.float64, device=v.device)
        middles = (entries[1:] + entries[:-1]) / 2
        v = v.contiguous()
        below, above = torch.bucketize(v, middles), torch.bucketize(v, middles, right=True)
        return torch.where((below != above) & (below % 2 == 1), above, below)

    def nearest(self, v: Tensor) -> Tensor:
        return torch.tensor(self.entries, dtype=torch.float64, device=v.device)[self._index(v)]

    def encode(self, grid: Tensor) -> Tensor:
        return self._index(grid).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return _look_up(self.table(codes.device), codes)

    def table(self, device: torch.device) -> Tensor:
        """The float32 value of every code."""
        return torch.tensor(self.entries, dtype=torch.float32, device=device)


def _look_up(table: Tensor, codes: Tensor) -> Tensor:
    """The value of each code, in the shape of `codes`."""
    return table.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)


Element = Integer | Float | Table

E4M3 = Float(4, 3, reserved_maximum=448.0)
E5M2 = Float(5, 2, reserved_maximum=57344.0)
E3M2 = Float(3, 2)
E2M3 = Float(2, 3)
E2M1 = Float(2, 1)
#: Unsigned E5M3 with one NaN code: the group scale of the AMDFP4 schemes.
UE5M3 = Float(5, 3, reserved_maximum=114688.0, signed=False)
#: Quantiles of the normal distribution scaled to [-1, 1] (QLoRA, arXiv 2305.14314, appendix E), as float32 values.
NF4 = Table(
    "nf4",
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)

#: The values of llama.cpp's IQ4_NL and IQ4_XS.
IQ4 = Table("iq4", tuple(map(float, (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))))
#: A sign and no more.
SIGN = Table("sign", (-1.0, 1.0))

_NATIVE = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}


def float_element(exponent_bits: int, mantissa_bits: int) -> Float:
    """The element called (E, M) in configurations: FP8 with its reserved codes, else one without any."""
    known = {(4, 3): E4M3, (5, 2): E5M2}
    return known.get((exponent_bits, mantissa_bits)) or Float(exponent_bits, mantissa_bits)
