"""`Format`: what a code means. Element grid, who shares a scale, how the scale is made, symmetric or not, static or
not.

Invariants: a format is frozen, hashable and printable; two equal formats encode equal tensors to equal bytes;
``Format.from_dict(json.loads(json.dumps(f.to_dict()))) == f``.

The functions below the class build every family by name; nothing else in Detent writes a grid or a scale rule down.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from detent.errors import DetentError
from detent.formats import elements as el
from detent.formats.elements import Element, Float, Integer, Table
from detent.formats.granularity import Granularity, per_channel, per_group, per_tensor
from detent.formats.scales import Exponent, FloatScale, PowerOfTwoScale, ScaleDtype, ScaleRule, SearchedScale

#: How codes relate to zero. ``none``: value = code * scale. ``midpoint``: unsigned codes around 2^(b-1). ``int`` and
#: ``float``: value = (code - zero_point) * scale with a stored zero point per tile, rounded to a code or not.
#: ``minimum``: value = code * scale + minimum, the minimum stored like the scale.
ZeroPoint = Literal["none", "midpoint", "int", "float", "minimum"]


@dataclass(frozen=True)
class Format:
    """One number format.

    Attributes:
        element: the grid of a code.
        granularity: which elements share a scale.
        scale: the rule that makes the scale and how it is stored.
        zero_point: see `ZeroPoint`.
        dynamic: the range is taken from the tensor at hand each time; else it is calibrated once (weights: taken once).
        base: the format whose code values this one encodes ("progressive": int4 codes of FP8 codes), or None.

    Example:
        >>> import detent
        >>> fmt = detent.parse_scheme("w_int4_per_group_sym", group_size=128).weight
        >>> print(fmt)
        int4 per_group(128), float32 scale
        >>> fmt.bits_per_element((4096, 4096))
        4.25
    """

    element: Element
    granularity: Granularity
    scale: ScaleRule
    zero_point: ZeroPoint = "none"
    dynamic: bool = False
    base: Format | None = None

    def __post_init__(self) -> None:
        integer = isinstance(self.element, Integer)
        if self.zero_point not in get_args(ZeroPoint):
            raise DetentError(f"unknown zero point {self.zero_point!r}; known: {', '.join(get_args(ZeroPoint))}")
        if isinstance(self.scale, SearchedScale):
            self._check_searched(self.scale)
        elif self.zero_point == "minimum":
            raise DetentError(f"a minimum is stored under searched scales, not under a {self.scale}")
        elif self.zero_point != "none" and not (integer and isinstance(self.scale, FloatScale)):
            raise DetentError(f"a zero point needs an integer element with a float scale, not {self.element.name}")
        if self.zero_point == "midpoint" and not (isinstance(self.element, Integer) and not self.element.signed):
            raise DetentError("a midpoint belongs to unsigned symmetric integers")
        if isinstance(self.scale, PowerOfTwoScale):
            if isinstance(self.element, Table):
                raise DetentError("a lookup table takes a float scale, not a power of two")
            if self.scale.micro and not integer:
                raise DetentError("micro-exponents belong to integer elements (MX4, MX6, MX9)")
            run, group = self.scale.micro, self.granularity.group_size
            if run and (group is None or group % run):
                raise DetentError(f"micro-exponents need groups of multiples of {run} elements, not {self.granularity}")
        elif self.zero_point in ("int", "float") and self.scale.bits == 8:
            raise DetentError(f"a stored zero point needs a float32, bfloat16 or float16 scale, not {self.scale}")
        if self.base is not None:
            self._check_base(self.base)

    def _check_searched(self, rule: SearchedScale) -> None:
        lowest = self.element.minimum
        if self.zero_point not in ("none", "minimum") or isinstance(self.element, Float):
            raise DetentError("a searched scale is for integers and tables, with a stored minimum or without")
        if (self.zero_point == "minimum") != (lowest == 0) or (lowest == 0 and not isinstance(self.element, Integer)):
            raise DetentError("a stored minimum and unsigned integers belong together under a searched scale")
        if rule.tiles and self.granularity.kind != "per_group":
            raise DetentError(f"super-blocks are made of groups, not of tiles {self.granularity}")

    def _check_base(self, base: Format) -> None:
        one_float = base.granularity == per_tensor() and base.scale == FloatScale()
        if base.base is not None or not isinstance(base.element, Float) or not one_float:
            raise DetentError(f"the base of a progressive format is a float format per tensor, not [{base}]")
        if not isinstance(self.scale, FloatScale) or self.scale.outer or self.zero_point in ("int", "float"):
            raise DetentError(
                "a progressive format needs symmetric codes and a plain float scale over its base's codes"
            )

    @property
    def symmetric(self) -> bool:
        return self.zero_point in ("none", "midpoint")

    @property
    def has_outer_scale(self) -> bool:
        """Whether a `QTensor` stores an outer scale: that of the scales (``scale.outer``), or that of the base."""
        return self.scale.outer or self.base is not None

    @property
    def bits(self) -> int:
        """Bits of one code, scales aside."""
        return self.element.bits

    def bits_per_element(self, shape: tuple[int, ...] | None = None) -> float:
        """Bits of one element with everything stored for it: code, scale, zero point, micro-exponent.

        For a `shape` exact, a scale that covers the whole tensor included; without one, whatever covers a whole axis
        or tensor counts nothing (NVFP4 4.5, MXFP4 4.25, MX6 6, MX9 9, BFP16 9).
        """
        per_scale: float = self.scale.bits
        if self.zero_point == "int":
            per_scale += self.element.bits
        elif self.zero_point == "float":
            per_scale += 32
        elif self.zero_point == "minimum":
            per_scale *= 2
        if isinstance(self.scale, SearchedScale) and self.scale.tiles:
            per_scale += (32 if self.zero_point == "minimum" else 16) / self.scale.tiles
        shared = self.granularity.elements_per_scale(shape)
        bits = self.element.bits + (0.0 if math.isinf(shared) else per_scale / shared if shared else 0.0)
        if self.scale.micro:
            last = shape[-1] if shape else 0
            bits += -(-last // self.scale.micro) / last if last else 1 / self.scale.micro
        count = math.prod(shape) if shape is not None else 0
        if count and self.has_outer_scale:
            bits += 32 / count
        return bits

    def with_granularity(self, granularity: Granularity) -> Format:
        return replace(self, granularity=granularity)

    def with_scale_dtype(self, dtype: ScaleDtype) -> Format:
        """The same with scales stored as `dtype`, where the scale is a plain float; other scales stay as they are."""
        if not isinstance(self.scale, FloatScale) or self.scale.dtype not in ("float32", "bfloat16", "float16"):
            return self
        return replace(self, scale=replace(self.scale, dtype=dtype))

    def as_dynamic(self, dynamic: bool = True) -> Format:
        return replace(self, dynamic=dynamic)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description from which `from_dict` builds an equal format."""
        description = {
            "element": {"type": type(self.element).__name__, **asdict(self.element)},
            "granularity": asdict(self.granularity),
            "scale": {"type": type(self.scale).__name__, **asdict(self.scale)},
            "zero_point": self.zero_point,
            "dynamic": self.dynamic,
        }
        if self.base is not None:
            description["base"] = self.base.to_dict()
        return description

    @staticmethod
    def from_dict(description: dict[str, Any]) -> Format:
        """Raises DetentError where a field is missing, unknown or out of range."""
        try:
            element = dict(description["element"])
            granularity = description["granularity"]
            scale = dict(description["scale"])
            if "entries" in element:
                element["entries"] = tuple(element["entries"])
            base = description.get("base")
            return Format(
                element={"Integer": Integer, "Float": Float, "Table": Table}[element.pop("type")](**element),
                granularity=Granularity(
                    granularity["kind"], tuple((a, n) for a, n in granularity["blocks"]), granularity["rest"]
                ),
                scale=_RULES[scale.pop("type")](**scale),
                zero_point=description["zero_point"],
                dynamic=description["dynamic"],
                base=None if base is None else Format.from_dict(base),
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, DetentError):
                raise
            raise DetentError(f"not a format description: {description!r} ({error})") from error

    def __str__(self) -> str:
        asymmetric = {"int": " asymmetric", "float": " asymmetric (float zero point)", "minimum": " with a minimum"}
        symmetry = {"none": "", "midpoint": " symmetric", **asymmetric}
        parts = f"{self.element.name}{symmetry[self.zero_point]} {self.granularity}, {self.scale}"
        if self.dynamic:
            parts += ", dynamic"
        return parts + (f", on the codes of [{self.base}]" if self.base else "")


