"""Fast ways through the tile functions: cache-sized pieces on all cores, in float32 arithmetic where that is exact.

Nothing here defines anything. A piece takes `codes32`, whose bits are those of the definition in `tiles`, or that
definition itself: for formats that `codes32` doesn't have, for tiles whose scale is tiny or huge, on other devices than
CPUs, and where a caller's torch.compile traces. Simulating a piece is encoding and decoding it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from detent.formats import codes32, compiled
from detent.formats import tiles as tl
from detent.formats.elements import Float, Integer
from detent.formats.format import Format
from detent.formats.memory import in_parts, new_tensor
from detent.formats.packing import pack
from detent.formats.tiles import TileScale

#: Most elements of a piece: its float32 buffers stay in a core's L2 cache. A multiple of 8, for `pack`.
_PIECE = 1 << 16
#: The same where there are several threads: an operation on fewer than 2^15 elements runs in the thread that asked for
#: it, so that threads share pieces, not each operation.
SHARED_PIECE = (1 << 15) - 8
#: Tensors of fewer elements take the definition: their time is that of calling operations, and it calls fewer.
_SMALL = 1 << 12
#: Tiles from this length on have their largest magnitude found among integers, where they have 16 bits.
_LONG = 64
#: Elements that are worth a thread.
_PER_THREAD = 1 << 18

Piece = tuple[slice, slice]


def own_scale(tiles: Tensor, fmt: Format, outer: Tensor | None = None) -> tuple[TileScale, Tensor]:
    """The scales that the values of nonempty tiles ask for, and their largest magnitude: NaN or inf if any value is.

    `outer` is the scale of the scales, for formats that have one; by default the one that the largest value asks for.
    """
    low, high = ranges(tiles, fmt)
    largest = torch.maximum(-low.amin(), high.amax())
    if outer is None:
        outer = tl.outer_scale_of(fmt, largest)
    if not fmt.scale.four_over_six:
        stored = in_parts(lambda low, high: _present(tl.scale_from_range(fmt, low, high, outer)[:2]), low, high)
        return TileScale(stored[0], stored[1] if len(stored) > 1 else None, outer), largest
    value = torch.empty_like(high)

    def work(pieces: list[Piece]) -> None:
        for rows, _ in pieces:
            value[rows] = tl.choose_four_or_six(tiles[rows], fmt, low[rows], high[rows], outer).value

    share(_pieces(tiles, by_columns=False), work)
    return TileScale(value, None, outer), largest


def _present(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(t for t in tensors if t is not None)


def ranges(tiles: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """`tiles.tile_range`, in pieces."""
    count, length = tiles.shape
    if not _takes_pieces(tiles):
        return tl.tile_range(tiles, fmt)
    if length > _PIECE:
        found = [tl.tile_range(row, fmt) for row in tiles.split(1)]
        low, high = (torch.cat(bounds) for bounds in zip(*found, strict=True))
        return low, high
    low, high = (torch.empty(count, 1, dtype=torch.float32, device=tiles.device) for _ in range(2))

    def work(pieces: list[Piece]) -> None:
        room = torch.empty(_PIECE, dtype=torch.float32, device=tiles.device)
        for rows, _ in pieces:
            piece = tiles[rows]
            if tl.needs_sign(fmt):
                wide = room[: piece.numel()].view(piece.shape).copy_(piece)
                low[rows], high[rows] = wide.amin(1, keepdim=True), wide.amax(1, keepdim=True)
            else:
                high[rows] = largest_magnitudes(piece, room)

    share(_pieces(tiles), work)
    return (low, high) if tl.needs_sign(fmt) else (torch.neg(high, out=low), high)


def largest_magnitudes(piece: Tensor, room: Tensor) -> Tensor:
    """[rows, 1]: the largest magnitude of each row of a piece; `room`: float32 memory for as many elements.

    The bits of positive floats are in the order of the floats, and those of NaN come after infinity.
    """
    length = piece.shape[1]
    if piece.dtype.itemsize == 2 and length >= _LONG:
        magnitudes = room.view(torch.int16)[: piece.numel()].view(piece.shape)
        torch.bitwise_and(piece.view(torch.int16), 0x7FFF, out=magnitudes)
        return magnitudes.amax(1, keepdim=True).view(piece.dtype)
    wide = room[: piece.numel()].view(piece.shape).copy_(piece).abs_()
    if length >= 32:
        return wide.amax(1, keepdim=True)
    return torch.nn.functional.max_pool1d(wide.view(1, 1, -1), length, length).view(
        -1, 1
    )  # of short rows, twice as fast


def encode_tiles(tiles: Tensor, fmt: Format, scale: TileScale) -> tuple[Tensor, Tensor | None]:
    """(codes in the storage dtype, micro-exponents or None) of finite tiles."""
    if not _takes_pieces(tiles):
        grid, _, micro = tl.round_tiles(tiles, fmt, scale)
        return fmt.element.encode(grid), micro
    out = new_tensor(tiles.shape, fmt.element.storage_dtype, tiles.device)
    micro = None
    if fmt.scale.micro:
        micro = torch.empty(len(tiles), -(-tiles.shape[1] // fmt.scale.micro), dtype=torch.uint8, device=tiles.device)
    encode = _Encoder(tiles, fmt, scale)

    def work(pieces: list[Piece]) -> None:
        room = codes32.Scratch(_PIECE)
        for rows, columns in pieces:
            exponents = encode(rows, columns, room, part_of(out, rows, columns))
            if micro is not None and exponents is not None:
                micro[rows] = exponents

    share(_pieces(tiles, by_columns=micro is None), work)
    return out, micro


def encode_packed_tiles(tiles: Tensor, fmt: Format, scale: TileScale, out: Tensor, flip: bool) -> None:
    """The codes of finite tiles of multiples of 8 elements, densely packed into the bytes `out`; see `pack`."""
    encode, length = _Encoder(tiles, fmt, scale), tiles.shape[1]

    def work(pieces: list[Piece]) -> None:
        room = codes32.Scratch(_PIECE)
        codes = torch.empty(_PIECE, dtype=fmt.element.storage_dtype, device=tiles.device)
        for rows, columns in pieces:
            start = rows.start * length + columns.start
            count = (rows.stop - rows.start) * (columns.stop - columns.start)
            encode(rows, columns, room, codes[:count].view(rows.stop - rows.start, -1))
            out[start * fmt.bits // 8 : (start + count) * fmt.bits // 8] = pack(codes[:count], fmt.bits, flip=flip)

    share(_pieces(tiles), work)


def decode_tiles(codes: Tensor, fmt: Format, scale: TileScale, dtype: torch.dtype) -> Tensor:
    """The values of codes [tiles, n] without micro-exponents, rounded once to `dtype`, saturating."""
    if not _takes_pieces(codes):
        return tl.narrow(tl.rebuild(fmt.element.decode(codes), fmt, scale, tl.multiplier(fmt, scale)), dtype)
    out, decode = new_tensor(codes.shape, dtype, codes.device), _Decoder(fmt, scale, dtype)

    def work(pieces: list[Piece]) -> None:
        room = codes32.Scratch(_PIECE)
        for rows, columns in pieces:
            decode(part_of(codes, rows, columns), rows, room, part_of(out, rows, columns))

    share(_pieces(codes), work)
    return out


def simulate_static(tiles: Tensor, fmt: Format, scale: TileScale) -> tuple[Tensor, Tensor]:
    """(decode(encode(tiles)) in the dtype of `tiles`, largest magnitude of `tiles`: NaN or inf if any value is)."""
    low, high = torch.aminmax(tiles)
    return _simulate(tiles, fmt, scale), torch.maximum(-low, high).float()


def simulate_dynamic(tiles: Tensor, fmt: Format, outer: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same under the scales that the tiles' own values ask for; `outer` as for `own_scale`."""
    if compiled.pays(tiles, fmt) and tiles.shape[1] <= compiled.LONGEST_TILE:
        if outer is None and fmt.scale.outer:
            low, high = torch.aminmax(tiles)
            outer = tl.outer_scale_of(fmt, torch.maximum(-low, high).float())
        return compiled.simulate_dynamic(tiles, fmt, outer)
    scale, largest = own_scale(tiles, fmt, outer)
    return _simulate(tiles, fmt, scale), largest


