"""Fast ways through the tile functions: cache-sized pieces on all cores, and torch.compile where it pays.

Neither defines anything. Pieces run the functions of `tiles` themselves. What is compiled is either those functions or,
on CPUs and where it has the format, `float32.values`, which gives the same bits in a fifth of the time.

A format is compiled once it has seen enough elements to repay the seconds that compiling takes, and only where a C++
compiler (CPU) or Triton (CUDA) is there. ``DETENT_COMPILE=0`` turns compiling off, ``DETENT_COMPILE=1`` takes it at
once.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
import types
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from detent.formats import float32
from detent.formats import tiles as tl
from detent.formats.format import Format
from detent.formats.granularity import per_tensor
from detent.formats.scales import FloatScale
from detent.formats.tiles import TileScale

_log = logging.getLogger(__name__)

#: Elements in one piece of the plain path. Float64 intermediates stay in a core's L2 cache, and an operation on fewer
#: than 2^15 elements runs in the thread that asked for it: the pieces are spread over threads, not each operation.
_PIECE = 1 << 14
#: Longest tile whose range is found in the piece that quantizes it; longer ones take a pass over memory each.
_LONGEST_DYNAMIC_TILE = 4096
#: Elements that a format must have seen before it is compiled, in tensors of at least `_COMPILE_FROM` (a smaller one
#: takes milliseconds either way). A first kernel takes 10 to 40 s on two cores, later ones 3 to 10 s, those found in
#: the compiler's disk cache 1 s.
_COMPILE_AFTER = 1 << 27
_COMPILE_FROM = 1 << 22
#: Tiles as long as a usual group get a kernel each, with the length built in; longer ones share one for any length.
_LONGEST_BUILT_IN = 256

_seen: dict[Hashable, int] = {}
_kernels: dict[Hashable, Callable[..., Any]] = {}
_lock = threading.Lock()


def simulate_static(tiles: Tensor, fmt: Format, scale: TileScale) -> tuple[Tensor, Tensor]:
    """(decode(encode(tiles)) in the dtype of `tiles`, largest magnitude of `tiles`: NaN or inf if any value is)."""
    if _compiling_pays(tiles, fmt):
        if _has_float32_kernel(tiles, fmt):
            low, high = torch.aminmax(tiles)
            unit = tl.multiplier(fmt, scale).to(torch.float32)
            return _quantize(tiles.contiguous(), fmt, unit, scale.zero_point), torch.maximum(-low, high).float()
        return _kernel(_static, fmt, tiles.contiguous(), scale)
    return _plain(_static, tiles, fmt, scale)


def simulate_dynamic(tiles: Tensor, fmt: Format, outer: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same under the scales that the tiles' own values ask for.

    `outer` is the scale of the scales, for formats that have one; by default the one that the largest value asks for.
    """
    pays = _compiling_pays(tiles, fmt)
    if pays and _has_float32_kernel(tiles, fmt):
        tiles = tiles.contiguous()
        low, high = _range(tiles, fmt)
        largest = high.amax() if low is None else torch.maximum(-low.amin(), high.amax())
        unit, zero_point = _units(fmt, low, high, _outer(fmt, largest) if outer is None else outer)
        return _quantize(tiles, fmt, unit, zero_point), largest
    if outer is None and isinstance(fmt.scale, FloatScale) and fmt.scale.outer:
        low, high = torch.aminmax(tiles)
        outer = _outer(fmt, torch.maximum(-low, high).float())
    if tiles.shape[1] > _LONGEST_DYNAMIC_TILE and not _chooses(fmt):
        ranges = [tl.tile_range(row, fmt) for row in tiles.split(1)]
        low, high = (torch.cat(bounds) for bounds in zip(*ranges, strict=True))
        return simulate_static(tiles, fmt, tl.scale_from_range(fmt, low, high, outer))
    if pays:
        return _kernel(_dynamic, fmt, tiles.contiguous(), outer)
    return _plain(_dynamic, tiles, fmt, outer)


def _static(fmt: Format, tiles: Tensor, scale: TileScale) -> tuple[Tensor, Tensor]:
    return tl.simulate(tiles, fmt, scale), tiles.abs().amax()