_RULES: dict[str, type[ScaleRule]] = {rule.__name__: rule for rule in (FloatScale, PowerOfTwoScale, SearchedScale)}


def integer(
    bits: int,
    granularity: Granularity | None = None,
    *,
    signed: bool = True,
    symmetric: bool = True,
    narrow: bool = False,
    rule: Literal["qmax", "half_range"] = "half_range",
    float_zero_point: bool = False,
    dynamic: bool = False,
) -> Format:
    """Integers of 2 to 8 bits. A symmetric unsigned format keeps the negative half: its zero is the code 2^(b-1)."""
    zero_point: ZeroPoint = "none" if signed else "midpoint"
    if not symmetric:
        zero_point = "float" if float_zero_point else "int"
    scale = FloatScale(rule=rule)
    return Format(Integer(bits, signed, narrow), granularity or per_tensor(), scale, zero_point, dynamic)


def fp8(kind: str = "e4m3", granularity: Granularity | None = None, *, dynamic: bool = False) -> Format:
    """FP8 with a float32 scale amax/448 (``e4m3``) or amax/57344 (``e5m2``)."""
    return small_float(kind, granularity or per_tensor(), dynamic=dynamic)


def small_float(
    kind: str, granularity: Granularity, *, scale_dtype: ScaleDtype = "float32", dynamic: bool = False
) -> Format:
    """FP8, FP6 or FP4 (``e4m3 e5m2 e3m2 e2m3 e2m1``) with a float scale of type `scale_dtype`."""
    return Format(_float_named(kind), granularity, FloatScale(dtype=scale_dtype), dynamic=dynamic)


