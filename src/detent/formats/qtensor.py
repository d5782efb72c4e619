"""`QTensor`, and the three verbs on it: `encode`, `decode`, `fake_quantize`.

Invariants:

* ``fake_quantize(x, fmt) == decode(encode(x, fmt))``, bit for bit, for every format, dtype and shape;
* ``encode(decode(q), q.format, q.scales) == q``: codes survive the way out and back under their own scales;
* `decode` needs only the QTensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detent.errors import DetentError
from detent.formats import tiles as tl
from detent.formats.checks import check_input, check_scale, check_values, not_finite
from detent.formats.elements import power_of_two
from detent.formats.exporting import exporting
from detent.formats.format import Format
from detent.formats.granularity import from_tiles, rows_suffice, to_tiles
from detent.formats.kernels import (
    decode_tiles,
    encode_packed_tiles,
    encode_tiles,
    own_scale,
    simulate_dynamic,
    simulate_static,
)
from detent.formats.memory import new_tensor
from detent.formats.packing import pack
from detent.formats.scales import PowerOfTwoScale, SearchedScale
from detent.formats.search import search_scales
from detent.formats.stored_scales import Scales, stored_scales, tile_scale
from detent.formats.tiles import TileScale


@dataclass(frozen=True, eq=False)
class QTensor:
    """Codes with everything needed to read them. Two are equal if their formats, shapes and all their bits are.

    Attributes:
        format: what the codes mean.
        shape: the logical shape, also that of `codes`.
        codes: int8, uint8, float8_e4m3fn or float8_e5m2, one per element, not packed.
        scale, zero_point, outer_scale: see `Scales`.
        micro: uint8 0 or 1 per run of neighbours, ``[..., ceil(last / micro)]`` (MX4/6/9); else None.

    Example:
        >>> import torch, detent
        >>> fmt = detent.parse_scheme("w_int8_per_channel_sym").weight
        >>> q = detent.encode(torch.tensor([[127.0, -64.0], [1.0, 0.5]]), fmt)
        >>> q.codes
        tensor([[127, -64],
                [127,  64]], dtype=torch.int8)
        >>> q.scale
        tensor([[0.9961],
                [0.0078]])
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
        same_form = (self.format, self.shape, ours.keys()) == (other.format, other.shape, theirs.keys())
        return same_form and all(same_bits(ours[name], theirs[name]) for name in ours)

    __hash__ = None  # type: ignore[assignment]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name, absent ones left out."""
        names = ("codes", "scale", "zero_point", "outer_scale", "micro")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def to(self, device: torch.device | str) -> QTensor:
        return QTensor(self.format, self.shape, **{n: t.to(device) for n, t in self.tensors().items()})

    def rows(self, start: int, stop: int) -> QTensor:
        """Some indices of the first axis, as views; both bounds are between blocks that share a scale.

        Example:
            >>> import torch
            >>> from detent.formats import decode, encode, integer, per_group
            >>> q = encode(torch.randn(8, 64), integer(4, per_group(32)))
            >>> torch.equal(decode(q.rows(2, 4)), decode(q)[2:4])
            True
        """
        stop = min(stop, self.shape[0])
        grid = self.format.granularity
        tall = 1 if grid.kind == "per_tensor" else grid.lengths(self.shape)[0]
        if start % tall or (stop % tall and stop != self.shape[0]):
            raise DetentError(f"rows {start} to {stop}: {tall} rows share a scale, so they can't be split")
        shape = (stop - start, *self.shape[1:])

        def cut(name: str, x: Tensor) -> Tensor:
            if name in ("codes", "micro"):
                return x[start:stop]
            return x[start // tall : -(-stop // tall)] if x.dim() and x.dim() >= len(self.shape) else x

        return QTensor(self.format, shape, **{name: cut(name, x) for name, x in self.tensors().items()})


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit: unlike values, bits tell 0 from -0, and a NaN is itself.

    Decoding never needs to be compared: equal bits mean equal values. This reads each byte once.
    """
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(x: Tensor) -> Tensor:
    if x.numel() % 8 == 0 and x.is_contiguous() and x.storage_offset() % 8 == 0:
        return x.reshape(-1).view(torch.int64)  # eight bytes at a time
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def encode(
    x: Tensor,
    fmt: Format,
    scales: Scales | None = None,
    *,
    outer_scale: Tensor | None = None,
    importance: Tensor | None = None,
    name: str = "tensor",
) -> QTensor:
    """Codes of `x`, with `scales` or, by default, the scales that the values of `x` ask for.

    Args:
        x: float32, bfloat16 or float16, any shape and strides.
        fmt: the format.
        scales: scales to use as they are (shape of the grid).
        outer_scale: for a format with an outer scale and no `scales`: the float32 scalar to use instead of the one that
            the largest magnitude of `x` asks for (calibrated once, or shared by several tensors).
        importance: for a format that searches its scales (those of GGUF), in place of `scales`: float [n], what squared
            errors in each of the n columns are weighed with, such as the mean square of the input that they multiply.
        name: what error messages call the tensor.

    Raises:
        DetentError: NaN or infinity in `x`; negative values for a format that holds none; an axis that `x` lacks;
            scales for another shape; an importance that can't be used.

    Example:
        >>> import torch, detent
        >>> fmt = detent.parse_scheme("w_int4_per_group_sym", group_size=4).weight
        >>> detent.encode(torch.tensor([[7.0, -3.0, 1.4, 0.0]]), fmt).codes
        tensor([[ 7, -3,  1,  0]], dtype=torch.int8)
    """
    check_input(x, name)
    if importance is not None:
        if scales is not None or not isinstance(fmt.scale, SearchedScale):
            raise DetentError(f"{name}: an importance is for scales that are searched, not for [{fmt}]")
        check_values(x, fmt, name)
        scales = Scales(*search_scales(x, fmt, importance))
    if fmt.base is not None:
        return _encode_progressive(x, fmt, scales, name)
    shape = tuple(x.shape)
    tiles, scale, scales = _scaled_tiles(x, fmt, scales, outer_scale, name)
    codes, micro = encode_tiles(tiles, fmt, scale)
    codes = from_tiles(codes, fmt.granularity, shape).contiguous()
    return QTensor(fmt, shape, codes, **vars(scales), micro=_micro_out(micro, fmt, shape))


def encode_packed(
    x: Tensor,
    fmt: Format,
    scales: Scales | None = None,
    *,
    outer_scale: Tensor | None = None,
    word_bytes: int = 1,
    flip: bool = False,
    name: str = "tensor",
) -> tuple[Tensor, Scales]:
    """``pack(encode(x, fmt, ...).codes, fmt.bits, word_bytes)`` and its scales, where it can without unpacked codes.

    Args:
        x, fmt, scales, outer_scale, name: as for `encode`.
        word_bytes, flip: as for `packing.pack`.

    Returns:
        Bytes [..., ceil(n * bits / 8)], rounded up to whole words, of x [..., n]; and the scales. View them as
        ``torch.int32`` for `word_bytes` 4.

    Raises:
        DetentError: as `encode`; the format has micro-exponents, which are stored next to codes and scales.

    Example:
        >>> import torch
        >>> from detent.formats import integer, per_group
        >>> from detent.formats.qtensor import encode_packed
        >>> packed, scales = encode_packed(torch.randn(4, 256), integer(4, per_group(128)))
        >>> packed.shape
        torch.Size([4, 128])
    """
    if fmt.scale.micro:
        raise DetentError(f"{name}: packed codes leave out the micro-exponents of [{fmt}]; use encode")
    shape = tuple(x.shape)
    whole = shape and shape[-1] and (shape[-1] * fmt.bits) % (8 * word_bytes) == 0
    if fmt.base is not None or not whole or not x.numel() or not rows_suffice(fmt.granularity, shape):
        q = encode(x, fmt, scales, outer_scale=outer_scale, name=name)
        return pack(q.codes.reshape(shape or (1,)), fmt.bits, word_bytes, flip=flip), q.scales
    check_input(x, name)
    tiles, scale, scales = _scaled_tiles(x, fmt, scales, outer_scale, name)
    packed = new_tensor((*shape[:-1], shape[-1] * fmt.bits // 8), torch.uint8, x.device)
    encode_packed_tiles(tiles, fmt, scale, packed.view(-1), flip)
    return packed, scales


def decode(q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of `q`: computed in float32, rounded once to `dtype`, saturating (finite values stay finite).

    Example:
        >>> import torch, detent
        >>> fmt = detent.parse_scheme("w_int4_per_group_sym", group_size=4).weight
        >>> detent.decode(detent.encode(torch.tensor([[7.0, -3.0, 1.4, 0.0]]), fmt))
        tensor([[ 6.5333, -2.8000,  0.9333,  0.0000]])
    """
    fmt = q.format
    if fmt.base is not None:
        assert q.outer_scale is not None
        plain = QTensor(replace(fmt, base=None), q.shape, q.codes, q.scale)
        return tl.narrow(decode(plain) * q.outer_scale, dtype)
    if q.micro is not None:
        return tl.narrow(_decode_micro(q, q.micro), dtype)
    if not q.codes.numel():
        return q.codes.to(dtype)
    tiles = to_tiles(q.codes, fmt.granularity)
    return from_tiles(decode_tiles(tiles, fmt, tile_scale(fmt, q.scales), dtype), fmt.granularity, q.shape)


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

    Example:
        >>> import torch, detent
        >>> fmt = detent.parse_scheme("w_int4_per_group_sym", group_size=4).weight
        >>> x = torch.tensor([[7.0, -3.0, 1.4, 0.0]], requires_grad=True)
        >>> y = detent.fake_quantize(x, fmt)
        >>> y.detach()
        tensor([[ 6.5333, -2.8000,  0.9333,  0.0000]])
        >>> y.sum().backward()
        >>> x.grad
        tensor([[1., 1., 1., 1.]])
    """
    check_input(x, name)
    if torch.is_grad_enabled() and x.requires_grad and not exporting():
        through: Callable[..., Tensor] = _StraightThrough.apply
        return through(x, fmt, scales, outer_scale, clip, name)
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
    if tl.needs_nonnegative(fmt) or isinstance(fmt.scale, SearchedScale):
        check_values(x, fmt, name)
    if scales is None and isinstance(fmt.scale, SearchedScale):
        scales = Scales(*search_scales(x, fmt))
    if exporting():
        scale = tl.own_scales(tiles, fmt, outer_scale) if scales is None else tile_scale(fmt, scales)
        return from_tiles(tl.simulate(tiles, fmt, scale), fmt.granularity, tuple(x.shape))
    if scales is not None:
        check_scale(scales.scale, fmt, x, name)
        out, largest = simulate_static(tiles, fmt, tile_scale(fmt, scales))
    else:
        out, largest = simulate_dynamic(tiles, fmt, outer_scale)
    if not bool(torch.isfinite(largest)):
        raise not_finite(name, x)
    return from_tiles(out, fmt.granularity, tuple(x.shape))


def _tiles(x: Tensor, fmt: Format) -> Tensor:
    return to_tiles(x.detach(), fmt.granularity, repeat_edge=fmt.zero_point == "float")


def _scaled_tiles(
    x: Tensor, fmt: Format, scales: Scales | None, outer_scale: Tensor | None, name: str
) -> tuple[Tensor, TileScale, Scales]:
    """The tiles of `x`, found to be what `fmt` can hold, and their scales: those given, or else their own."""
    tiles, grid = _tiles(x, fmt), fmt.granularity.grid(tuple(x.shape))
    check_scale(None if scales is None else scales.scale, fmt, x, name)
    if scales is not None or not x.numel() or tl.needs_nonnegative(fmt):
        check_values(x, fmt, name)
    if scales is not None:
        return tiles, tile_scale(fmt, scales), scales
    if isinstance(fmt.scale, SearchedScale):
        check_values(x, fmt, name)
        scales = Scales(*search_scales(x, fmt))
        return tiles, tile_scale(fmt, scales), scales
    if not x.numel():
        empty = tl.scale_tiles(tiles, fmt, _outer_of_nothing(fmt, outer_scale, x.device))
        return tiles, empty, stored_scales(fmt, empty, grid)
    scale, largest = own_scale(tiles, fmt, outer_scale)
    if not bool(torch.isfinite(largest)):
        raise not_finite(name, x)
    return tiles, scale, stored_scales(fmt, scale, grid)


def _outer_of_nothing(fmt: Format, given: Tensor | None, device: torch.device) -> Tensor | None:
    if not fmt.scale.outer or given is not None:
        return given
    return torch.ones((), dtype=torch.float32, device=device)


def _decode_micro(q: QTensor, micro: Tensor) -> Tensor:
    fmt, rule = q.format, q.format.scale
    assert isinstance(rule, PowerOfTwoScale)
    spread = micro.repeat_interleave(rule.micro, -1)[..., : q.shape[-1]]
    exponent = tile_scale(fmt, q.scales).value + rule.unit_exponent(fmt.element)
    unit = power_of_two(exponent - to_tiles(spread.to(torch.int64), fmt.granularity))
    tiles = to_tiles(fmt.element.decode(q.codes), fmt.granularity)
    return from_tiles(tl.rebuild(tiles, fmt, tile_scale(fmt, q.scales), unit), fmt.granularity, q.shape)


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
    q = encode(
        values, replace(fmt, base=None), None if scales is None else Scales(scales.scale, scales.zero_point), name=name
    )
    return QTensor(fmt, q.shape, q.codes, q.scale, q.zero_point, base.scale.to(torch.float32))
