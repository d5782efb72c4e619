"""An independent definition of every number format, in NumPy: no import of Detent, no line shared with it.

It goes tile by tile, by slices, and finds codes by comparing each value with the exact products of the scale and the
middles between neighbouring grid values. No quotient, no rounding function, no bit trick stands in the way of reading:

* a float32 scale has 24 significant bits and a middle at most 29, so their float64 product is exact, and so is the
  comparison;
* the grids of small floats are the values that `ml_dtypes` gives their codes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np

F32 = np.float32
F32_MAX = np.finfo(np.float32).max
#: Smallest positive number of each type that scales are stored in.
SMALLEST = {"float32": 2.0**-149, "bfloat16": 2.0**-133, "float16": 2.0**-24}
STORED: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

#: QLoRA (arXiv 2305.14314), appendix E.
NF4 = [
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
]


@dataclass(frozen=True)
class Grid:
    """The values that codes stand for, ascending. With a `sign_bit` they are magnitudes, made negative by that bit."""

    values: tuple[float, ...]
    #: The code of values[0]; codes ascend with the values.
    first: int = 0
    sign_bit: int | None = None
    #: Mantissa width, as the "even" exponent rule counts it.
    mantissa: int = 0

    @property
    def largest(self) -> float:
        return self.values[-1]

    def nearest(self, x: np.ndarray, unit: Any) -> tuple[np.ndarray, np.ndarray]:
        """(values, codes) for float64 `x` in units of `unit` (it broadcasts): ties to the even code, saturating."""
        table = np.array(self.values, dtype=np.float64)
        middles = (table[1:] + table[:-1]) / 2
        y = np.abs(x) if self.sign_bit is not None else x
        products = np.asarray(unit, dtype=np.float64)[..., None] * middles
        above = y[..., None] > products
        index = above.sum(-1)
        tie = (y[..., None] == products).any(-1)
        index = index + (tie & ((index + self.first) % 2 == 1))
        values, codes = table[index], index + self.first
        if self.sign_bit is not None:
            negative = np.signbit(x)
            values, codes = np.where(negative, -values, values), codes | (negative.astype(np.int64) << self.sign_bit)
        return values, codes


def integers(bits: int, signed: bool = True, narrow: bool = False) -> Grid:
    low = -(2 ** (bits - 1)) + narrow if signed else 0
    high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    return Grid(tuple(float(i) for i in range(low, high + 1)), low, mantissa=bits)


def small_floats(dtype: Any, bits: int, mantissa: int) -> Grid:
    """The nonnegative finite numbers of an ml_dtypes type, which stand in the order of their codes."""
    codes = np.arange(2 ** (bits - 1), dtype=np.uint8).view(dtype)
    values = codes.astype(np.float64)
    finite = values[np.isfinite(values)]
    assert (np.diff(finite) > 0).all()
    return Grid(tuple(finite.tolist()), 0, sign_bit=bits - 1, mantissa=mantissa)


GRIDS = {
    "e4m3": small_floats(ml_dtypes.float8_e4m3fn, 8, 3),
    "e5m2": small_floats(ml_dtypes.float8_e5m2, 8, 2),
    "e3m2": small_floats(ml_dtypes.float6_e3m2fn, 6, 2),
    "e2m3": small_floats(ml_dtypes.float6_e2m3fn, 6, 3),
    "e2m1": small_floats(ml_dtypes.float4_e2m1fn, 4, 1),
    "nf4": Grid(tuple(NF4)),
}


@dataclass(frozen=True)
class Spec:
    """A format, in the words of this file.

    `kind`: ``symmetric``, ``midpoint``, ``int`` and ``float`` zero points; ``mx``, ``bfp``, ``micro``; ``two_stage``.
    """

    grid: Grid
    kind: str = "symmetric"
    divisor: float = 1.0
    scale_dtype: str = "float32"
    #: mx: "even", "floor", "ceil", "fit"; and the exponent of one unit of the grid.
    rule: str = "even"
    unit: int = 0
    #: micro: mantissa bits.
    mantissa: int = 0
    #: two_stage: candidates of what a tile's amax is mapped to; the largest group scale.
    targets: tuple[float, ...] = (6.0,)
    largest_scale: float = 448.0
    base: Spec | None = None


@dataclass
class Result:
    """Everything that encoding gives; `scale` holds values for float scales and bytes for powers of two."""

    values: np.ndarray
    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None = None
    micro: np.ndarray | None = None
    outer: np.floating | None = None


def blocks(shape: tuple[int, ...], lengths: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """(index in the grid of scales, slices of the tensor) of every tile."""
    counts = [-(-size // length) for size, length in zip(shape, lengths, strict=True)]
    for index in itertools.product(*map(range, counts)):
        yield index, tuple(slice(i * n, (i + 1) * n) for i, n in zip(index, lengths, strict=True))


def quantize(x: np.ndarray, spec: Spec, lengths: tuple[int, ...], outer: np.floating | None = None) -> Result:
    """Encode and decode a float32 array in tiles of the given lengths; `values` is float32."""
    if spec.base is not None:
        return _progressive(x, spec, lengths)
    grid_shape = tuple(-(-size // length) for size, length in zip(x.shape, lengths, strict=True))
    out = Result(
        values=np.zeros(x.shape, F32),
        codes=np.zeros(x.shape, np.int64),
        scale=np.zeros(grid_shape, np.float64),
        zero_point=np.zeros(grid_shape, np.float64) if spec.kind in ("int", "float") else None,
        micro=np.zeros((*x.shape[:-1], -(-x.shape[-1] // 2)), np.int64) if spec.kind == "micro" else None,
    )
    if spec.kind == "two_stage":
        out.outer = outer_scale(F32(np.abs(x).max()) if x.size else F32(0), spec) if outer is None else outer
    for index, part in blocks(x.shape, lengths):
        _TILE[spec.kind](x[part], spec, out, index, part)
    return out


def outer_scale(amax: np.floating, spec: Spec) -> np.floating:
    if amax == 0:
        return F32(1)
    return max(F32(amax) / F32(spec.grid.largest * spec.largest_scale), F32(2.0**-149))


def to_float32(values: np.ndarray) -> np.ndarray:
    """Rounded once, finite values kept finite."""
    with np.errstate(over="ignore"):
        return np.clip(np.asarray(values).astype(F32), -F32_MAX, F32_MAX)


def cast(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values in "float32", "bfloat16" or "float16", saturating, as an unsigned integer view of their bits."""
    if dtype == "float32":
        return to_float32(values).view(np.uint32)
    kind = STORED[dtype]
    largest = float(ml_dtypes.finfo(kind).max)
    return np.clip(values, F32(-largest), F32(largest)).astype(kind).view(np.uint16)


