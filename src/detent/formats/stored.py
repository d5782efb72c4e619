"""What codes and scales that come from a file must be: the shapes and dtypes that a format gives them, and values that
`encode` could have written. Anything else would silently decode to wrong numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from detent.errors import DetentError
from detent.formats.elements import Integer, Table
from detent.formats.format import Format
from detent.formats.qtensor import QTensor
from detent.formats.scales import PowerOfTwoScale, SearchedScale
from detent.formats.stored_scales import Scales

#: The byte that stands for NaN in E8M0 (OCP MX 1.0). Block floating point (``carry``) has a number there.
_E8M0_NAN = 255


def stored_layout(fmt: Format, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of each tensor of a `QTensor` of this format and shape, by the name of its field."""
    grid = fmt.granularity.grid(shape)
    layout = {"codes": (shape, fmt.element.storage_dtype), **scales_layout(fmt, grid)}
    if isinstance(fmt.scale, PowerOfTwoScale) and fmt.scale.micro:
        layout["micro"] = ((*shape[:-1], math.ceil(shape[-1] / fmt.scale.micro)), torch.uint8)
    return layout


def scales_layout(fmt: Format, grid: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of each tensor of the `Scales` of a grid of tiles, by the name of its field."""
    layout = {"scale": (grid, fmt.scale.stored_dtype)}
    zero_points = {"int": torch.int32, "float": torch.float32, "minimum": fmt.scale.stored_dtype}
    if fmt.zero_point in zero_points:
        layout["zero_point"] = (grid, zero_points[fmt.zero_point])
    if isinstance(fmt.scale, SearchedScale) and fmt.scale.tiles:
        shared = fmt.scale.blocks(grid)
        layout["outer_scale"] = ((*shared, 2) if fmt.zero_point == "minimum" else shared, torch.float16)
    elif fmt.has_outer_scale:
        layout["outer_scale"] = ((), torch.float32)
    return layout


def check_scales(fmt: Format, scales: Scales, where: str, *, of_weight: bool = False) -> None:
    """Refuse scales that are zero, negative, NaN or infinite, and zero points that are not codes.

    Args:
        fmt: of the codes.
        scales: as they were read.
        where: the file and tensor, for messages.
        of_weight: whether codes of a weight are under them: integers with one code more below zero than above may then
            have negative scales, which algorithms choose where the largest number of a tile is positive.

    Raises:
        DetentError: naming `where`, and what was found.
    """
    stored = scales.scale
    if isinstance(fmt.scale, SearchedScale):
        _check_searched(fmt.scale, scales, where)
        return
    if isinstance(fmt.scale, PowerOfTwoScale):
        if fmt.scale.rounding != "carry" and bool((stored == _E8M0_NAN).any()):
            raise DetentError(f"{where}: a scale is NaN (byte {_E8M0_NAN}); the file is damaged")
    else:
        element = fmt.element
        lopsided = isinstance(element, Integer) and element.signed and not element.narrow and fmt.zero_point == "none"
        values = fmt.scale.load(stored)
        _check_positive(values.abs() if of_weight and lopsided else values, "scale", where)
    if scales.outer_scale is not None:
        _check_positive(scales.outer_scale, "outer scale", where)
    zero = scales.zero_point
    if zero is None or not zero.numel():
        return
    low, high = float(zero.min()), float(zero.max())
    least, most = (fmt.element.minimum, fmt.element.maximum) if fmt.zero_point == "int" else (-math.inf, math.inf)
    if not (least <= low and high <= most and math.isfinite(low) and math.isfinite(high)):
        raise DetentError(
            f"{where}: zero points from {low:g} to {high:g}; {fmt.element.name} takes {least:g} to {most:g}"
        )


def _check_searched(rule: SearchedScale, scales: Scales, where: str) -> None:
    for name, stored in vars(scales).items():
        if stored is None or not stored.numel():
            continue
        low, high = (float(bound) for bound in torch.aminmax(stored.float()))
        least, most = (-math.inf, math.inf) if stored.dtype.is_floating_point else rule.limits
        if not (least <= low and high <= most and math.isfinite(low) and math.isfinite(high)):
            raise DetentError(f"{where}: {name} from {low:g} to {high:g}; {rule} takes {least:g} to {most:g}")


def check_codes(fmt: Format, codes: Tensor, where: str) -> None:
    """Refuse codes that stand for nothing: beyond the element's range, or NaN.

    Raises:
        DetentError: naming `where`.
    """
    if not codes.numel():
        return
    if codes.dtype.is_floating_point:
        # FP8: only bit patterns with all exponent bits set can be NaN or infinite.
        top = 0x7F if codes.dtype == torch.float8_e4m3fn else 0x7C
        pieces = codes.view(torch.uint8).flatten().split(1 << 17)
        if any(int((piece & 0x7F).amax()) >= top for piece in pieces):
            raise DetentError(f"{where}: the weight holds NaN or infinity; the file is damaged")
    elif isinstance(fmt.element, Integer | Table) and fmt.element.bits < 8 or isinstance(fmt.element, Table):
        least, most = (0, len(fmt.element.entries) - 1) if isinstance(fmt.element, Table) else _bounds(fmt.element)
        low, high = map(int, torch.aminmax(codes))
        if low < least or high > most:
            raise DetentError(f"{where}: codes from {low} to {high}; {fmt.element.name} has {least} to {most}")


def _bounds(element: Integer) -> tuple[int, int]:
    """The range of all codes of that width, the one that narrow formats leave out included."""
    least = -(2 ** (element.bits - 1)) if element.signed else 0
    return least, least + 2**element.bits - 1


def check_stored(q: QTensor, where: str) -> QTensor:
    """`q` itself, once its codes and scales are known to be ones that its format can have written.

    Raises:
        DetentError: naming `where`, the field, and what was found.
    """
    layout, found = stored_layout(q.format, q.shape), q.tensors()
    for name in layout.keys() | found.keys():
        have = (tuple(found[name].shape), found[name].dtype) if name in found else None
        if have != layout.get(name):
            raise DetentError(
                f"{where}: {name} is {_told(have)}, but {q.format} of shape {q.shape} has {_told(layout.get(name))}"
            )
    check_scales(q.format, q.scales, where, of_weight=True)
    check_codes(q.format, q.codes, where)
    return q


def _told(layout: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "missing" if layout is None else f"{layout[1]} {layout[0]}"


def _check_positive(values: Tensor, what: str, where: str) -> None:
    if not values.numel():
        return
    low, high = (float(v) for v in torch.aminmax(values.to(torch.float32)))
    if not (low > 0 and math.isfinite(high)):  # NaN makes both NaN
        raise DetentError(f"{where}: {what}s from {low:g} to {high:g}; they must be positive and finite")
