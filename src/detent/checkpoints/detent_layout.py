"""Detent's own layout: any format, at its true number of bits.

Tensors are named ``<module>.weight.codes``, ``.scale``, ``.zero_point``, ``.outer_scale``, ``.micro``, likewise
``<module>.input.*`` and ``.output.*``, ``<module>.low_rank.a`` and ``.b``, and ``<attention>.k.scale``, ``.v.*``,
``.q.*`` and ``.p.*``.
Codes, integer zero points and micro-exponents of b < 8 bits are packed densely, least significant bit first, each row
(first axis) on its own, negative integers in two's complement. All else is in config.json: see `describe`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from detent.checkpoints.layout import Layout
from detent.checkpoints.records import (
    ATTENTION_SIDES,
    LayerCheckpoint,
    LayerFormats,
    ModelFormats,
    assemble,
    describe,
    parse_description,
)
from detent.checkpoints.source import Source
from detent.errors import DetentError
from detent.formats import Format, Integer, PowerOfTwoScale, QTensor, Scales, SearchedScale
from detent.formats.packing import pack, unpack
from detent.formats.stored import check_scales, check_stored, scales_layout


class DetentLayout(Layout):
    """Writes Detent's own layout."""

    name = "detent"
    engines = ("detent", "transformers")

    def needs(self, formats: ModelFormats) -> dict[str, str]:
        """transformers loads it once `detent` is imported."""
        return {"detent": "", "transformers": "import detent first"}

    def can_hold(self, formats: ModelFormats) -> str | None:
        """None: it holds everything."""
        return None

    def layer_tensors(self, layer: LayerCheckpoint) -> dict[str, Tensor]:
        """The tensors of one layer, by their full names."""
        tensors = {}
        if layer.weight is not None:
            q = layer.weight
            tensors["weight.codes"] = _pack_bits(q.codes, q.format.element.bits)
            if q.micro is not None:
                tensors["weight.micro"] = _pack_bits(q.micro, 1)
            tensors |= _scale_tensors("weight", q.format, q.scales)
        for side, activation in (("input", layer.input), ("output", layer.output)):
            if activation is not None and activation.scales is not None:
                tensors |= _scale_tensors(side, activation.format, activation.scales)
        if layer.low_rank is not None:
            tensors |= dict(zip(("low_rank.a", "low_rank.b"), layer.low_rank, strict=True))
        return {f"{layer.name}.{name}": tensor for name, tensor in tensors.items()}

    def kv_tensors(self, module: str, *sides: Scales) -> dict[str, Tensor]:
        """The scales of one attention module's keys and values, and of queries and probabilities where these are
        quantized; zero points are kept as they are."""
        return {
            f"{module}.{side}.{name}": tensor
            for side, scales in zip(ATTENTION_SIDES, sides, strict=False)
            for name, tensor in vars(scales).items()
            if tensor is not None
        }

    def metadata(self, formats: ModelFormats, exact: Mapping[str, dict[str, str]]) -> dict[str, str]:
        """Nothing: config.json itself is exact."""
        return {}

    def quantization_config(self, formats: ModelFormats) -> dict[str, Any]:
        """What config.json says under "quantization_config"."""
        return {"quant_method": self.name, **describe(formats)}


def _scale_tensors(side: str, fmt: Format, scales: Scales) -> dict[str, Tensor]:
    tensors = {}
    widths = _packed_widths(fmt)
    if scales.scale.numel() or scales.outer_scale is None:
        tensors[f"{side}.scale"] = _pack_bits(scales.scale, widths["scale"]) if "scale" in widths else scales.scale
    if (zero := scales.zero_point) is not None:
        tensors[f"{side}.zero_point"] = _pack_bits(zero, widths["zero_point"]) if "zero_point" in widths else zero
    if scales.outer_scale is not None:
        tensors[f"{side}.outer_scale"] = scales.outer_scale
    return tensors