def stored_scale(scale: np.floating, dtype: str) -> np.floating:
    """A float32 scale as the nearest positive number of its type."""
    if dtype == "e4m3":
        return max(F32(min(scale, F32(448)).astype(ml_dtypes.float8_e4m3fn)), F32(2.0**-9))
    kind = STORED[dtype]
    rounded = min(F32(scale), F32(float(ml_dtypes.finfo(kind).max))).astype(kind)
    return max(F32(rounded), F32(SMALLEST[dtype]))


def _times(values: np.ndarray, scale: np.floating) -> np.ndarray:
    with np.errstate(over="ignore"):
        return to_float32(values.astype(F32) * F32(scale))


def _amax(tile: np.ndarray) -> np.floating:
    return F32(np.abs(tile).max())


def _symmetric(tile: np.ndarray, spec: Spec, out: Result, index: Any, part: Any) -> None:
    amax = _amax(tile)
    scale = F32(1) if amax == 0 else stored_scale(amax / F32(spec.divisor), spec.scale_dtype)
    values, codes = spec.grid.nearest(tile.astype(np.float64), float(scale))
    out.values[part], out.codes[part], out.scale[index] = _times(values, scale), codes, scale


def _midpoint(tile: np.ndarray, spec: Spec, out: Result, index: Any, part: Any) -> None:
    """Unsigned codes whose zero is in the middle: the signed format of the same width, shifted."""
    half = len(spec.grid.values) // 2
    shifted = Spec(Grid(tuple(v - half for v in spec.grid.values), -half), "symmetric", spec.divisor, spec.scale_dtype)
    _symmetric(tile, shifted, out, index, part)
    out.codes[part] += half


