"""Fast ways through the tile functions: cache-sized pieces, and torch.compile where it pays.

Neither is a second definition: both run `tiles.simulate` itself, so their bits are those of the plain path. The
compiled way is taken once a format has seen enough elements to repay the seconds that compiling takes, and only where a
C++ compiler (CPU) or Triton (CUDA) is there; ``DETENT_COMPILE=0`` turns it off, ``DETENT_COMPILE=1`` takes it at once.
"""

from __future__ import annotations

import logging
import os
import types
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from detent.formats import tiles as tl
from detent.formats.format import Format
from detent.formats.tiles import TileScale

_log = logging.getLogger(__name__)

#: Elements in one piece of the plain path: small enough that float64 intermediates stay in a core's L2 cache.
_PIECE = 1 << 17
#: Elements that a format must have quantized in this process before compiling pays.
_COMPILE_AFTER = 1 << 25

_seen: dict[tuple[Any, ...], int] = {}


def simulate_static(tiles: Tensor, fmt: Format, scale: TileScale) -> tuple[Tensor, Tensor]:
    """(decode(encode(tiles)) in the dtype of `tiles`, largest magnitude of `tiles`: NaN or inf if any value is)."""
    return _run(_static, tiles, fmt, scale)


def simulate_dynamic(tiles: Tensor, fmt: Format, outer: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same under the scale that each tile's own values ask for."""
    return _run(_dynamic, tiles, fmt, outer)


def _static(tiles: Tensor, fmt: Format, scale: TileScale) -> tuple[Tensor, Tensor]:
    return tl.simulate(tiles, fmt, scale).to(tiles.dtype), tiles.abs().amax()


def _dynamic(tiles: Tensor, fmt: Format, outer: Tensor | None) -> tuple[Tensor, Tensor]:
    scale = tl.scale_tiles(tiles, fmt, outer)
    return tl.simulate(tiles, fmt, scale).to(tiles.dtype), tiles.abs().amax()


def _run(function: Callable[..., Any], tiles: Tensor, fmt: Format, extra: Any) -> tuple[Tensor, Tensor]:
    if _compiling_pays(function, tiles, fmt):
        return _compiled(function, fmt, tiles.dtype, tiles.device.type)(tiles, extra)
    if tiles.device.type != "cpu" or tiles.numel() <= _PIECE:
        result: tuple[Tensor, Tensor] = function(tiles, fmt, extra)
        return result
    return _in_pieces(function, tiles, fmt, extra)


def _in_pieces(function: Callable[..., Any], tiles: Tensor, fmt: Format, extra: Any) -> tuple[Tensor, Tensor]:
    """`function` over pieces of rows, or of columns where one row fills a piece and its scale is known."""
    out = torch.empty(tiles.shape, dtype=tiles.dtype)
    largest = torch.zeros(())
    count, length = tiles.shape
    columns = length if function is _dynamic else _PIECE
    rows = max(1, _PIECE // length)
    for top in range(0, count, rows):
        for left in range(0, length, columns):
            piece = (slice(top, top + rows), slice(left, left + columns))
            out[piece], amax = function(tiles[piece], fmt, _rows_of(extra, piece[0]))
            largest = torch.maximum(largest, amax.float())
    return out, largest


def _rows_of(extra: Any, rows: slice) -> Any:
    """The part of a TileScale that belongs to some rows; a scalar scale and an outer scale belong to all."""
    if not isinstance(extra, TileScale):
        return extra
    cut = [None if t is None else t if t.shape[0] == 1 else t[rows] for t in (extra.value, extra.zero_point)]
    return TileScale(cut[0], cut[1], extra.outer)  # type: ignore[arg-type]


def _compiling_pays(function: Callable[..., Any], tiles: Tensor, fmt: Format) -> bool:
    setting = os.environ.get("DETENT_COMPILE", "auto")
    if setting == "0" or torch.compiler.is_compiling() or not _compiler_found(tiles.device.type):
        return False
    if setting == "1":
        return True
    key = (function, fmt, tiles.dtype, tiles.device.type)
    _seen[key] = _seen.get(key, 0) + tiles.numel()
    return _seen[key] >= _COMPILE_AFTER


@cache
def _compiler_found(device_type: str) -> bool:
    """Whether torch.compile can produce code for this kind of device here."""
    if device_type == "cuda":
        from torch.utils._triton import has_triton

        return has_triton()
    if device_type != "cpu":
        return False
    from torch._inductor import cpp_builder, exc

    try:
        compiler = cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        _log.info("no C++ compiler: large tensors take the plain path, with the same results")
        return False
    _log.debug("torch.compile will use %s", compiler)
    return True


@cache
def _compiled(function: Callable[..., Any], fmt: Format, dtype: torch.dtype, device_type: str) -> Callable[..., Any]:
    """`function` compiled for one format. Each gets a code object of its own: the compiler's limit on recompilations
    counts per code object, and past it would run the slow path without a word."""

    def body(tiles: Tensor, extra: Any) -> tuple[Tensor, Tensor]:
        return function(tiles, fmt, extra)

    own = types.FunctionType(body.__code__.replace(), globals(), body.__name__, None, body.__closure__)
    compiled = torch.compile(own, fullgraph=True, dynamic=True)
    _log.info("compiling a kernel for %s (%s, %s)", fmt, dtype, device_type)
    return compiled