def _simulate(tiles: Tensor, fmt: Format, scale: TileScale) -> Tensor:
    if not _takes_pieces(tiles):
        simulate = compiled.simulate_static if compiled.pays(tiles, fmt) else tl.simulate
        return simulate(tiles, fmt, scale)
    out = new_tensor(tiles.shape, tiles.dtype, tiles.device)
    encode, decode = _Encoder(tiles, fmt, scale), _Decoder(fmt, scale, tiles.dtype)

    def work(pieces: list[Piece]) -> None:
        room = codes32.Scratch(_PIECE)
        for rows, columns in pieces:
            part, piece = part_of(out, rows, columns), part_of(tiles, rows, columns)
            divisor = encode.divisor(rows)
            if divisor is None:
                part.copy_(tl.simulate(piece, fmt, rows_of(scale, rows)))
            else:
                decode.finish(codes32.values(piece, fmt, divisor, room), rows, part)

    share(_pieces(tiles, by_columns=not fmt.scale.micro), work)
    return out


class _Encoder:
    """Codes of pieces of `tiles`."""

    def __init__(self, tiles: Tensor, fmt: Format, scale: TileScale) -> None:
        self._tiles, self._fmt, self._scale = tiles, fmt, scale
        self._divisor = codes32.divisor_of(fmt, scale, tiles.dtype, tiles.shape[1]) if codes32.supports(fmt) else None
        self._regular = self._divisor is not None and bool(self._divisor.regular.all())

    def divisor(self, rows: slice) -> codes32.Divisor | None:
        """What these tiles are divided by in float32; None where the definition is needed."""
        divisor = None if self._divisor is None else self._divisor.rows(rows)
        return divisor if divisor is not None and (self._regular or bool(divisor.regular.all())) else None

    def __call__(self, rows: slice, columns: slice, room: codes32.Scratch, out: Tensor) -> Tensor | None:
        """Write codes into `out`; returns micro-exponents."""
        piece, divisor = part_of(self._tiles, rows, columns), self.divisor(rows)
        if divisor is not None:
            codes32.codes(piece, self._fmt, divisor, room, out)
            return None
        grid, _, micro = tl.round_tiles(piece, self._fmt, rows_of(self._scale, rows))
        out.copy_(self._fmt.element.encode(grid))
        return micro