def _affine(tile: np.ndarray, spec: Spec, out: Result, index: Any, part: Any) -> None:
    qmin, qmax = F32(spec.grid.values[0]), F32(spec.grid.largest)
    low, high = min(F32(tile.min()), F32(0)), max(F32(tile.max()), F32(0))
    with np.errstate(over="ignore"):
        scale = (high - low) / (qmax - qmin)
    if np.isinf(scale):
        scale = high / (qmax - qmin) - low / (qmax - qmin)
    scale = F32(1) if low == high else stored_scale(scale, spec.scale_dtype)
    # round(lo / s), ties to even: the integer nearest to lo, in units of s.
    _, to_low = Grid(tuple(float(i) for i in range(-300, 1)), -300).nearest(np.float64(low), float(scale))
    zero_point = int(min(max(qmin - to_low, qmin), qmax))
    # The code is zero_point + k, k the integer nearest to x in units of s (ties to even k), clamped.
    levels = Grid(tuple(float(i) for i in range(-300, 301)), -300)
    _, k = levels.nearest(tile.astype(np.float64), float(scale))
    codes = np.clip(k + zero_point, qmin, qmax).astype(np.int64)
    out.codes[part], out.scale[index], out.zero_point[index] = codes, scale, zero_point
    out.values[part] = _times((codes - zero_point).astype(F32), scale)


def _float_zero_point(tile: np.ndarray, spec: Spec, out: Result, index: Any, part: Any) -> None:
    """zero point = qmin - min / s, a float32; code = x / s + zero point in float64, rounded half to even."""
    qmin, qmax = F32(spec.grid.values[0]), F32(spec.grid.largest)
    low, high = F32(tile.min()), F32(tile.max())
    with np.errstate(over="ignore"):
        scale = (high - low) / (qmax - qmin)
    if np.isinf(scale):
        scale = high / (qmax - qmin) - low / (qmax - qmin)
    if low == high:
        scale = abs(low)
    scale = F32(1) if low == high == 0 else stored_scale(scale, spec.scale_dtype)
    zero_point = qmin - low / scale
    image = tile.astype(np.float64) / np.float64(scale) + np.float64(zero_point)
    codes = np.clip(np.array([round(v) for v in image.ravel().tolist()]).reshape(tile.shape), qmin, qmax)
    out.codes[part], out.scale[index], out.zero_point[index] = codes.astype(np.int64), scale, zero_point
    out.values[part] = _times(codes.astype(F32) - zero_point, scale)


def log2_floor(value: float) -> int:
    return math.frexp(value)[1] - 1


def exponent(amax: float, spec: Spec) -> int:
    """The shared exponent of a tile, before it is clamped to what a byte holds."""
    if amax == 0:
        return -127
    if spec.rule == "fit":
        e = log2_floor(amax) - log2_floor(spec.grid.largest) - spec.unit - 2
        while Fraction(spec.grid.largest) * Fraction(2) ** (e + spec.unit) < Fraction(amax):
            e += 1
        return e
    emax = log2_floor(spec.grid.largest) + spec.unit  # 0 for MXINT8: 127 * 2^-6 lies below 2
    e = log2_floor(amax)
    significand = Fraction(amax) / Fraction(2) ** e
    if spec.rule == "ceil" and significand > 1:
        e += 1
    if spec.rule == "even" and significand >= 2 - Fraction(1, 2 ** (spec.grid.mantissa + 1)):
        e += 1
    return e - emax


