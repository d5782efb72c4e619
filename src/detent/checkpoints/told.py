"""What the dtypes and shapes of the tensors beside a weight tell of its format, whoever wrote it."""

from __future__ import annotations

import math

import torch

from detent.checkpoints.records import LayerFormats
from detent.checkpoints.source import Source
from detent.errors import DetentError
from detent.formats import Format, fp8, integer, mx, nvfp4, per_block, per_channel, per_group, per_tensor
from detent.formats.scales import ScaleDtype

FP8 = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
FLOATS: dict[torch.dtype, ScaleDtype] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
_E8M0 = (torch.uint8, torch.float8_e8m0fnu)


def told_weights(source: Source, block: list[int] | None = None) -> dict[str, LayerFormats]:
    """The weights that the dtypes and shapes of the tensors beside them tell how to decode, by the name of the module;
    of experts that are one tensor, by the name of the tensor.

    Args:
        source: the opened folder.
        block: lengths of the blocks that share a scale of FP8, where config.json has them.

    Raises:
        DetentError: a scale that doesn't fit its weight.
    """
    found = {}
    for name in source:
        scale = next((full for end in ("_scale_inv", "_scale") if (full := name + end) in source.tensors), None)
        told = None if scale is None else _told(source, name, scale, block)
        if told is not None:
            found[name.removesuffix(".weight")] = LayerFormats(told[1], told[0])
    return found


def _told(source: Source, name: str, scale: str, block: list[int] | None) -> tuple[Format, tuple[int, ...]] | None:
    codes, scales = source.info(name), source.info(scale)
    shape = codes.shape
    if not shape or not scales.shape and codes.dtype == torch.uint8:
        return None
    groups = scales.shape[-1] if scales.shape else 0
    if codes.dtype in FP8:
        if scales.dtype in _E8M0 and scales.shape == (*shape[:-1], -(-shape[-1] // 32)):
            return mx(FP8[codes.dtype]), shape
        return _told_fp8(source, name, scale, block), shape
    if codes.dtype == torch.int8 and scales.dtype in FLOATS:
        return _told_int8(shape, scales.shape).with_scale_dtype(FLOATS[scales.dtype]), shape
    if codes.dtype != torch.uint8:
        return None
    shape = (*shape[:-1], 2 * shape[-1])
    if scales.dtype in _E8M0:
        return mx("e2m1"), shape
    if f"{name}_scale_2" in source.tensors and scales.dtype == torch.float8_e4m3fn and groups:
        return nvfp4(max(1, shape[-1] // groups)), shape
    return None


def _told_int8(shape: tuple[int, ...], scale: tuple[int, ...]) -> Format:
    """One scale for the tensor, each row, or each group of a row."""
    if math.prod(scale) == 1:
        return integer(8)
    if len(scale) > 1 and scale[-1] > 1:
        return integer(8, per_group(max(1, shape[-1] // scale[-1])))
    return integer(8, per_channel(0))


def _told_fp8(source: Source, name: str, scale: str, block: list[int] | None) -> Format:
    """FP8 under one scale for the tensor, or one for each block: `block`, one index, or a whole axis."""
    info, found = source.info(name), source.info(scale)
    shape, whole = info.shape, math.prod(found.shape) == 1
    # ModelOpt has an axis of length 1 behind each of those of a grid of blocks.
    sizes = found.shape[::2] if len(found.shape) == 2 * len(shape) and set(found.shape[1::2]) == {1} else found.shape
    grid = (*sizes, *(1,) * (len(shape) - len(sizes)))
    lengths = [None if n == 1 else max(1, size // max(1, n)) for n, size in zip(grid, shape, strict=False)]
    if block is not None and scale.endswith("_scale_inv"):
        whole, lengths[-2:] = False, block
    granularity = per_tensor() if whole else per_block(dict(enumerate(lengths, -len(shape))))
    if not whole and granularity.grid(shape) != grid:
        raise DetentError(
            f"{source.path / found.file}: {scale} has shape {found.shape}; its codes call for {granularity.grid(shape)}"
        )
    if not whole and lengths[0] == 1 and set(lengths[1:]) <= {None}:
        granularity = per_channel(0)
    if found.dtype not in (torch.float8_e8m0fnu, *FLOATS):
        raise DetentError(f"{source.path / found.file}: {scale} is {found.dtype}, which no scale of FP8 is")
    return fp8(FP8[info.dtype], granularity).with_scale_dtype(FLOATS.get(found.dtype, "float32"))