def nf4(granularity: Granularity | None = None) -> Format:
    """NF4 by lookup, scale amax; blocks of 64 by default (QLoRA)."""
    return Format(el.NF4, granularity or per_group(64), FloatScale())


def mx(kind: str, *, rounding: Exponent = "even", block: int = 32, dynamic: bool = False) -> Format:
    """OCP MX: ``e4m3 e5m2 e3m2 e2m3 e2m1 int8`` in blocks of 32 under a power-of-two scale."""
    element: Element = Integer(8, narrow=True) if kind == "int8" else _float_named(kind)
    return Format(element, per_group(block), PowerOfTwoScale(rounding), dynamic=dynamic)


def nvfp4(block: int = 16, *, four_over_six: bool = False, scale: ScaleDtype = "e4m3", dynamic: bool = False) -> Format:
    """FP4 in groups of 16, an E4M3 scale per group, a float32 scale of the scales per tensor."""
    rule = FloatScale(dtype=scale, outer=True, four_over_six=four_over_six)
    return Format(el.E2M1, per_group(block), rule, dynamic=dynamic)


def bfp16(*, block: int = 8, dynamic: bool = False) -> Format:
    """Block floating point: int8 mantissas in blocks of 8 under one 8-bit exponent."""
    return Format(Integer(8), per_group(block), PowerOfTwoScale("carry"), dynamic=dynamic)


def micro_exponent(bits: int, *, dynamic: bool = False) -> Format:
    """MX4, MX6, MX9: blocks of 16 under an 8-bit exponent, pairs under a 1-bit one; a sign, 2, 4 or 7 mantissa bits."""
    mantissa = {4: 2, 6: 4, 9: 7}.get(bits)
    if mantissa is None:
        raise DetentError(f"micro-exponent formats are MX4, MX6 and MX9, not MX{bits}")
    return Format(Integer(mantissa + 1, narrow=True), per_group(16), PowerOfTwoScale("floor", micro=2), dynamic=dynamic)


def progressive(bits: int = 4, base: Format | None = None) -> Format:
    """Integers per output channel on the codes of an FP8 per-tensor format."""
    return replace(integer(bits, per_channel(0)), base=base or fp8())


def searched(
    element: Element,
    group: int,
    *,
    scale_bits: int = 16,
    signed_scale: bool = True,
    tiles: int = 0,
    scale_dtype: ScaleDtype = "float16",
) -> Format:
    """The formats of GGUF and MLX: see `SearchedScale`. Unsigned integers have a stored minimum."""
    zero_point: ZeroPoint = "minimum" if element.minimum == 0 else "none"
    return Format(element, per_group(group), SearchedScale(scale_bits, signed_scale, tiles, scale_dtype), zero_point)


def _float_named(kind: str) -> Float:
    known = {"e4m3": el.E4M3, "e5m2": el.E5M2, "e3m2": el.E3M2, "e2m3": el.E2M3, "e2m1": el.E2M1}
    if kind not in known:
        raise DetentError(f"unknown float element {kind!r}; known: {', '.join(known)}")
    return known[kind]
