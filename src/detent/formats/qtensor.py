"""`QTensor`, and the three verbs on it: `encode`, `decode`, `fake_quantize`.

Invariants:

* ``fake_quantize(x, fmt) == decode(encode(x, fmt))``, bit for bit, for every format, dtype and shape;
* ``encode(decode(q), q.format, q.scales) == q``: codes survive the way out and back under their own scales;
* `decode` needs nothing but the QTensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from detent.errors import DetentError
from detent.formats import tiles as tl
from detent.formats.elements import power_of_two
from detent.formats.format import Format
from detent.formats.granularity import from_tiles, to_tiles
from detent.formats.kernels import simulate_dynamic, simulate_static
from detent.formats.scales import FloatScale, PowerOfTwoScale
from detent.formats.tiles import TileScale


@dataclass(frozen=True, eq=False)
class Scales:
    """The stored scales of one tensor, in the shape that `Granularity.grid` gives (one per tensor: shape ()).

    Attributes:
        scale: float32/bfloat16/float16, float8_e4m3fn, or uint8 (a power-of-two exponent + 127; UE5M3 bit patterns).
        zero_point: int32 for ``int``, float32 for ``float``, else None (a midpoint is not stored).
        outer_scale: float32 scalar: the scale of the scales, or the scale of the base format; else None.
    """

    scale: Tensor
    zero_point: Tensor | None = None
    outer_scale: Tensor | None = None


@dataclass(frozen=True, eq=False)
class QTensor:
    """Codes with everything needed to read them. Two are equal if their formats, shapes and all their bits are.

    Attributes:
        format: what the codes mean.
        shape: the logical shape, also that of `codes`.
        codes: int8, uint8, float8_e4m3fn or float8_e5m2, one per element, not packed.
        scale, zero_point, outer_scale: see `Scales`.
        micro: uint8 0 or 1 per run of neighbours, ``[..., ceil(last / micro)]`` (MX4/6/9); else None.
    """

    format: Format
    shape: tuple[int, ...]
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    outer_scale: Tensor | None = None
    micro: Tensor | None = None

    @property
    def scales(self) -> Scales:
        return Scales(self.scale, self.zero_point, self.outer_scale)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QTensor):
            return NotImplemented
        ours, theirs = self.tensors(), other.tensors()
        return (
            (self.format, self.shape, ours.keys()) == (other.format, other.shape, theirs.keys())
            and all(ours[name].dtype == theirs[name].dtype for name in ours)
            and all(torch.equal(_bits(ours[name]), _bits(theirs[name])) for name in ours)
        )

    __hash__ = None  # type: ignore[assignment]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name, absent ones left out."""
        names = ("codes", "scale", "zero_point", "outer_scale", "micro")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def to(self, device: torch.device | str) -> QTensor:
        return QTensor(self.format, self.shape, **{n: t.to(device) for n, t in self.tensors().items()})

    def rows(self, start: int, stop: int) -> QTensor:
        """Some indices of the first axis, as views; both bounds lie between blocks that share a scale.

        Example:
            >>> q = encode(torch.randn(8, 64), df.integer(4, df.per_group(32)))
            >>> torch.equal(decode(q.rows(2, 4)), decode(q)[2:4])
            True
        """
        stop = min(stop, self.shape[0])
        grid = self.format.granularity
        tall = 1 if grid.kind == "per_tensor" else grid.lengths(self.shape)[0]
        if start % tall or (stop % tall and stop != self.shape[0]):
            raise DetentError(f"rows {start} to {stop}: {tall} rows share a scale, so they can't be taken apart")
        shape = (stop - start, *self.shape[1:])

        def cut(name: str, x: Tensor) -> Tensor:
            if name in ("codes", "micro"):
                return x[start:stop]
            return x[start // tall : -(-stop // tall)] if x.dim() == len(self.shape) else x

        return QTensor(self.format, shape, **{name: cut(name, x) for name, x in self.tensors().items()})


def _bits(x: Tensor) -> Tensor:
    """A tensor's bit patterns: unlike values, they tell 0 from -0 and find NaN equal to itself."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def scales_from_range(fmt: Format, low: Tensor, high: Tensor, *, amax_tensor: Tensor | None = None) -> Scales:
    """Scales for calibrated ranges.

    Args:
        fmt: the format; of a progressive format the range is that of the base's code values.
        low, high: float tensors of the grid's shape: smallest and largest value of each tile. ``-amax`` and ``amax``
            where only magnitudes are known.
        amax_tensor: for a format with an outer scale: the largest magnitude of the whole tensor, a scalar; by default
            the largest of the ranges.

    Raises:
        DetentError: a range isn't finite, or a low lies above its high.
    """
    low, high = low.to(torch.float32), high.to(torch.float32)
    if not bool((torch.isfinite(low) & torch.isfinite(high) & (low <= high)).all()):
        raise DetentError("calibrated ranges must be finite with low <= high; was the calibration data finite?")
    outer = None
    if isinstance(fmt.scale, FloatScale) and fmt.scale.outer:
        if amax_tensor is None:
            amax_tensor = torch.maximum(-low, high).amax() if low.numel() else low.new_zeros(())
        outer = fmt.scale.outer_scale(amax_tensor, fmt.element)
    return _stored(fmt, tl.scale_from_range(fmt, low, high, outer), tuple(low.shape))


def encode(
    x: Tensor,
    fmt: Format,
    scales: Scales | None = None,
    *,
    outer_scale: Tensor | None = None,
    name: str = "tensor",
) -> QTensor:
    """Codes of `x`, with `scales` or, by default, the scales that the values of `x` ask for.

    Args:
        x: float32, bfloat16 or float16, any shape and strides.
        fmt: the format.
        scales: scales to use as they are (shape of the grid).
        outer_scale: for a format with an outer scale and no `scales`: the float32 scalar to use instead of the one that
            the largest magnitude of `x` asks for (calibrated once, or shared by several tensors).
        name: what error messages call the tensor.

    Raises:
        DetentError: NaN or infinity in `x`; negative values for a format that holds none; an axis that `x` lacks;
            scales for another shape.
    """
    _check_input(x, name)
    if fmt.base is not None:
        return _encode_progressive(x, fmt, scales, name)
    shape = tuple(x.shape)
    tiles = _tiles(x, fmt)
    _check_values(x, fmt, name)
    _check_scales(scales, fmt, x, name)
    tile_scale = _own_scale(x, tiles, fmt, outer_scale, name) if scales is None else _tile_scale(fmt, scales)
    grid, _, micro = tl.round_tiles(tiles, fmt, tile_scale)
    stored = _stored(fmt, tile_scale, fmt.granularity.grid(shape)) if scales is None else scales
    codes = from_tiles(fmt.element.encode(grid), fmt.granularity, shape)
    return QTensor(fmt, shape, codes.contiguous(), **vars(stored), micro=_micro_out(micro, fmt, shape))


def decode(q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of `q`: computed in float32, rounded once to `dtype`, saturating (finite values stay finite)."""
    if q.format.base is not None:
        assert q.outer_scale is not None
        return tl.narrow(_decode_float32(q, _tile_scale(q.format, Scales(q.scale))) * q.outer_scale, dtype)
    return tl.narrow(_decode_float32(q, _tile_scale(q.format, q.scales)), dtype)


def fake_quantize(
    x: Tensor,
    fmt: Format,
    scales: Scales | None = None,
    *,
    outer_scale: Tensor | None = None,
    clip: tuple[Tensor, Tensor] | None = None,
    name: str = "tensor",
) -> Tensor:
    """``decode(encode(x, fmt, scales), x.dtype)`` with a straight-through gradient.

    Args:
        x: float32, bfloat16 or float16, any shape and strides.
        scales, outer_scale: as for `encode`.
        clip: (low, high), shaped like the scales. Where given, the gradient is zero for elements outside their range;
            by default the gradient of every element is passed on unchanged.
        name: what error messages call the tensor.

    Raises:
        DetentError: as `encode`.
    """
    _check_input(x, name)
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _StraightThrough.apply(x, fmt, scales, outer_scale, clip, name)
        return out
    return _fake_quantize(x, fmt, scales, outer_scale, name)


class _StraightThrough(torch.autograd.Function):
    """Rounding whose derivative is taken to be 1 (Bengio et al., arXiv 1308.3432), or 1 inside a clipping range."""

    @staticmethod
    def forward(ctx, x, fmt, scales, outer_scale, clip, name):  # type: ignore[no-untyped-def]
        ctx.inside = None
        if clip is not None:
            tiles = to_tiles(x, fmt.granularity)
            low, high = (bound.reshape(-1, 1).to(tiles.device, torch.float32) for bound in clip)
            ctx.inside = from_tiles((tiles >= low) & (tiles <= high), fmt.granularity, tuple(x.shape))
        return _fake_quantize(x, fmt, scales, outer_scale, name)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return (grad if ctx.inside is None else grad.where(ctx.inside, 0.0)), None, None, None, None, None


def _fake_quantize(x: Tensor, fmt: Format, scales: Scales | None, outer_scale: Tensor | None, name: str) -> Tensor:
    if fmt.base is not None:
        return decode(_encode_progressive(x, fmt, scales, name), x.dtype)
    if x.numel() == 0:
        return x.clone()
    x = x.detach()
    tiles = _tiles(x, fmt)
    if tl.needs_nonnegative(fmt):
        _check_values(x, fmt, name)
    if scales is not None:
        _check_scales(scales, fmt, x, name)
        out, largest = simulate_static(tiles, fmt, _tile_scale(fmt, scales))
    else:
        out, largest = simulate_dynamic(tiles, fmt, outer_scale)
    if not bool(torch.isfinite(largest)):
        raise _not_finite(name, x)
    return from_tiles(out, fmt.granularity, tuple(x.shape))


def _tiles(x: Tensor, fmt: Format) -> Tensor:
    return to_tiles(x.detach(), fmt.granularity, repeat_edge=fmt.zero_point == "float")


def _own_scale(x: Tensor, tiles: Tensor, fmt: Format, outer_scale: Tensor | None, name: str) -> TileScale:
    """The scales that the values themselves ask for."""
    return tl.scale_tiles(tiles, fmt, _outer(x, fmt, name, outer_scale))


def _outer(x: Tensor, fmt: Format, name: str, given: Tensor | None) -> Tensor | None:
    if not (isinstance(fmt.scale, FloatScale) and fmt.scale.outer):
        return None
    if given is not None:
        return given
    if x.numel() == 0:
        return torch.ones((), dtype=torch.float32, device=x.device)
    amax = torch.maximum(*(bound.abs() for bound in torch.aminmax(x))).to(torch.float32)
    if not bool(torch.isfinite(amax)):
        raise _not_finite(name, x)
    return fmt.scale.outer_scale(amax, fmt.element)


def _stored(fmt: Format, scale: TileScale, shape: tuple[int, ...]) -> Scales:
    zero_point = None
    if scale.zero_point is not None and fmt.zero_point != "midpoint":
        dtype = torch.int32 if fmt.zero_point == "int" else torch.float32
        zero_point = scale.zero_point.to(dtype).reshape(shape)
    return Scales(fmt.scale.store(scale.value).reshape(shape), zero_point, scale.outer)


def _tile_scale(fmt: Format, scales: Scales) -> TileScale:
    """Stored scales as the tile functions take them."""
    zero_point = scales.zero_point
    value = fmt.scale.load(scales.scale).reshape(-1, 1)
    if fmt.zero_point == "midpoint":
        zero_point = torch.full_like(value, 2.0 ** (fmt.element.bits - 1))
    elif zero_point is not None:
        zero_point = zero_point.reshape(-1, 1).to(torch.float32)
    return TileScale(value, zero_point, None if fmt.base is not None else scales.outer_scale)


def _decode_float32(q: QTensor, scale: TileScale) -> Tensor:
    fmt = q.format
    tiles = to_tiles(fmt.element.decode(q.codes), fmt.granularity)
    unit = tl.multiplier(fmt, scale)
    if q.micro is not None:
        assert isinstance(fmt.scale, PowerOfTwoScale)
        spread = q.micro.repeat_interleave(fmt.scale.micro, -1)[..., : q.shape[-1]]
        micro = to_tiles(spread.to(torch.int64), fmt.granularity)
        unit = power_of_two(scale.value + fmt.scale.unit_exponent(fmt.element) - micro)
    return from_tiles(tl.rebuild(tiles, fmt, scale, unit), fmt.granularity, q.shape)


def _micro_out(micro: Tensor | None, fmt: Format, shape: tuple[int, ...]) -> Tensor | None:
    """Micro-exponents of [tiles, runs] as [..., ceil(last / run)]: runs that only padding made are dropped."""
    if micro is None:
        return None
    assert isinstance(fmt.scale, PowerOfTwoScale)
    runs = -(-shape[-1] // fmt.scale.micro)
    blocks = fmt.granularity.grid(shape)
    per_row = blocks[-1] * micro.shape[1]
    return micro.to(torch.uint8).reshape(*blocks[:-1], per_row)[..., :runs].contiguous()


def _encode_progressive(x: Tensor, fmt: Format, scales: Scales | None, name: str) -> QTensor:
    """First codes of the base format, then `fmt` on the values of those codes."""
    assert fmt.base is not None
    outer = None if scales is None or scales.outer_scale is None else Scales(scales.outer_scale)
    base = encode(x, fmt.base, outer, name=name)
    values = fmt.base.element.decode(base.codes)
    plain = _without_base(fmt)
    q = encode(values, plain, None if scales is None else Scales(scales.scale, scales.zero_point), name=name)
    return QTensor(fmt, q.shape, q.codes, q.scale, q.zero_point, base.scale.to(torch.float32))


def _without_base(fmt: Format) -> Format:
    from dataclasses import replace

    return replace(fmt, base=None)


def _check_input(x: Tensor, name: str) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise DetentError(f"{name}: can quantize float32, bfloat16 and float16, not {x.dtype}; convert it first")


def _check_values(x: Tensor, fmt: Format, name: str) -> None:
    """Refuse what no format can hold; `x` may be empty."""
    if x.numel() == 0:
        return
    low, high = torch.aminmax(x.detach())
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise _not_finite(name, x)
    if tl.needs_nonnegative(fmt) and bool(low < 0):
        raise DetentError(
            f"{name}: negative values (down to {float(low):.4g}) in an unsigned format without zero point;"
            " use a signed or asymmetric format"
        )


def _check_scales(scales: Scales | None, fmt: Format, x: Tensor, name: str) -> None:
    """Refuse scales made for a tensor of another shape."""
    grid = fmt.granularity.grid(tuple(x.shape))
    if scales is not None and x.numel() and scales.scale.numel() != math.prod(grid):
        raise DetentError(
            f"{name}: {fmt.granularity} of shape {tuple(x.shape)} takes scales of shape {grid},"
            f" not {tuple(scales.scale.shape)}; were they made for another tensor?"
        )


def _not_finite(name: str, x: Tensor) -> DetentError:
    bad = int((~torch.isfinite(x.detach())).sum())
    return DetentError(
        f"{name}: {bad} of {x.numel()} values are NaN or infinite; quantization needs finite values,"
        " so check the checkpoint or the data that produced them"
    )


def all_finite(tensor: Tensor) -> bool:
    """Whether a float tensor holds neither NaN nor infinity: the extremes of one with NaN are NaN, and unlike isfinite
    they need no second tensor."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())
