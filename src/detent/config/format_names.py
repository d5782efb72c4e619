"""The grammar of format names: ``int4_per_group_sym``, ``fp8_per_token_dynamic``, ``mxfp6_e3m2``, ``fp4_scale_fp8``...

A name is an element followed by qualifiers in any order, joined by underscores::

    format    = element { qualifier }
    element   = int2..int8 | uint2..uint8 | fp8[_e4m3|_e5m2] | fp6[_e2m3|_e3m2] | fp4 | nf4
              | mxfp8[_e4m3|_e5m2] | mxfp6[_e2m3|_e3m2] | mxfp4 | mxint8 | mx4 | mx6 | mx9 | bfp16 | nvfp4
              | int2..int8 "_on_fp8"                              (integers on the codes of FP8)
              | q4_0 | q4_1 | q5_0 | q5_1 | q8_0 | q2_k .. q6_k | iq4_nl | iq4_xs | tq1_0 | tq2_0 | q1_0   (GGUF's)
              | bfloat16 | float16                                (not quantized)
    qualifier = per_tensor | per_channel | per_group | per_block | per_token | g<size> | sym | asym | static | dynamic
              | mse | percentile | entropy                        (how a range is calibrated; default: its maximum)
              | scale_float32 | scale_e4m3 | scale_fp8 | scale_ue5m3 | scale_ue5m3_global

Integer scales follow amax / ((qmax - qmin) / 2). `detent.config.schemes` puts formats together into schemes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from detent.config.base import shown
from detent.errors import DetentError
from detent.formats import (
    GGUF_FORMATS,
    Format,
    Granularity,
    bfp16,
    integer,
    micro_exponent,
    mx,
    nf4,
    nvfp4,
    per_block,
    per_channel,
    per_group,
    per_tensor,
    per_token,
    progressive,
    small_float,
)

Role = Literal["weight", "activation"]

#: Small floats: the variants that may follow the element, the first one meant where none does.
_VARIANTS = {"fp8": ("e4m3", "e5m2"), "fp6": ("e2m3", "e3m2"), "fp4": ("e2m1",)}
_UNQUANTIZED = ("bfloat16", "float16")
#: Formats that are one block of a certain size by definition.
_FIXED_GROUPS = {"mx": 32, "micro": 16, "bfp16": 8, "two_stage": 16}
_DEFAULT_GROUP = 128
#: Tensor types of GGUF that no other name stands for.
_GGUF = {name.lower(): fmt for name, fmt in GGUF_FORMATS.items() if not name.endswith("FP4")}
_SCALE_NAMES = ("float32", "e4m3", "fp8", "ue5m3", "ue5m3_global")

_ELEMENTS = (
    "int2 to int8, uint2 to uint8, fp8, fp6, fp4, nf4, mxfp8, mxfp6, mxfp4, mxint8, mx4, mx6, mx9, bfp16, nvfp4,"
    " bfloat16, and GGUF's " + ", ".join(_GGUF)
)


@dataclass(frozen=True)
class Options:
    """What the user specifies besides the name; None: not specified.

    Attributes:
        group_size: elements per group, for formats with groups.
        scale_format: ``e4m3`` (the default) or ``float32``: the group scale of FP4 and FP6.
        rounding: ``even``, ``floor`` or ``ceil``: the exponent rule of OCP MX formats.
    """

    group_size: int | None = None
    scale_format: str | None = None
    rounding: str = "even"

    def __post_init__(self) -> None:
        size = self.group_size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise DetentError(f"group_size: the number of elements in a group, 1 or more, not {size!r}")
        if self.scale_format not in (None, "e4m3", "float32"):
            raise DetentError(f"scale_format: e4m3 or float32, not {self.scale_format!r}")
        if self.rounding not in ("even", "floor", "ceil"):
            raise DetentError(f"scale_calculation_mode: even, floor or ceil, not {self.rounding!r}")


@dataclass(frozen=True)
class FormatName:
    """A parsed name: what it specifies, and None for what it leaves open."""

    element: str
    variant: str | None = None
    granularity: str | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    dynamic: bool | None = None
    observer: str | None = None
    scale: str | None = None

    @property
    def quantized(self) -> bool:
        return self.element not in _UNQUANTIZED

    @property
    def family(self) -> str:
        """``int``, ``float``, ``nf4``, ``mx``, ``micro``, ``bfp16``, ``two_stage``, ``progressive``, ``gguf`` or
        ``none``."""
        if not self.quantized:
            return "none"
        if self.element in _GGUF:
            return "gguf"
        if self.element.endswith("_on_fp8"):
            return "progressive"
        if re.fullmatch(r"u?int[2-8]", self.element):
            return "int"
        if self.element == "nvfp4" or self.scale == "fp8":
            return "two_stage"
        if re.fullmatch(r"mx[469]", self.element):
            return "micro"
        if self.element.startswith("mx"):
            return "mx"
        return "float" if self.element in _VARIANTS else self.element

    def filled_from(self, other: FormatName) -> FormatName:
        """This, with the granularity, symmetry, observer and scale that it leaves open taken from `other`."""
        shared = ("granularity", "group_size", "symmetric", "observer", "scale")
        return replace(self, **{field: getattr(other, field) for field in shared if getattr(self, field) is None})


def parse_name(tokens: list[str]) -> FormatName:
    """The parts of a name split at its underscores. Raises DetentError naming a part that isn't known."""
    rest = iter(tokens)
    element = next(rest, "")
    tail = list(rest)
    if tail and f"{element}_{tail[0]}" in _GGUF:
        element = f"{element}_{tail.pop(0)}"
    if re.fullmatch(r"int[2-8]", element) and tail[:2] == ["on", "fp8"]:
        element, tail = f"{element}_on_fp8", tail[2:]
    plain = element.removeprefix("mx")
    if not (
        re.fullmatch(r"(mx)?fp[468]|u?int[2-8](_on_fp8)?|mxint8|mx[469]|nf4|nvfp4|bfp16", element)
        or element in (*_UNQUANTIZED, *_GGUF)
    ):
        what = f"{shown(element)} is not the name of a format" if element else "the name of a format is missing"
        raise DetentError(f"{what}; known: {_ELEMENTS}")
    variant = None
    if tail and re.fullmatch(r"e\dm\d", tail[0]):
        variant = tail.pop(0)
        if variant not in _VARIANTS.get(plain, ()):
            allowed = " and ".join(_VARIANTS.get(plain, ())) or "no variants"
            raise DetentError(f"{element} has {allowed}, not {variant!r}")
    fields: dict[str, str | int | bool] = {}
    for key, value in _qualifiers(tail):
        if fields.setdefault(key, value) != value:
            raise DetentError(f"the name gives two values for its {key.replace('_', ' ')}: {fields[key]} and {value}")
    return FormatName(element, variant, **fields)  # type: ignore[arg-type]


