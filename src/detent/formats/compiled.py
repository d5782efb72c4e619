"""torch.compile over the tile functions, for large tensors on CUDA: one kernel instead of thirty.

A format is compiled once it has seen enough elements to repay the seconds that compiling takes, and only where Triton
is available. ``DETENT_COMPILE=0`` turns compiling off, ``DETENT_COMPILE=1`` compiles on first use.
"""

from __future__ import annotations

import logging
import os
import threading
import types
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from detent.formats import tiles as tl
from detent.formats.format import Format
from detent.formats.tiles import TileScale

_log = logging.getLogger(__name__)

#: Elements that a format must have seen before it is compiled, in tensors of at least `_COMPILE_FROM`.
_COMPILE_AFTER = 1 << 27
_COMPILE_FROM = 1 << 22
#: Longest tile whose range is found in the kernel that quantizes it.
LONGEST_TILE = 4096
#: Tiles as long as a usual group get a kernel each, with the length built in; longer ones share one for any length.
_LONGEST_BUILT_IN = 256

_seen: dict[Hashable, int] = {}
_kernels: dict[Hashable, Callable[..., Any]] = {}
_lock = threading.Lock()


def pays(tiles: Tensor, fmt: Format) -> bool:
    """Whether to compile for these tiles; never where they aren't on CUDA."""
    setting = os.environ.get("DETENT_COMPILE", "auto")
    if not tiles.is_cuda or setting == "0" or tiles.numel() < 2 or torch.compiler.is_compiling():
        return False
    if setting != "1":
        if tiles.numel() < _COMPILE_FROM:
            return False
        key = (fmt, tiles.dtype)
        _seen[key] = _seen.get(key, 0) + tiles.numel()
        if _seen[key] < _COMPILE_AFTER:
            return False
    return compiler_found()


@cache
def compiler_found() -> bool:
    from torch.utils._triton import has_triton

    return has_triton()


def simulate_static(tiles: Tensor, fmt: Format, scale: TileScale) -> Tensor:
    """`tiles.simulate` in one kernel."""
    result: Tensor = _kernel(_static, fmt, tiles.contiguous(), scale)
    return result


def simulate_dynamic(tiles: Tensor, fmt: Format, outer: Tensor | None) -> tuple[Tensor, Tensor]:
    """(the same under the scales that the tiles' own values ask for, largest magnitude) in one kernel."""
    result: tuple[Tensor, Tensor] = _kernel(_dynamic, fmt, tiles.contiguous(), outer)
    return result


def _static(fmt: Format, tiles: Tensor, scale: TileScale) -> Tensor:
    return tl.simulate(tiles, fmt, scale)


def _dynamic(fmt: Format, tiles: Tensor, outer: Tensor | None) -> tuple[Tensor, Tensor]:
    return tl.simulate(tiles, fmt, tl.scale_tiles(tiles, fmt, outer)), tiles.abs().amax()


def _kernel(function: Callable[..., Any], fmt: Format, tiles: Tensor, extra: TileScale | Tensor | None) -> Any:
    """``function(fmt, tiles, extra)``, compiled at the first call with tensors of this kind."""
    length = tiles.shape[1] if tiles.shape[1] <= _LONGEST_BUILT_IN else None
    # All that the compiler makes a variant for. Past its limit of variants per function it would give up.
    flat = [tiles, *(extra if isinstance(extra, TileScale) else (extra,))]
    kinds = tuple(None if t is None else (t.dim(), t.is_inference(), t.shape[:1] == (1,)) for t in flat)
    key = (function, fmt, tiles.dtype, length, kinds)
    with _lock:
        if key not in _kernels:
            _log.info("compiling %s for %s, %s", function.__name__, fmt, tiles.dtype)
            _kernels[key] = _compile(function, fmt)
        kernel = _kernels[key]
    for tensor in flat:
        if tensor is not None:
            for axis, size in enumerate(tensor.shape):
                if size > 1 and (axis == 0 or size > _LONGEST_BUILT_IN):
                    torch._dynamo.mark_dynamic(tensor, axis)
    with torch.no_grad(), torch.autocast("cuda", enabled=False):
        return kernel(tiles, extra)


def _compile(function: Callable[..., Any], fmt: Format) -> Callable[..., Any]:
    """Each kernel gets its own code object: the compiler's limit on recompilations counts per code object."""

    def body(tiles: Tensor, extra: Any) -> Any:
        return function(fmt, tiles, extra)

    own = types.FunctionType(body.__code__.replace(), globals(), body.__name__, None, body.__closure__)
    return torch.compile(own, fullgraph=True)