def _dynamic(fmt: Format, tiles: Tensor, outer: Tensor | None) -> tuple[Tensor, Tensor]:
    return tl.simulate(tiles, fmt, tl.scale_tiles(tiles, fmt, outer)), tiles.abs().amax()


def _outer(fmt: Format, largest: Tensor) -> Tensor | None:
    if isinstance(fmt.scale, FloatScale) and fmt.scale.outer:
        return fmt.scale.outer_scale(largest, fmt.element)
    return None


def _chooses(fmt: Format) -> bool:
    """Whether a scale depends on more than the range of its tile."""
    return isinstance(fmt.scale, FloatScale) and fmt.scale.four_over_six


# --- the plain path ---


def _plain(function: Callable[..., Any], tiles: Tensor, fmt: Format, extra: Any) -> tuple[Tensor, Tensor]:
    if tiles.device.type != "cpu" or tiles.numel() <= _PIECE or torch.compiler.is_compiling():
        result: tuple[Tensor, Tensor] = function(fmt, tiles, extra)
        return result
    return _in_pieces(function, tiles, fmt, extra)


def _in_pieces(function: Callable[..., Any], tiles: Tensor, fmt: Format, extra: Any) -> tuple[Tensor, Tensor]:
    """`function` over pieces of rows, or of columns where one row fills a piece and its scale is known."""
    out = _new_output(tiles)
    count, length = tiles.shape
    columns = length if function is _dynamic else _PIECE
    rows = max(1, _PIECE // length)
    pieces = [
        (slice(top, top + rows), slice(left, left + columns))
        for top in range(0, count, rows)
        for left in range(0, length, columns)
    ]

    inference = torch.is_inference_mode_enabled()

    def work(mine: list[tuple[slice, slice]]) -> Tensor:
        largest = torch.zeros(())
        with torch.inference_mode(inference), torch.no_grad():  # modes belong to threads
            for piece in mine:
                out[piece], amax = function(fmt, tiles[piece], _rows_of(extra, piece[0]))
                largest = torch.maximum(largest, amax.float())
        return largest

    workers = min(torch.get_num_threads(), len(pieces))
    shares = [pieces[len(pieces) * i // workers : len(pieces) * (i + 1) // workers] for i in range(workers)]
    if workers == 1:
        return out, work(pieces)
    with ThreadPoolExecutor(workers) as pool:
        return out, torch.stack(list(pool.map(work, shares))).amax()


def _rows_of(extra: Any, rows: slice) -> Any:
    """The part of a TileScale that belongs to some rows; a scalar scale and an outer scale belong to all."""
    if not isinstance(extra, TileScale):
        return extra
    cut = [None if t is None else t if t.shape[0] == 1 else t[rows] for t in (extra.value, extra.zero_point)]
    return TileScale(cut[0], cut[1], extra.outer)  # type: ignore[arg-type]


def _new_output(tiles: Tensor) -> Tensor:
    """An empty tensor of the shape of `tiles`, in pages of 2 MiB where Linux grants them.

    The first write to a page makes the system clear and map it: with pages of 4 KiB that takes three times as long as
    copying the tensor. The advice (madvise, MADV_HUGEPAGE) changes neither contents nor lifetime, and may be ignored.
    """
    out = torch.empty(tiles.shape, dtype=tiles.dtype, device=tiles.device)
    page, advise = 1 << 21, _madvise()
    if advise is not None and out.device.type == "cpu" and out.nbytes >= 4 * page:
        start = -(-out.data_ptr() // page) * page
        advise(ctypes.c_void_p(start), ctypes.c_size_t((out.data_ptr() + out.nbytes - start) // page * page), 14)
    return out


@cache
def _madvise() -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


# --- the compiled path ---


def _compiling_pays(tiles: Tensor, fmt: Format) -> bool:
    setting = os.environ.get("DETENT_COMPILE", "auto")
    if setting == "0" or tiles.numel() < 2 or torch.compiler.is_compiling():
        return False
    if setting != "1":
        if tiles.numel() < _COMPILE_FROM:
            return False
        key = (fmt, tiles.dtype, tiles.device.type)
        _seen[key] = _seen.get(key, 0) + tiles.numel()
        if _seen[key] < _COMPILE_AFTER:
            return False
    return _compiler_found(tiles.device.type)


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


def _has_float32_kernel(tiles: Tensor, fmt: Format) -> bool:
    """CPU only: divisions on GPUs are not rounded correctly unless asked to, and float64 is no great loss there."""
    return tiles.device.type == "cpu" and float32.supports(fmt) and not _chooses(fmt)


def _range(tiles: Tensor, fmt: Format) -> tuple[Tensor | None, Tensor]:
    """(low, high) as `tiles.tile_range`, but None for a low that is -high."""
    if tiles.shape[0] == 1:
        return _range_body(tl.needs_sign(fmt), tiles)
    return _kernel(_range_body, tl.needs_sign(fmt), tiles)


def _units(fmt: Format, low: Tensor | None, high: Tensor, outer: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if high.shape[0] < _PIECE:
        return _units_body(fmt, high, low, outer)
    return _kernel(_units_body, _anywhere(fmt), high, low, outer)


def _quantize(tiles: Tensor, fmt: Format, unit: Tensor, zero_point: Tensor | None) -> Tensor:
    out = _new_output(tiles)
    if unit.numel() > 1:
        _kernel(_quantize_body, _anywhere(fmt), tiles, unit, zero_point, out)
    else:  # one run of numbers, whatever its shape: any number of cores can share it
        zero_point = None if zero_point is None else zero_point.reshape(())
        _kernel(_quantize_body, _anywhere(fmt), tiles.view(-1), unit.reshape(()), zero_point, out.view(-1))
    return out


def _range_body(needs_sign: bool, tiles: Tensor) -> tuple[Tensor | None, Tensor]:
    low, high = tl.low_and_high(tiles, needs_sign)
    return low if needs_sign else None, high


def _units_body(fmt: Format, high: Tensor, low: Tensor | None, outer: Tensor | None) -> tuple[Tensor, Tensor | None]:
    scale = tl.scale_from_range(fmt, -high if low is None else low, high, outer)
    return tl.multiplier(fmt, scale).to(torch.float32), scale.zero_point


def _quantize_body(fmt: Format, tiles: Tensor, unit: Tensor, zero_point: Tensor | None, out: Tensor) -> None:
    out.copy_(tl.narrow(float32.values(tiles, fmt, unit, zero_point), tiles.dtype))


def _anywhere(fmt: Format) -> Format:
    """The format without what its kernels don't depend on, so that they are shared."""
    return replace(fmt, granularity=per_tensor(), dynamic=False)


def _kernel(function: Callable[..., Any], about: Hashable, *tensors: Tensor | TileScale | None) -> Any:
    """``function(about, *tensors)``, compiled at the first call with tensors of this kind."""
    first = tensors[0]
    assert isinstance(first, Tensor)
    length = first.shape[1] if first.dim() == 2 and first.shape[1] <= _LONGEST_BUILT_IN else None
    # All that the compiler makes a variant for. Past its limit of variants per function it would give up.
    flat = [t for given in tensors for t in (given if isinstance(given, TileScale) else (given,))]
    kinds = tuple(None if t is None else (t.dim(), t.is_inference(), t.shape[:1] == (1,)) for t in flat)
    key = (function, about, first.dtype, first.device.type, length, kinds, torch.get_num_threads())
    with _lock:
        if key not in _kernels:
            _log.info("compiling %s for %s, %s, %s", function.__name__, about, first.dtype, first.device.type)
            _kernels[key] = _compile(function, about)
        kernel = _kernels[key]
    for tensor in flat:
        if tensor is not None:
            for axis, size in enumerate(tensor.shape):
                if size > 1 and (axis == 0 or size > _LONGEST_BUILT_IN):
                    torch._dynamo.mark_dynamic(tensor, axis)
    with torch.no_grad(), torch.autocast(first.device.type, enabled=False):
        return kernel(*tensors)


def _compile(function: Callable[..., Any], about: Hashable) -> Callable[..., Any]:
    """Each kernel gets a code object of its own: the compiler's limit on recompilations counts per code object."""

    def body(*tensors: Any) -> Any:
        return function(about, *tensors)

    own = types.FunctionType(body.__code__.replace(), globals(), body.__name__, None, body.__closure__)
    return torch.compile(own, fullgraph=True)