def _qualifiers(tokens: list[str]) -> Iterator[tuple[str, str | int | bool]]:
    """(field of FormatName, value) for each qualifier."""
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if token == "per" and rest and rest[0] in ("tensor", "channel", "group", "block", "token"):
            yield "granularity", f"per_{rest.pop(0)}"
        elif token in ("sym", "asym"):
            yield "symmetric", token == "sym"
        elif token in ("static", "dynamic"):
            yield "dynamic", token == "dynamic"
        elif token in ("mse", "percentile", "entropy"):
            yield "observer", token
        elif token == "scale" and rest and rest[0] in _SCALE_NAMES:
            scale = rest.pop(0)
            if scale == "ue5m3" and rest[:1] == ["global"]:
                scale = f"ue5m3_{rest.pop(0)}"
            yield "scale", scale
        elif re.fullmatch(r"g[1-9]\d*", token):
            yield "group_size", int(token[1:])
        else:
            raise DetentError(
                f"unknown qualifier {shown(token)}; known: per_tensor, per_channel, per_group, per_block, per_token,"
                " g<size>, sym, asym, static, dynamic, mse, percentile, entropy, "
                + ", ".join(f"scale_{s}" for s in _SCALE_NAMES)
            )


def takes_group_size(name: FormatName, role: Role = "weight") -> int | bool:
    """True where a group size can be chosen, False where there are no groups, else the one possible size."""
    if size := _fixed_group(name):
        return size
    return name.quantized and _granularity_word(name, role) in ("per_group", "per_block")