def _mx(tile: np.ndarray, spec: Spec, out: Result, index: Any, part: Any) -> None:
    e = min(max(exponent(float(_amax(tile)), spec), -127), 127)
    unit = 2.0 ** (e + spec.unit)
    values, codes = spec.grid.nearest(tile.astype(np.float64), unit)
    out.values[part], out.codes[part], out.scale[index] = to_float32(values * unit), codes, e + 127


def _bfp(tile: np.ndarray, spec: Spec, out: Result, index: Any, part: Any) -> None:
    amax = float(_amax(tile))
    e = max(log2_floor(amax), -127) if amax else -127
    wide = Grid(tuple(float(i) for i in range(-300, 301)), -300)
    _, free = wide.nearest(tile.astype(np.float64), 2.0 ** (e - 6))
    if free.max() >= 128 or free.min() < -128:
        e += 1
    unit = 2.0 ** (e - 6)
    values, codes = spec.grid.nearest(tile.astype(np.float64), unit)
    out.values[part], out.codes[part], out.scale[index] = to_float32(values * unit), codes, e + 127


def _micro(tile: np.ndarray, spec: Spec, out: Result, index: Any, part: Any) -> None:
    """MX4, MX6, MX9. Tiles lie along the last axis and start at even positions."""
    amax = float(_amax(tile))
    e = min(max(log2_floor(amax), -127), 127) if amax else -127
    out.scale[index] = e + 127
    for j in range(0, tile.shape[-1], 2):
        pair = tile[..., j : j + 2]
        small = all(v == 0 or log2_floor(abs(v)) <= e - 1 for v in pair.ravel().tolist())
        step = 2.0 ** (e - small - (spec.mantissa - 1))
        values, codes = spec.grid.nearest(pair.astype(np.float64), step)
        start = part[-1].start + j
        where = (*part[:-1], slice(start, start + pair.shape[-1]))
        out.values[where], out.codes[where] = to_float32(values * step), codes
        out.micro[(*part[:-1], slice(start // 2, start // 2 + 1))] = small


def _two_stage(tile: np.ndarray, spec: Spec, out: Result, index: Any, part: Any) -> None:
    amax, best = _amax(tile), None
    for target in spec.targets:
        with np.errstate(over="ignore"):
            scale = stored_scale((amax / F32(target)) / out.outer, "e4m3")
        unit = F32(scale * out.outer)
        if unit == 0:  # every code stands for zero
            codes = np.signbit(tile).astype(np.int64) << spec.grid.sign_bit
            values = np.where(np.signbit(tile), -0.0, 0.0)
        else:
            values, codes = spec.grid.nearest(tile.astype(np.float64), float(unit))
        decoded = _times(values, unit)
        error = ((decoded.astype(np.float64) - tile.astype(np.float64)) ** 2).sum()
        if best is None or error < best[0]:
            best = (error, decoded, codes, scale)
    _, out.values[part], out.codes[part], out.scale[index] = best


def _progressive(x: np.ndarray, spec: Spec, lengths: tuple[int, ...]) -> Result:
    """The codes of the base format, read as numbers, are what the second format encodes."""
    base = quantize(x, spec.base, x.shape)
    outer = F32(base.scale.reshape(-1)[0])
    numbers, _ = spec.base.grid.nearest(x.astype(np.float64), float(outer))
    second = quantize(numbers.astype(F32), Spec(spec.grid, spec.kind, spec.divisor, spec.scale_dtype), lengths)
    second.values, second.outer = _times(second.values, outer), outer
    return second


_TILE = {
    "symmetric": _symmetric,
    "midpoint": _midpoint,
    "int": _affine,
    "float": _float_zero_point,
    "mx": _mx,
    "bfp": _bfp,
    "micro": _micro,
    "two_stage": _two_stage,
}
