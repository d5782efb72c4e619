"""The layout of AutoAWQ, "gemm" version: integers of 4 bits, as vLLM, SGLang, GPTQModel and transformers read them.

``<module>.qweight`` int32 [in, out / 8] holds codes and ``.qzeros`` int32 [groups, out / 8] zero points; the i-th four
bits of a word, from the lowest on, are those of its column ``_ORDER[i]``. ``.scales`` float16 [groups, out]. A value is
(code - zero point) * scale, so that symmetric formats are stored with the zero point 8.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from detent.checkpoints.records import LayerCheckpoint, LayerFormats, ModelFormats
from detent.checkpoints.source import Source
from detent.checkpoints.weights_only import (
    Expected,
    WeightOnlyLayout,
    WeightOnlyReader,
    group_size,
    integers,
    unsigned,
)
from detent.errors import DetentError
from detent.external.files import check_as
from detent.external.weights_only_schemas import AwqConfig
from detent.formats import Format, Scales
from detent.formats.packing import pack_int32, unpack_int32

_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
_BACK = [_ORDER.index(column) for column in range(8)]


class AwqLayout(WeightOnlyLayout):
    """Writes the layout of AutoAWQ."""

    name = "awq"
    engines = ("vLLM", "SGLang", "GPTQModel", "transformers")
    bits = (4,)
    multiples = (1, 8)

    def can_hold(self, formats: ModelFormats) -> str | None:
        """None, or the reason why this layout can't hold the model."""
        if reason := super().can_hold(formats):
            return reason
        sizes = {name: group_size(layer.weight) for name, layer in formats.layers.items() if layer.weight is not None}
        first = next(iter(sizes))
        if other := next((name for name, size in sizes.items() if size != sizes[first]), None):
            return (
                f"awq holds one group size for all layers, and {first} has {sizes[first]} and {other} {sizes[other]};"
                " gptq holds several"
            )
        for key in _kept(formats):
            if caught := next((name for name in formats.layers if key in name), None):
                return f"awq does not hold {caught}: its readers leave out every layer with {key} in its name"
        return None

    def needs(self, formats: ModelFormats) -> dict[str, str]:
        """transformers calls GPTQModel."""
        return super().needs(formats) | {"transformers": "the package gptqmodel"}

    def layer_tensors(self, layer: LayerCheckpoint) -> dict[str, Tensor]:
        """The tensors of one layer, by their full names."""
        assert layer.weight is not None
        codes, zeros = unsigned(layer.weight)
        return {
            f"{layer.name}.qweight": _pack(codes.t()),
            f"{layer.name}.qzeros": _pack(zeros.t()),
            f"{layer.name}.scales": layer.weight.scale.t().contiguous(),
        }

    def quantization_config(self, formats: ModelFormats) -> dict[str, Any]:
        """What config.json says under "quantization_config"."""
        weight = next(layer.weight for layer in formats.layers.values() if layer.weight is not None)
        return {
            "quant_method": self.name,
            "version": "gemm",
            "bits": 4,
            "group_size": group_size(weight),
            "zero_point": True,
            "lm_head": "lm_head" in formats.layers,
            "modules_to_not_convert": _kept(formats),
        }


def _kept(formats: ModelFormats) -> list[str]:
    """What stays, as a part of names: the longest piece of a pattern that stands for itself."""
    literal = [max(re.split(r"\\d\+|\.\*|\$", name.removeprefix("re:")), key=len) for name in formats.ignored]
    return list(dict.fromkeys(re.sub(r"\\(.)", r"\1", part) for part in literal))


def _pack(codes: Tensor) -> Tensor:
    """Codes uint8 [rows, columns] as int32 [rows, columns / 8]."""
    rows, columns = codes.shape
    return pack_int32(codes.reshape(rows, columns // 8, 8)[..., _ORDER].reshape(rows, columns), 4)


def _unpack(words: Tensor) -> Tensor:
    rows, columns = words.shape
    return unpack_int32(words, 4, columns * 8).reshape(rows, columns, 8)[..., _BACK].reshape(rows, columns * 8)


class AwqReader(WeightOnlyReader):
    """Reads the layout of AutoAWQ, whether Detent or another tool wrote it."""

    parts = ("qweight", "qzeros", "scales")

    def __init__(self, source: Source) -> None:
        where = f"{source.path / 'config.json'}: quantization_config"
        self._told = check_as(AwqConfig, source.config["quantization_config"], where)
        super().__init__(source, AwqLayout())

    def _inferred(self, name: str) -> LayerFormats:
        width, words = self._matrix(f"{name}.qweight")
        size = self._told.group_size
        if size > 0 and width % size:
            raise DetentError(f"{self._place(f'{name}.qweight')} has {width} rows, no multiple of group_size {size}")
        # Without zero points a reader can only take 8 for all; with "zero_point": false they have to be that.
        scale = self.source.info(f"{name}.scales").dtype
        return LayerFormats((words * 8, width), integers(4, size, scale, symmetric=not self._told.zero_point))

    def _expected(self, name: str, fmt: Format, shape: tuple[int, ...]) -> Expected:
        out, width = shape
        groups = fmt.granularity.grid(shape)[1]
        zeros = {} if self._no_zeros else {"qzeros": ((groups, out // 8), torch.int32)}
        scales = {"scales": ((groups, out), fmt.scale.stored_dtype)}
        return {"qweight": ((width, out // 8), torch.int32), **zeros, **scales}

    @property
    def _no_zeros(self) -> bool:
        return not self._told.zero_point and not any(name.endswith(".qzeros") for name in self.source)

    def _unpacked(self, name: str, fmt: Format, shape: tuple[int, ...]) -> Tensor:
        return _unpack(self.source.tensor(f"{name}.qweight")).t().contiguous()

    def _scales(self, name: str, fmt: Format, shape: tuple[int, ...]) -> Scales:
        scale = self.source.tensor(f"{name}.scales").t().contiguous()
        if self._no_zeros:
            return Scales(scale)
        zeros = _unpack(self.source.tensor(f"{name}.qzeros")).t().contiguous()
        return Scales(scale, self._zero_points(name, fmt, zeros))