def _fixed_group(name: FormatName) -> int | None:
    """The size of groups where a format has one by definition."""
    return _GGUF[name.element].granularity.group_size if name.family == "gguf" else _FIXED_GROUPS.get(name.family)


def takes_scale_format(name: FormatName, role: Role = "weight") -> bool:
    """Whether the scale format matters: FP4 and FP6 in groups."""
    return name.family == "float" and name.element != "fp8" and _granularity_word(name, role) == "per_group"


def build_format(name: FormatName, role: Role, options: Options) -> Format | None:
    """The format of a parsed name, None where it means "not quantized".

    For a weight, per_token means one scale per row, as per_channel does. For an activation, per_channel is read as
    per_token; scales per token, per group or per block are dynamic, others static unless the name says dynamic.
    """
    _check(name, role)
    if not name.quantized:
        return None
    dynamic = role == "activation" and (bool(name.dynamic) or _always_dynamic(name, role))
    return _family_format(name, role, options).as_dynamic(dynamic)


def _family_format(name: FormatName, role: Role, options: Options) -> Format:
    family = name.family
    if family == "gguf":
        return _GGUF[name.element]
    if family == "mx":
        plain = name.element.removeprefix("mx")
        kind = "int8" if plain == "int8" else name.variant or _VARIANTS[plain][0]
        return mx(kind, rounding=options.rounding)  # type: ignore[arg-type]
    if family == "micro":
        return micro_exponent(int(name.element[2:]))
    if family == "bfp16":
        return bfp16()
    if family == "two_stage":
        return nvfp4()
    if family == "progressive":
        return progressive(int(name.element[3]))
    granularity = _granularity(name, role, options)
    if family == "nf4":
        return nf4(granularity)
    if family == "int":
        signed = not name.element.startswith("u")
        symmetric = signed if name.symmetric is None else name.symmetric
        return integer(int(name.element[-1]), granularity, signed=signed, symmetric=symmetric)
    if name.scale == "ue5m3_global":
        return nvfp4(_group_size(name, options), scale="ue5m3")
    kind = name.variant or _VARIANTS[name.element][0]
    scale = name.scale
    if scale is None:
        scale = (options.scale_format or "e4m3") if takes_scale_format(name, role) else "float32"
    return small_float(kind, granularity, scale_dtype=scale)  # type: ignore[arg-type]


def _granularity_word(name: FormatName, role: Role) -> str:
    word = name.granularity
    if word is None and name.group_size is not None:
        word = "per_group"
    if word is None and (name.element in ("fp4", "fp6", "nf4") or name.scale is not None):
        word = "per_group"
    if word is None:
        word = "per_channel" if role == "weight" and name.family == "int" else "per_tensor"
    if role == "weight" and word == "per_token":
        return "per_channel"
    if role == "activation" and word == "per_channel":
        return "per_token"
    return word


def _granularity(name: FormatName, role: Role, options: Options) -> Granularity:
    word = _granularity_word(name, role)
    if word == "per_group":
        return per_group(_group_size(name, options))
    if word == "per_block":
        size = _group_size(name, options)
        return per_block({-1: size, -2: size})
    return {"per_tensor": per_tensor, "per_channel": per_channel, "per_token": per_token}[word]()


def _group_size(name: FormatName, options: Options) -> int:
    named, wanted = name.group_size, options.group_size
    if named and wanted and named != wanted:
        raise DetentError(f"the name asks for groups of {named}, group_size for {wanted}; leave one of them out")
    return named or wanted or (16 if name.scale in ("ue5m3", "ue5m3_global") else _DEFAULT_GROUP)


def _always_dynamic(name: FormatName, role: Role) -> bool:
    return _fixed_group(name) is not None or _granularity_word(name, role) in ("per_token", "per_group")


