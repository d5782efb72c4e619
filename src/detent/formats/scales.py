"""Scale rules: from the range of a tile to the scale that its codes are multiplied with.

A rule is given the smallest and largest value of every tile (float32, ``[tiles, 1]``) and answers with the *stored*
scale, the thing a checkpoint holds. `effective` turns a stored scale into the float32 multiplier; nothing else ever
interprets one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from detent.errors import DetentError
from detent.formats.elements import E4M3, UE5M3, Element, Float, Integer, Table, floor_log2, power_below, power_of_two
from detent.formats.exporting import tracing

_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: 2^-149, 2^-133, 2^-24: the smallest positive number of each dtype, the floor under every computed scale.
_SMALLEST = {"float32": 2.0**-149, "bfloat16": 2.0**-133, "float16": 2.0**-24}
_SMALL_FLOATS: dict[str, Float] = {"e4m3": E4M3, "ue5m3": UE5M3}

ScaleDtype = Literal["float32", "bfloat16", "float16", "e4m3", "ue5m3"]
Exponent = Literal["even", "floor", "ceil", "fit", "carry"]


def divide(x: Tensor, by: float) -> Tensor:
    """x / by, correctly rounded. On CUDA, PyTorch multiplies by the reciprocal where the divisor is a Python number."""
    return x / x.new_full((), by)


def _known(what: str, value: str, allowed: list[str]) -> None:
    if value not in allowed:
        raise DetentError(f"unknown {what} {value!r}; known: {', '.join(allowed)}")


@dataclass(frozen=True)
class FloatScale:
    """A scale kept as a floating-point number of type `dtype`.

    `rule` decides what the largest magnitude ``amax`` of a tile is divided by:

    * ``"qmax"``: the largest element value (127 for int8, 448 for E4M3);
    * ``"half_range"``: (qmax - qmin) / 2 (127.5 for int8, 7.5 for int4). The two agree for float elements.

    Both count from the code of zero: 2^(b-1) for symmetric unsigned integers, whose qmax is then 2^(b-1) - 1. Unsigned
    integers that start at zero have no other half: they divide by qmax under either rule.

    With `outer` the tensor has a second, float32 scale on top (NVFP4): ``outer = amax_tensor / (largest element *
    largest scale)``, and what is stored per tile is ``amax_tile / largest element / outer``. `four_over_six` (arXiv
    2512.02010) lets each tile choose between mapping its amax to 6 and to 4, whichever has the smaller squared error;
    scales then use 256 of the 448 of E4M3 as their largest value so that a choice of 4 still fits.
    """

    dtype: ScaleDtype = "float32"
    rule: Literal["qmax", "half_range"] = "half_range"
    outer: bool = False
    four_over_six: bool = False

    micro = 0

    def __post_init__(self) -> None:
        _known("scale dtype", self.dtype, [*_TORCH_DTYPES, *_SMALL_FLOATS])
        _known("scale rule", self.rule, ["qmax", "half_range"])
        if self.outer and self.dtype not in _SMALL_FLOATS:
            raise DetentError(f"an outer scale goes over E4M3 or UE5M3 scales, not over {self.dtype} ones")
        if self.four_over_six and not (self.outer and self.dtype == "e4m3"):
            raise DetentError("four_over_six chooses between E4M3 scales under an outer scale; this format has none")

    @property
    def bits(self) -> int:
        return 8 if self.dtype in _SMALL_FLOATS else _TORCH_DTYPES[self.dtype].itemsize * 8

    @property
    def stored_dtype(self) -> torch.dtype:
        if self.dtype in _SMALL_FLOATS:
            return _SMALL_FLOATS[self.dtype].storage_dtype
        return _TORCH_DTYPES[self.dtype]

    def divisor(self, element: Element, zero: float = 0.0) -> float:
        """What amax is divided by, `zero` being the code that stands for zero."""
        if self.rule == "half_range" and isinstance(element, Integer) and (element.signed or zero):
            return (element.maximum - element.minimum) / 2
        return element.maximum - zero

    def outer_scale(self, amax: Tensor, element: Element) -> Tensor:
        """The float32 scale of the scales, a scalar, from the largest magnitude of the tensor."""
        largest = 256.0 if self.four_over_six else _SMALL_FLOATS[self.dtype].maximum
        amax = amax.to(torch.float32)
        scale = divide(amax, self.divisor(element) * largest).clamp_min(_SMALLEST["float32"])
        return torch.where((amax == 0) | (scale == 0), 1.0, scale)  # scale == 0: a CPU set to flush subnormals

    def quantize(self, scale: Tensor, outer: Tensor | None) -> Tensor:
        """A computed float32 scale as the nearest float32 value that can be stored (still float32), never 0."""
        if self.dtype in _SMALL_FLOATS:
            grid = _SMALL_FLOATS[self.dtype]
            ratio = scale if outer is None else scale / outer
            ratio = ratio.clamp(grid.smallest, grid.maximum)
            if (
                grid.storage_dtype.is_floating_point and not tracing()
            ):  # torch's conversion rounds to even too, several times as fast
                return ratio.to(grid.storage_dtype).to(torch.float32)
            return grid.nearest(ratio.double()).to(torch.float32)
        if self.dtype != "float32":
            largest = torch.finfo(_TORCH_DTYPES[self.dtype]).max
            scale = scale.clamp_max(largest).to(_TORCH_DTYPES[self.dtype]).to(torch.float32)
        return scale.clamp_min(_SMALLEST[self.dtype])

    def store(self, scale: Tensor) -> Tensor:
        """A value that `quantize` returned, in its stored dtype."""
        if self.dtype in _SMALL_FLOATS:
            return _SMALL_FLOATS[self.dtype].encode(scale.double())
        return scale.to(self.stored_dtype)

    def load(self, stored: Tensor) -> Tensor:
        """The inverse of `store`."""
        if self.dtype in _SMALL_FLOATS:
            return _SMALL_FLOATS[self.dtype].decode(stored)
        return stored.to(torch.float32)

    def __str__(self) -> str:
        text = f"{self.dtype} scale"
        if self.rule == "qmax":
            text += " (qmax)"
        if self.outer:
            text += " under a float32 scale"
        return text + (", four over six" if self.four_over_six else "")


@dataclass(frozen=True)
class PowerOfTwoScale:
    """A scale 2^e kept as the byte e + 127 (E8M0 of the OCP MX specification 1.0; no sign, no mantissa).

    `rounding` gives e from amax: ``"floor"``: floor(log2 amax) - emax, as the specification has it; ``"ceil"``: the
    same with the logarithm rounded up; ``"even"``: amax is first rounded to the element's mantissa width, which moves
    up the amax that would saturate; ``"fit"``: ceil(log2(amax / largest element)), the smallest e under which nothing
    saturates (ModelOpt's presets); ``"carry"``: floor, one more where the largest positive value would round past the
    top code (block floating point). e stays within [-127, 127] (128 with carry).

    `micro` > 0 adds one bit for every `micro` neighbours that halves their step when both are small (MX4/6/9: "shared
    microexponents", arXiv 2302.08007).
    """

    rounding: Exponent = "even"
    micro: int = 0

    bits = 8
    stored_dtype = torch.uint8
    outer = False
    four_over_six = False

    def __post_init__(self) -> None:
        _known("exponent rule", self.rounding, ["even", "floor", "ceil", "fit", "carry"])
        if self.micro < 0:
            raise DetentError(f"a micro-exponent is shared by at least 1 element, not {self.micro}")

    def exponent(self, low: Tensor, high: Tensor, element: Element) -> Tensor:
        """e of each tile, as int64."""
        amax = torch.maximum(-low, high).double()
        emax, unit = self._shape(element)
        if self.rounding == "even":
            # Half a step of the element is added, which is exact in float64 and carries where the amax would round up.
            amax = amax + power_below(amax) * 2.0 ** -(_mantissa_bits(element) + 1)
        elif self.rounding == "fit":
            amax = divide(amax, element.maximum * 2.0**unit)
            emax = 0
        e = floor_log2(amax)
        if self.rounding in ("ceil", "fit"):
            e = e + (power_below(amax) != amax)
        e = (e - emax).clamp(-127, 127)
        if self.rounding == "carry":
            e = e + (high.double() >= (element.maximum + 0.5) * power_of_two(e + unit))
        return e

    def unit_exponent(self, element: Element) -> int:
        """The power of two that one unit of `element` stands for under e = 0: 0 for floats, -(b - 2) for integers."""
        return self._shape(element)[1]

    def _shape(self, element: Element) -> tuple[int, int]:
        """(emax, exponent of one unit). An integer of b bits is a fixed-point number with b - 2 fraction bits."""
        if isinstance(element, Float):
            return element.max_exponent, 0
        if isinstance(element, Table):
            raise DetentError("a lookup table takes a float scale, not a power of two")
        return 0, -(element.bits - 2)

    def store(self, exponent: Tensor) -> Tensor:
        return (exponent + 127).to(torch.uint8)

    def load(self, stored: Tensor) -> Tensor:
        return stored.to(torch.int64) - 127

    def __str__(self) -> str:
        micro = f" with micro-exponents per {self.micro}" if self.micro else ""
        return f"power-of-two scale ({self.rounding}){micro}"


def _mantissa_bits(element: Element) -> int:
    return element.mantissa_bits if isinstance(element, Float) else element.bits


@dataclass(frozen=True)
class SearchedScale:
    """The scale of least squared error, of either sign: the formats of GGUF (`detent.formats.search`).

    With 16 or 32 `bits` it is a `dtype`, float16 in GGUF. With fewer it is an integer, `signed` or not, that multiplies
    a float16 shared by `tiles` neighbouring tiles, a *super-block*; a stored minimum is then an unsigned integer of as
    many bits, and what is subtracted is that integer times a second float16 of the super-block. A scale of 0 is valid:
    every code then stands for the same number.
    """

    bits: int = 16
    signed: bool = True
    tiles: int = 0
    dtype: ScaleDtype = "float16"

    outer = False
    four_over_six = False
    micro = 0

    def __post_init__(self) -> None:
        _known("scale dtype", self.dtype, [*_TORCH_DTYPES])
        plain = self.bits == 8 * _TORCH_DTYPES[self.dtype].itemsize and self.signed and not self.tiles
        if not (plain or 2 <= self.bits <= 8 and self.tiles > 0):
            raise DetentError(
                f"a searched scale is a {self.dtype}, or an integer of 2 to 8 bits in a super-block of 1 tile or more;"
                f" not {self.bits} bits in super-blocks of {self.tiles}"
            )

    @property
    def stored_dtype(self) -> torch.dtype:
        if not self.tiles:
            return _TORCH_DTYPES[self.dtype]
        return torch.int8 if self.signed else torch.uint8

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the largest integer scale."""
        least = -(1 << (self.bits - 1)) if self.signed else 0
        return least, least + (1 << self.bits) - 1

    def quantize(self, scale: Tensor, outer: Tensor | None = None) -> Tensor:
        """As `FloatScale.quantize`, for scales that are no integers."""
        return FloatScale(self.dtype).quantize(scale, None)

    def store(self, scale: Tensor) -> Tensor:
        """A value that `quantize` returned, in its stored dtype."""
        return scale.to(self.stored_dtype)

    def blocks(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """How many super-blocks lie along each axis of a grid of tiles; the last of a row may be short."""
        return (*grid[:-1], -(-grid[-1] // self.tiles))

    def spread(self, shared: Tensor, grid: tuple[int, ...]) -> Tensor:
        """One float16 for each super-block as a float32 for each tile."""
        return shared.to(torch.float32).repeat_interleave(self.tiles, -1)[..., : grid[-1]]

    def __str__(self) -> str:
        if not self.tiles:
            return f"searched {self.dtype} scale"
        return f"searched {'' if self.signed else 'u'}int{self.bits} scales, {self.tiles} under a float16"


ScaleRule = FloatScale | PowerOfTwoScale | SearchedScale
