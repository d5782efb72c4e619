"""What `encode` and `fake_quantize` refuse."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from detent.errors import DetentError
from detent.formats.exporting import exporting
from detent.formats.format import Format
from detent.formats.tiles import needs_nonnegative


def check_input(x: Tensor, name: str) -> None:
    """Refuse dtypes that can't be quantized."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise DetentError(f"{name}: can quantize float32, bfloat16 and float16, not {x.dtype}; convert it first")


def all_finite(x: Tensor) -> bool:
    """Whether a float tensor holds neither NaN nor infinity: the extremes of one with NaN are NaN, and unlike isfinite
    they need no second tensor."""
    return not x.numel() or bool(torch.isfinite(torch.stack(x.detach().aminmax())).all())


def check_values(x: Tensor, fmt: Format, name: str) -> None:
    """Refuse what no format can hold; `x` may be empty. While a graph is made it has no values."""
    if x.numel() == 0 or exporting():
        return
    if not all_finite(x):
        raise not_finite(name, x)
    if needs_nonnegative(fmt) and float(low := x.detach().amin()) < 0:
        raise DetentError(
            f"{name}: negative values (down to {float(low):.4g}) in an unsigned format without zero point;"
            " use a signed or asymmetric format"
        )


def check_scale(scale: Tensor | None, fmt: Format, x: Tensor, name: str) -> None:
    """Refuse scales made for a tensor of another shape."""
    grid = fmt.granularity.grid(tuple(x.shape))
    if scale is not None and x.numel() and scale.numel() != math.prod(grid):
        raise DetentError(
            f"{name}: {fmt.granularity} of shape {tuple(x.shape)} takes scales of shape {grid},"
            f" not {tuple(scale.shape)}; were they made for another tensor?"
        )


def not_finite(name: str, x: Tensor) -> DetentError:
    """The error for a tensor with NaN or infinity."""
    bad = int((~torch.isfinite(x.detach())).sum())
    return DetentError(
        f"{name}: {bad} of {x.numel()} values are NaN or infinite; quantization needs finite values,"
        " so check the checkpoint or the data that produced them"
    )