def _check(name: FormatName, role: Role) -> None:
    """Refuse combinations that mean nothing."""
    family, what = name.family, name.element
    if family == "none":
        return
    if name.symmetric is False and family != "int":
        raise DetentError(f"asym: {what} has no zero point; only integers do")
    if role == "weight" and name.dynamic:
        raise DetentError("dynamic describes activations; a weight doesn't change, so it has static scales")
    if role == "activation" and name.dynamic is False and _always_dynamic(name, role):
        raise DetentError(f"static: activations in {what} have one scale per token or block, not known in advance")
    size = _fixed_group(name)
    if size and (name.granularity not in (None, "per_group") or name.group_size not in (None, size)):
        raise DetentError(f"{what} has blocks of {size} along the last axis and no other granularity")
    if family == "gguf" and role == "activation":
        raise DetentError(f"{what} is a format of weights")
    if family == "progressive" and (role == "activation" or name.granularity not in (None, "per_channel")):
        raise DetentError(f"{what} is a format of weights, with one scale per channel")
    if name.granularity == "per_block" and (role == "activation" or what != "fp8"):
        raise DetentError("per_block: square blocks share a scale in weights of fp8 alone")
    if name.group_size is not None and name.granularity not in (None, "per_group", "per_block"):
        raise DetentError(f"g{name.group_size}: a group size goes with per_group, not {name.granularity}")
    if name.scale not in (None, "fp8"):
        if family != "float":
            raise DetentError(f"scale_{name.scale} belongs to fp8, fp6 and fp4; {what} has its own scale")
        if name.scale == "ue5m3_global" and what != "fp4":
            raise DetentError("scale_ue5m3_global belongs to fp4")
    if name.scale == "fp8" and what not in ("fp4", "nvfp4"):
        raise DetentError(f"scale_fp8 (a float32 scale of E4M3 scales) belongs to fp4, not {what}")


def parse_format(
    name: str,
    group_size: int | None = None,
    scale_format: str | None = None,
    scale_calculation_mode: str = "even",
    *,
    role: Role = "weight",
) -> Format:
    """The format that a name such as ``bfp16``, ``mx6`` or ``int4_per_group_asym`` stands for.

    Args:
        name: see the grammar at the head of this file.
        group_size, scale_format, scale_calculation_mode: as for `detent.config.parse_scheme`.
        role: activations may be dynamic, and per_channel is read as per_token for them. Where a weight is meant but the
            name says "dynamic", an activation is.

    Raises:
        DetentError: not a format name, or a combination that means nothing.
    """
    options = Options(group_size, scale_format, scale_calculation_mode)
    try:
        parsed = parse_name(name.lower().split("_"))
        if parsed.dynamic:
            role = "activation"
        built = build_format(parsed, role, options)
    except DetentError as error:
        raise DetentError(f"format {shown(name)}: {error}") from None
    if built is None:
        raise DetentError(f"format {shown(name)} is not quantized; give None, or disable the quantizer")
    check_options([(parsed, role)], options, f"format {shown(name)}")
    return built


def check_options(names: list[tuple[FormatName, Role]], options: Options, what: str) -> None:
    """Refuse an option that none of the formats can follow."""
    size = options.group_size
    if size is not None:
        possible = [takes_group_size(name, role) for name, role in names]
        if not any(p is True or (p is not False and p == size) for p in possible):
            fixed = sorted({int(p) for p in possible if p is not False})
            why = f"has blocks of {' and '.join(map(str, fixed))}" if fixed else "has no groups"
            raise DetentError(f"group_size {size}: {what} {why}; leave the group size out")
    if options.scale_format == "float32" and not any(takes_scale_format(name, role) for name, role in names):
        raise DetentError(f"scale_format float32: {what} has no FP4 or FP6 in groups to apply it to")
    if options.rounding != "even" and not any(name.family == "mx" for name, _ in names):
        raise DetentError(f"scale_calculation_mode {options.rounding}: {what} has no OCP MX format to apply it to")