class _Decoder:
    """Values of pieces of codes: `tiles.rebuild` and `tiles.narrow` in memory that is already allocated."""

    def __init__(self, fmt: Format, scale: TileScale, dtype: torch.dtype) -> None:
        #: A power of two below float32's range makes a product that is rounded once in either type.
        (unit,) = in_parts(
            lambda value: (tl.multiplier(fmt, scale._replace(value=value)).to(torch.float32),), scale.value
        )
        self._exact, self._scale = unit, scale
        self._element = fmt.element
        self._small = isinstance(fmt.element, Float) and fmt.element.exponent_bits <= 5
        self._table = None if isinstance(fmt.element, Integer) else fmt.element.table(unit.device)
        self._largest = torch.finfo(dtype).max
        #: No code is further from a zero point than 2^bits, or the largest value of a float.
        reach = max(2.0**fmt.element.bits, fmt.element.maximum) * float(self._exact.abs().amax())
        self._minimum = fmt.zero_point == "minimum"
        self._clamps = fmt.zero_point in ("float", "minimum") or not reach < self._largest

    def __call__(self, codes: Tensor, rows: slice, room: codes32.Scratch, out: Tensor) -> None:
        values = room.floats[: codes.numel()].view(codes.shape)
        if self._small and codes32.small_float_values(codes, self._element, room, values):  # type: ignore[arg-type]
            pass
        elif self._table is None:
            values.copy_(codes)
        else:
            index = room.more[: codes.numel()].view(torch.int32).view(codes.shape).copy_(codes.view(torch.uint8))
            torch.index_select(self._table, 0, index.view(-1), out=values.view(-1))
        self.finish(values, rows, out)

    def finish(self, values: Tensor, rows: slice, out: Tensor) -> None:
        """Scale values, in place, and write them into `out`."""
        zero_point, unit = self._scale.zero_point, self._exact
        if zero_point is not None and len(zero_point) > 1:
            zero_point = zero_point[rows]
        if zero_point is not None and not self._minimum:
            values.sub_(zero_point)
        values.mul_(unit if len(unit) == 1 else unit[rows])
        if zero_point is not None and self._minimum:
            values.add_(zero_point)
        out.copy_(values.clamp_(-self._largest, self._largest) if self._clamps else values)


# --- pieces ---


def _takes_pieces(tiles: Tensor) -> bool:
    return tiles.device.type == "cpu" and tiles.numel() >= _SMALL and not torch.compiler.is_compiling()


def _pieces(tiles: Tensor, by_columns: bool = True) -> list[Piece]:
    """Whole tiles, or parts of one tile where it fills a piece and `by_columns`."""
    count, length = tiles.shape
    most = _PIECE if torch.get_num_threads() == 1 else min(_PIECE, SHARED_PIECE)
    rows, columns = max(1, most // length), min(length, most) if by_columns else length
    return [
        (slice(top, min(top + rows, count)), slice(left, min(left + columns, length)))
        for top in range(0, count, rows)
        for left in range(0, length, columns)
    ]


def part_of(x: Tensor, rows: slice, columns: slice) -> Tensor:
    """``x[rows, columns]``, at half the cost where that is whole rows."""
    return x[rows] if columns.start == 0 and columns.stop == x.shape[1] else x[rows, columns]


def rows_of(scale: TileScale, rows: slice) -> TileScale:
    """The part of a TileScale that belongs to some tiles; one scale, and an outer scale, belong to all."""
    cut = [None if t is None else t if t.shape[0] == 1 else t[rows] for t in (scale.value, scale.zero_point)]
    return TileScale(cut[0], cut[1], scale.outer)  # type: ignore[arg-type]


def share(pieces: list[Piece], work: Callable[[list[Piece]], None]) -> None:
    """Call `work` with all pieces, spread over as many threads as pay off."""
    inference = torch.is_inference_mode_enabled()

    def in_mode(mine: list[Piece]) -> None:
        with torch.inference_mode(inference), torch.no_grad():  # modes belong to threads
            work(mine)

    workers = min(torch.get_num_threads(), len(pieces) * _PIECE // _PER_THREAD)
    if workers <= 1:
        in_mode(pieces)
        return
    shares = [pieces[len(pieces) * i // workers : len(pieces) * (i + 1) // workers] for i in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(in_mode, shares))
