"""The layout of MLX, as mlx-lm reads it.

``<module>.weight`` uint32 [out, in * b / 32] holds codes, packed along the input features from the lowest bit on, and
``.scales`` and ``.biases`` [out, groups] in the dtype of the model make them numbers: code * scale + bias. A bias is
the value of the code 0, so groups of 32, 64 or 128 have stored minimums; whatever the scheme says of zero points,
scales and biases of least squared error are searched. MXFP4 and MXFP8 have exponents of powers of two as uint8 in
``.scales``, and no biases. config.json has the settings under "quantization", those of layers that differ by their
names. Embeddings stay as they are.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from detent.checkpoints.records import LayerCheckpoint, LayerFormats, ModelFormats
from detent.checkpoints.source import Source
from detent.checkpoints.weights_only import SCALE_DTYPES, Expected, WeightOnlyLayout, WeightOnlyReader
from detent.config import Scheme
from detent.errors import DetentError
from detent.external.files import check_as
from detent.external.weights_only_schemas import MlxConfig
from detent.formats import E2M1, E4M3, FloatScale, Format, Integer, Scales, mx, searched
from detent.formats.packing import pack_int32, unpack_int32
from detent.formats.scales import PowerOfTwoScale, ScaleDtype, SearchedScale

BITS = (2, 3, 4, 5, 6, 8)
_GROUPS = (32, 64, 128)
_MX = {"mxfp4": (E2M1, "e2m1"), "mxfp8": (E4M3, "e4m3")}


class MlxLayout(WeightOnlyLayout):
    """Writes the layout of MLX."""

    name = "mlx"
    engines = ("MLX",)
    fuses = False
    scales_like_model = True
    bits = BITS

    def adapt(self, scheme: Scheme) -> Scheme:
        """Integers in groups with stored minimums."""
        fmt = scheme.weight
        if fmt is None or not isinstance(fmt.element, Integer) or not isinstance(fmt.scale, FloatScale) or fmt.base:
            return scheme
        size = fmt.granularity.group_size
        return scheme if size is None else replace(scheme, weight=_affine(fmt.bits, size, fmt.scale.dtype))

    def _grid_refusal(self, fmt: Format) -> str | None:
        if _mode(fmt) in _MX:
            return None
        if not isinstance(fmt.element, Integer) or fmt.granularity.group_size is None:
            return f"{fmt}; integers in groups, MXFP4 and MXFP8 are held"
        if fmt.bits not in self.bits or fmt.granularity.group_size not in _GROUPS:
            return f"{fmt}; {_told(self.bits)} bits in groups of {_told(_GROUPS)} are held"
        if fmt.zero_point != "minimum" or not isinstance(fmt.scale, SearchedScale) or fmt.scale.tiles:
            return f"{fmt}; integers with a stored minimum for each group are held"
        return None

    def layer_tensors(self, layer: LayerCheckpoint) -> dict[str, Tensor]:
        """The tensors of one layer, by their full names."""
        q = layer.weight
        assert q is not None
        tensors = {"weight": pack_int32(q.codes.view(torch.uint8), q.format.bits).view(torch.uint32), "scales": q.scale}
        if q.zero_point is not None:
            tensors["biases"] = q.zero_point
        return {f"{layer.name}.{part}": tensor for part, tensor in tensors.items()}

    def config(self, config: dict[str, Any], formats: ModelFormats) -> dict[str, Any]:
        """config.json with what says how to read the weights, under both names that readers look for."""
        found = self.quantization_config(formats)
        return {**config, "quantization": found, "quantization_config": found}

    def quantization_config(self, formats: ModelFormats) -> dict[str, Any]:
        """What config.json says under "quantization"."""
        own = {name: _settings(layer.weight) for name, layer in formats.layers.items() if layer.weight is not None}
        usual = Counter(own.values()).most_common(1)[0][0]
        fields = ("group_size", "bits", "mode")
        differ = {name: dict(zip(fields, values, strict=True)) for name, values in own.items() if values != usual}
        return {**dict(zip(fields, usual, strict=True)), **differ}


def _told(numbers: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"


def _affine(bits: int, size: int, dtype: ScaleDtype) -> Format:
    scale_bits = 32 if dtype == "float32" else 16
    return searched(Integer(bits, signed=False), size, scale_bits=scale_bits, scale_dtype=dtype)


def _mode(fmt: Format) -> str:
    plain = isinstance(fmt.scale, PowerOfTwoScale) and not fmt.scale.micro and fmt.granularity.group_size == 32
    return next((mode for mode, (element, _) in _MX.items() if plain and fmt.element == element), "affine")


def _settings(fmt: Format) -> tuple[int, int, str]:
    return fmt.granularity.group_size or 0, fmt.bits, _mode(fmt)


class MlxReader(WeightOnlyReader):
    """Reads the layout of MLX, whether Detent or another tool wrote it."""

    parts = ("weight", "biases", "scales")

    def __init__(self, source: Source) -> None:
        where = f"{source.path / 'config.json'}: quantization"
        self._told = check_as(MlxConfig, source.config["quantization_config"], where)
        super().__init__(source, MlxLayout())

    def _quantized(self) -> list[str]:
        return [name.removesuffix(".scales") for name in self.source if name.endswith(".scales")]

    def _inferred(self, name: str) -> LayerFormats:
        codes, scales = (self._matrix(f"{name}.{part}") for part in ("weight", "scales"))
        own = self._told.of(name)
        size, bits = own.group_size, own.bits
        width = scales[1] * size
        if codes[1] * 32 != width * bits:
            raise DetentError(
                f"{self._place(f'{name}.weight')} has {codes[1]} words a row and {scales[1]} scales, which are no"
                f" {bits}-bit codes in groups of {size}, as config.json says"
            )
        shape = (codes[0], width)
        if own.mode in _MX:
            return LayerFormats(shape, mx(_MX[own.mode][1]))
        dtype = SCALE_DTYPES.get(self.source.info(f"{name}.scales").dtype, "float32")
        return LayerFormats(shape, _affine(bits, size, dtype))

    def _expected(self, name: str, fmt: Format, shape: tuple[int, ...]) -> Expected:
        grid, dtype = fmt.granularity.grid(shape), fmt.scale.stored_dtype
        biases: Expected = {"biases": (grid, dtype)} if fmt.zero_point == "minimum" else {}
        return {"weight": ((shape[0], shape[1] * fmt.bits // 32), torch.uint32), "scales": (grid, dtype), **biases}

    def _unpacked(self, name: str, fmt: Format, shape: tuple[int, ...]) -> Tensor:
        return unpack_int32(self.source.tensor(f"{name}.weight").view(torch.int32), fmt.bits, shape[1])

    def _scales(self, name: str, fmt: Format, shape: tuple[int, ...]) -> Scales:
        biases = self.source.tensor(f"{name}.biases") if fmt.zero_point == "minimum" else None
        return Scales(self.source.tensor(f"{name}.scales"), biases)
