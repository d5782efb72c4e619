"""Checks of single quantizer attributes: from what users write (tuples, lists, strings, JSON) to one normal form.

Each function takes a value and returns it in normal form, or raises a `DetentError` that names the attribute.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from detent.config.base import shown
from detent.errors import DetentError

CALIBRATORS = ("max", "histogram", "percentile", "entropy", "mse")

#: (exponent bits, mantissa bits) of the floats that `num_bits` may name.
FLOATS = ((4, 3), (5, 2), (3, 2), (2, 3), (2, 1), (1, 2), (0, 3), (3, 0))

#: More axes, or longer ones, than any tensor has.
_LARGEST_AXIS, _LARGEST_SIZE = 1_000, 2**62

_BLOCK_OPTIONS = ("type", "scale_bits", "scale_block_sizes", "four_over_six")


def float_bits(value: Any) -> tuple[int, int] | None:
    """(E, M) from (E, M), [E, M], "e4m3" or "E4M3"; None for anything else."""
    if isinstance(value, str) and (match := re.fullmatch(r"[eE](\d)[mM](\d)", value)):
        return int(match[1]), int(match[2])
    if isinstance(value, tuple | list) and len(value) == 2 and all(_is_int(v) for v in value):
        return value[0], value[1]
    return None


def num_bits(value: Any) -> int | tuple[int, int]:
    bits = float_bits(value)
    if bits in FLOATS:
        return bits
    if _is_int(value) and 2 <= value <= 8:
        return int(value)
    raise DetentError(
        f"num_bits: 2 to 8 for integers, or (exponent bits, mantissa bits) among {', '.join(map(str, FLOATS))},"
        f" also written 'e4m3', not {shown(value)}"
    )


def axis(value: Any) -> int | tuple[int, ...] | None:
    if value is None:
        return None
    if (number := _axis_number(value)) is not None and not isinstance(value, str):
        return number
    if isinstance(value, tuple | list) and value and all(_is_int(v) and abs(v) <= _LARGEST_AXIS for v in value):
        axes = tuple(int(v) for v in value)
        if len(set(axes)) == len(axes):
            return axes
    raise DetentError(f"axis: None, an axis number or a tuple of different ones, not {shown(value)}")


def block_sizes(value: Any) -> dict[int | str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise DetentError(f"block_sizes: a dictionary such as {{-1: 128}}, not {shown(value)}")
    result: dict[int | str, Any] = {}
    for key, size in value.items():
        number = _axis_number(key)
        if number is not None:
            if size is not None and not (_is_int(size) and 1 <= size <= _LARGEST_SIZE):
                raise DetentError(
                    f"block_sizes: axis {number} needs a positive size, or None for all of it, not {shown(size)}"
                )
            result[number] = size
        elif isinstance(key, str) and key in _BLOCK_OPTIONS:
            result[key] = _block_option(key, size)
        else:
            raise DetentError(
                f"block_sizes: unknown key {shown(key)}; known: an axis number, {', '.join(map(repr, _BLOCK_OPTIONS))}"
            )
    axes = [key for key in result if isinstance(key, int)]
    if not axes:
        raise DetentError("block_sizes: no axis is named; {-1: 128} means blocks of 128 along the last axis")
    if result.get("type") == "dynamic" and len(axes) != 1:
        raise DetentError(f"block_sizes: dynamic blocks run along exactly one axis, not {sorted(axes)}")
    if result.get("four_over_six") and result.get("scale_bits") != (4, 3):
        raise DetentError("block_sizes: four_over_six chooses between E4M3 scales; it needs 'scale_bits': (4, 3)")
    return result


def _block_option(key: str, value: Any) -> Any:
    if key == "type":
        if isinstance(value, str) and value in ("static", "dynamic"):
            return value
        raise DetentError(f"block_sizes: type is 'static' or 'dynamic', not {shown(value)}")
    if key == "scale_bits":
        bits = None if value is None else float_bits(value)
        if value is None or bits in ((8, 0), (4, 3)):
            return bits
        raise DetentError(
            "block_sizes: scale_bits is (8, 0) (a power of two, OCP MX) or (4, 3) (E4M3 under a float32 scale),"
            f" not {shown(value)}"
        )
    if key == "four_over_six":
        if isinstance(value, bool):
            return value
        raise DetentError(f"block_sizes: four_over_six is True or False, not {shown(value)}")
    if value is None:
        return None
    if isinstance(value, Mapping):
        sizes = {_axis_number(axis): size for axis, size in value.items()}
        if None not in sizes and all(size is None for size in sizes.values()):
            return sizes
    raise DetentError(
        "block_sizes: scale_block_sizes is None or {axis: None}, one outer scale per tensor; outer scales for parts of"
        f" it are not supported: {shown(value)}"
    )


def block_axes(sizes: Mapping[int | str, Any], ndim: int | None) -> dict[int, int | None]:
    """{axis: size} of checked block sizes, counted from the end where the rank is known."""
    axes = {key: size for key, size in sizes.items() if isinstance(key, int)}
    if ndim is None:
        return axes
    return {checked_axis(axis, ndim, "block_sizes") % ndim - ndim: size for axis, size in axes.items()}


def checked_axis(value: int, ndim: int, what: str) -> int:
    if not -ndim <= value < ndim:
        raise DetentError(f"{what} names axis {value}, but the tensor has {ndim} axes ({-ndim} to {ndim - 1})")
    return value


def bias(value: Any) -> dict[int | str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise DetentError(f"bias: a dictionary such as {{-2: None, 'type': 'static'}}, not {shown(value)}")
    allowed: dict[str, tuple[str, ...]] = {"type": ("static", "dynamic"), "method": ("mean", "max_min")}
    result: dict[int | str, Any] = {}
    for key, option in value.items():
        number = _axis_number(key)
        if number is not None and option is not None:
            raise DetentError(f"bias: axis {number} takes None: a bias covers all of an axis, not {shown(option)}")
        if number is not None:
            result[number] = None
        elif not isinstance(key, str) or key not in allowed:
            raise DetentError(f"bias: unknown key {shown(key)}; known: an axis number, 'type', 'method'")
        elif not isinstance(option, str) or option not in allowed[key]:
            raise DetentError(f"bias: {key} is {' or '.join(map(repr, allowed[key]))}, not {shown(option)}")
        else:
            result[key] = option
    if not any(isinstance(key, int) for key in result):
        raise DetentError("bias: no axis is named; {-2: None} means a bias that covers the whole of axis -2")
    return result


def calibrator(value: Any) -> Any:
    name = calibrator_name(value)
    arguments = tuple(value[1:]) if isinstance(value, tuple | list) else ()
    if isinstance(name, type):
        return (name, *arguments) if isinstance(value, tuple | list) else name
    if not isinstance(name, str) or name not in CALIBRATORS:
        raise DetentError(
            f"calibrator: {', '.join(CALIBRATORS)}, a pair (name, arguments) or a class, not {shown(value)}"
        )
    if not arguments:
        return name
    if len(arguments) == 1 and isinstance(arguments[0], Mapping):
        return name, dict(arguments[0])
    raise DetentError(f"calibrator: the arguments of {name!r} are one dictionary, not {shown(arguments)}")


def calibrator_name(value: Any) -> Any:
    """The name, or the class, of a calibrator with or without arguments."""
    if isinstance(value, tuple | list):
        return value[0] if value else None
    return value


def jsonable(value: Any) -> Any:
    """`value` as JSON can hold it: tuples as lists, numbers as keys in quotes; the checks above take both."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [jsonable(item) for item in value]
    return value


def _axis_number(key: Any) -> int | None:
    """An axis, also as JSON has it ("-1")."""
    if isinstance(key, str) and re.fullmatch(r"-?[0-9]{1,4}", key):
        key = int(key)
    return int(key) if _is_int(key) and abs(key) <= _LARGEST_AXIS else None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