def _packed_widths(fmt: Format) -> dict[str, int]:
    """The bits of scales and zero points that are integers, by field."""
    if isinstance(fmt.scale, SearchedScale) and fmt.scale.tiles:
        return {"scale": fmt.scale.bits, "zero_point": fmt.scale.bits}
    return {"zero_point": fmt.element.bits} if fmt.zero_point == "int" else {}


def _as_rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """`shape` as (rows, columns): the first axis, and all others together; vectors and scalars are one row."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def _pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes of any shape as bytes [rows, ceil(columns * bits / 8)]; codes that fill their dtype as they are."""
    if bits == 8 and codes.dtype != torch.int32:
        return codes
    rows = codes.reshape(_as_rows(tuple(codes.shape)))
    return pack(rows.to(torch.uint8) if rows.dtype == torch.int32 else rows, bits)


def _packed(shape: tuple[int, ...], bits: int, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    """(shape, dtype) of what `_pack_bits` makes of codes."""
    if bits == 8 and dtype != torch.int32:
        return shape, dtype
    rows, columns = _as_rows(shape)
    return (rows, -(-columns * bits // 8)), torch.uint8


def _unpack_bits(stored: Tensor, bits: int, shape: tuple[int, ...], dtype: torch.dtype, signed: bool) -> Tensor:
    """The inverse of `_pack_bits`."""
    codes = unpack(stored, bits, _as_rows(shape)[1], torch.int8 if signed else torch.uint8)
    return codes.reshape(shape).to(dtype)


class DetentReader:
    """Reads Detent's own layout.

    Attributes:
        formats: the formats of the model.
        used: the names of all tensors that belong to quantized layers or to the key/value cache.
        described: True: shapes are part of its description.
    """

    described = True

    def __init__(self, source: Source) -> None:
        self.source = source
        self.formats = parse_description(source.config["quantization_config"], str(source.path / "config.json"))
        parts = {
            f"{name}.{side}."
            for name, layer in self.formats.layers.items()
            for side in ("weight", "input", "output")
            if getattr(layer, side) is not None
        }
        parts |= {f"{name}.low_rank." for name, layer in self.formats.layers.items() if layer.low_rank}
        ends = (".k.scale", ".v.scale", ".k.outer_scale", ".v.outer_scale")
        kv = [name.rsplit(".", 2)[0] for name in source if name.endswith(ends)]
        self._kv_modules = [] if self.formats.kv_cache is None else list(dict.fromkeys(kv))
        parts |= {f"{module}.{side}." for module in self._kv_modules for side in ATTENTION_SIDES}
        self.used = {name for name in source if name[: name.rfind(".") + 1] in parts}

    def layer(self, name: str) -> LayerCheckpoint:
        """The contents of one layer, read now.

        Raises:
            DetentError: a tensor is missing or has the wrong shape.
        """
        layer = self.formats.layers[name]
        return assemble(
            name,
            layer,
            lambda fmt: self._weight(name, fmt, layer.shape),
            lambda side, fmt: self._calibrated(f"{name}.{side}", fmt),
            self._low_rank(name, layer) if layer.low_rank else None,
        )

    def _low_rank(self, name: str, layer: LayerFormats) -> tuple[Tensor, Tensor]:
        out, width = layer.shape[0], math.prod(layer.shape[1:])
        matrices = []
        for matrix, shape in (("a", (layer.low_rank, width)), ("b", (out, layer.low_rank))):
            full = f"{name}.low_rank.{matrix}"
            info = self.source.info(full)
            if info.shape != shape:
                raise DetentError(f"{self.source.path / info.file}: {full} is {info.shape}, not {shape}")
            matrices.append(self.source.tensor(full))
        return matrices[0], matrices[1]

    def kv_scales(self) -> dict[str, tuple[Scales, ...]]:
        """Scales of keys, values and, where these are quantized, queries and probabilities, by attention module; empty
        where none were calibrated."""
        kv, attention = self.formats.kv_cache, self.formats.attention
        sides = [(s, fmt) for s, fmt in zip(ATTENTION_SIDES, (kv, kv, attention, attention), strict=True) if fmt]
        return {name: tuple(self._calibrated(f"{name}.{s}", fmt) for s, fmt in sides) for name in self._kv_modules}

    def check(self) -> None:
        """Look at everything but codes. Raises DetentError as `CompressedTensorsReader.check`."""
        for name, layer in self.formats.layers.items():
            if layer.weight is not None:
                self._expect_codes(f"{name}.weight.codes", layer.shape, layer.weight)
                self._scales(f"{name}.weight", layer.weight, layer.weight.granularity.grid(layer.shape))
            for side, fmt in layer.calibrated:
                self._calibrated(f"{name}.{side}", fmt)
            if layer.low_rank:
                self._low_rank(name, layer)
        self.kv_scales()

    def _expect(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Raise DetentError unless a tensor is there with this shape and dtype."""
        info = self.source.info(name)
        if (info.shape, info.dtype) != (shape, dtype):
            raise DetentError(
                f"{self.source.path / info.file}: {name} is {info.dtype} {info.shape},"
                f" not {dtype} {shape} as config.json says"
            )

    def _tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self._expect(name, shape, dtype)
        return self.source.tensor(name)

    def _expect_codes(self, name: str, shape: tuple[int, ...], fmt: Format) -> None:
        self._expect(name, *_packed(shape, fmt.element.bits, fmt.element.storage_dtype))

    def _codes(self, name: str, shape: tuple[int, ...], bits: int, dtype: torch.dtype, signed: bool) -> Tensor:
        stored = self._tensor(name, *_packed(shape, bits, dtype))
        whole = bits == 8 and dtype != torch.int32  # packed codes may have the same shape: 3 of 6 bits are 3 bytes
        return stored if whole else _unpack_bits(stored, bits, shape, dtype, signed)

    def _weight(self, name: str, fmt: Format, shape: tuple[int, ...]) -> QTensor:
        signed = isinstance(fmt.element, Integer) and fmt.element.signed
        codes = self._codes(f"{name}.weight.codes", shape, fmt.element.bits, fmt.element.storage_dtype, signed)
        scales = self._scales(f"{name}.weight", fmt, fmt.granularity.grid(shape))
        micro = None
        if isinstance(fmt.scale, PowerOfTwoScale) and fmt.scale.micro:
            runs = (*shape[:-1], -(-shape[-1] // fmt.scale.micro))
            micro = self._codes(f"{name}.weight.micro", runs, 1, torch.uint8, False)
        q = QTensor(fmt, shape, codes, scales.scale, scales.zero_point, scales.outer_scale, micro)
        return check_stored(q, f"{self.source.path}: {name}")

    def _scales(self, prefix: str, fmt: Format, grid: tuple[int, ...]) -> Scales:
        widths, found = _packed_widths(fmt), {}
        for field, (shape, dtype) in scales_layout(fmt, grid).items():
            name = f"{prefix}.{field}"
            if field in widths:
                signed = dtype == torch.int8 or (dtype == torch.int32 and fmt.element.minimum < 0)
                found[field] = self._codes(name, shape, widths[field], dtype, signed)
            else:
                found[field] = self._tensor(name, shape, dtype)
        return self._checked(prefix, fmt, Scales(**found), of_weight=prefix.endswith(".weight"))

    def _checked(self, prefix: str, fmt: Format, scales: Scales, *, of_weight: bool = False) -> Scales:
        check_scales(fmt, scales, f"{self.source.path}: {prefix}", of_weight=of_weight)
        return scales

    def _calibrated(self, prefix: str, fmt: Format) -> Scales:
        """Activation scales have whatever shape calibration gave them: one per tensor, or one per channel."""
        if f"{prefix}.scale" not in self.source.tensors and fmt.has_outer_scale:
            empty = torch.empty(0, dtype=fmt.scale.stored_dtype)
            outer = self._tensor(f"{prefix}.outer_scale", (), torch.float32)
            return self._checked(prefix, fmt, Scales(empty, outer_scale=outer))
        return self._scales(prefix, fmt, self.source.info(f"{prefix}.scale").shape)
