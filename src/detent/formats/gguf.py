"""The number formats of GGUF's tensor types, by name; their bytes are in `detent.checkpoints.gguf.blocks`."""

from __future__ import annotations

from dataclasses import replace

from detent.formats.elements import IQ4, SIGN, Integer
from detent.formats.format import Format, mx, nvfp4, searched
from detent.formats.scales import SearchedScale


def _affine(bits: int, group: int, scale_bits: int = 16, tiles: int = 0) -> Format:
    """Unsigned integers with minimums, under unsigned scales where these are integers."""
    return searched(Integer(bits, signed=False), group, scale_bits=scale_bits, signed_scale=not tiles, tiles=tiles)


_TERNARY = searched(Integer(2, narrow=True), 256)

#: TQ1_0 and TQ2_0 have the same numbers and differ in how tightly they are packed.
GGUF_FORMATS: dict[str, Format] = {
    "Q4_0": searched(Integer(4), 32),
    "Q4_1": _affine(4, 32),
    "Q5_0": searched(Integer(5), 32),
    "Q5_1": _affine(5, 32),
    "Q8_0": searched(Integer(8, narrow=True), 32),
    "Q2_K": _affine(2, 16, 4, 16),
    "Q3_K": searched(Integer(3), 16, scale_bits=6, tiles=16),
    "Q4_K": _affine(4, 32, 6, 8),
    "Q5_K": _affine(5, 32, 6, 8),
    "Q6_K": searched(Integer(6), 16, scale_bits=8, tiles=16),
    "IQ4_NL": searched(IQ4, 32),
    "IQ4_XS": searched(IQ4, 32, scale_bits=6, tiles=8),
    "TQ1_0": _TERNARY,
    "TQ2_0": _TERNARY,
    "MXFP4": mx("e2m1"),
    "NVFP4": nvfp4(four_over_six=True),
    "Q1_0": searched(SIGN, 128),
}


def same_grid(a: Format, b: Format) -> bool:
    """Whether codes and scales of two formats mean the same: only the rule by which scales are chosen may differ."""
    if type(a.scale) is not type(b.scale) or isinstance(a.scale, SearchedScale):
        return a == b
    alike = (a.element, a.granularity, a.zero_point, a.base) == (b.element, b.granularity, b.zero_point, b.base)
    return alike and a.scale.stored_dtype == b.scale.stored_dtype and a.scale.outer == b.scale.outer


def as_gguf(fmt: Format) -> Format | None:
    """The format of GGUF that a weight's format becomes when it is exported there, None where there is none.

    A format that GGUF holds stays itself, and so does one that differs only in the rule for its scales (MXFP4, NVFP4).
    Integers in groups of 32 under plain scales become the type of their width: with zero points the one with a minimum
    (uint4: Q4_1, uint5: Q5_1), else the one without (int4: Q4_0, int5: Q5_0, int8: Q8_0).

    Example:
        >>> from detent.formats import integer, per_group
        >>> from detent.formats.gguf import GGUF_FORMATS, as_gguf
        >>> as_gguf(integer(4, per_group(32), signed=False, symmetric=False)) == GGUF_FORMATS["Q4_1"]
        True
        >>> as_gguf(integer(4, per_group(128))) is None
        True
    """
    fmt = replace(fmt, dynamic=False)
    if any(same_grid(fmt, known) for known in GGUF_FORMATS.values()):
        return fmt
    element, plain = fmt.element, fmt.scale.bits >= 16 and not fmt.scale.outer and fmt.base is None
    if not isinstance(element, Integer) or fmt.granularity.group_size != 32 or not plain:
        return None
    kind = {(4, True): "Q4_0", (4, False): "Q4_1", (5, True): "Q5_0", (5, False): "Q5_1", (8, True): "Q8_0"}
    name = kind.get((element.bits, fmt.symmetric))
    return None if name is None else GGUF_FORMATS[name]
