"""What the layouts of AWQ, GPTQ and MLX have in common: weights alone, integers in groups of input features.

Their codes and zero points are unsigned: codes of a signed format are stored with 2^(b-1) added, and a symmetric one
has that number as its zero point.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from detent.checkpoints.layout import Layout, left_description
from detent.checkpoints.records import LayerCheckpoint, LayerFormats, ModelFormats, assemble
from detent.checkpoints.source import Source
from detent.config import Scheme
from detent.errors import DetentError
from detent.external.files import shown
from detent.formats import FloatScale, Format, Integer, QTensor, Scales, integer, per_channel, per_group
from detent.formats.scales import ScaleDtype
from detent.formats.stored import check_scales, check_stored

SCALE_DTYPES: dict[torch.dtype, ScaleDtype] = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
}


#: (shape, dtype) of each tensor of a layer, by the end of its name.
Expected = dict[str, tuple[tuple[int, ...], torch.dtype]]
#: What config.json says besides the formats.
_NOT_COMPARED = ("meta", "dynamic", "modules_to_not_convert")


class WeightOnlyLayout(Layout):
    """Writes weights alone.

    Attributes:
        bits: the widths that it holds.
        multiples: what the numbers of input and output features are multiples of.
    """

    bits: tuple[int, ...] = ()
    multiples = (1, 1)

    def adapt(self, scheme: Scheme) -> Scheme:
        """The same with float16 scales."""
        weight = scheme.weight
        return scheme if weight is None else replace(scheme, weight=weight.with_scale_dtype("float16"))

    def can_hold(self, formats: ModelFormats) -> str | None:
        """None, or the reason why this layout can't hold the model: the first layer's that it can't."""
        for name, layer in formats.layers.items():
            if reason := self._refusal(layer):
                return f"{self.name} does not hold {name}: {reason}; hf_format does"
        if formats.kv_cache is not None or formats.attention is not None or formats.keys_rotated:
            return f"{self.name} holds weights alone, and nothing of attention or its cache; hf_format does"
        return None

    def _refusal(self, layer: LayerFormats) -> str | None:
        """Why a layer can't be held."""
        fmt, sides = layer.weight, [side for side in ("input", "output") if getattr(layer, side) is not None]
        if sides:
            return f"its {sides[0]} is quantized, and only weights are held"
        if layer.rotated or layer.low_rank:
            return "an input that is rotated at run time" if layer.rotated else "a low-rank branch"
        if fmt is None or layer.kind != "Linear" or len(layer.shape) != 2:
            return (
                f"a {layer.kind} module with a weight of shape {layer.shape}; only matrices of linear layers are held"
            )
        if fmt.base is not None or fmt.dynamic:
            return f"{fmt}"
        if reason := self._grid_refusal(fmt):
            return reason
        (out, width), (rows, size) = layer.shape, fmt.granularity.lengths(layer.shape)
        if rows != 1:
            return f"{fmt}; each row needs scales of its own"
        if width % size:
            fitting = next((f"; {n} would fit" for n in (128, 64, 32) if n < size and width % n == 0), "")
            return f"rows of {width} input features end in a group shorter than {size}, which no reader takes{fitting}"
        for what, found, needed in zip(("input", "output"), (width, out), self.multiples, strict=True):
            if found % needed:
                return f"{found} {what} features, not a multiple of {needed}"
        return None

    def _grid_refusal(self, fmt: Format) -> str | None:
        """Why codes or scales of a format can't be held."""
        if not isinstance(fmt.element, Integer):
            return f"{fmt}; only integers are held"
        if fmt.bits not in self.bits:
            return f"codes of {fmt.bits} bits; those of {', '.join(map(str, self.bits))} bits are held"
        if not isinstance(fmt.scale, FloatScale) or fmt.scale.dtype != "float16":
            return f"{fmt.scale}; only float16 ones are held"
        if fmt.zero_point == "float" or (fmt.zero_point == "none" and fmt.element.minimum == 0):
            return f"{fmt}; zero points are codes"
        return None


def group_size(fmt: Format) -> int:
    """As these layouts have it: -1 for one group a row."""
    return fmt.granularity.group_size or -1


def integers(bits: int, size: int, scale: torch.dtype, *, symmetric: bool) -> Format:
    """The format of unsigned codes of `bits` bits in groups of `size`, -1 for whole rows."""
    fmt = integer(bits, per_channel(0) if size < 0 else per_group(size), signed=False, symmetric=symmetric)
    return fmt.with_scale_dtype(SCALE_DTYPES.get(scale, "float16"))


def unsigned(q: QTensor) -> tuple[Tensor, Tensor]:
    """(codes uint8 [out, in], zero points uint8 [out, groups]) as they are stored."""
    codes = q.codes.view(torch.uint8) + _moved(q.format)  # bytes wrap around: -5 is 251, which plus 8 is 3
    if q.zero_point is None:
        return codes, torch.full(q.scale.shape, 1 << (q.format.bits - 1), dtype=torch.uint8, device=codes.device)
    return codes, (q.zero_point + _moved(q.format)).to(torch.uint8)


def _moved(fmt: Format) -> int:
    return 1 << (fmt.bits - 1) if isinstance(fmt.element, Integer) and fmt.element.signed else 0


class WeightOnlyReader:
    """Reads a layout of weights alone.

    Args:
        source: the opened folder.
        layout: what would have written it.

    Attributes:
        parts: the names of a layer's tensors, those of codes first.
        formats, used, described: see `LayoutReader`.
    """

    parts: tuple[str, ...] = ()

    def __init__(self, source: Source, layout: Layout) -> None:
        self.source = source
        self.config: dict[str, Any] = source.config["quantization_config"]
        layers = self._quantized()
        if not layers:
            raise DetentError(f"{source.path} holds no quantized weight, although its config.json says {layout.name}")
        left = left_description(source)
        self.described = left is not None
        if left is None:
            self.formats = ModelFormats({name: self._inferred(name) for name in layers})
        else:
            self.formats = left[0]
            self._check_description(layers, layout)
        self.used = {tensor for name in layers for tensor in self.weight_names(name)}

    def weight_names(self, layer: str) -> tuple[str, ...]:
        """The names of a layer's tensors, codes first."""
        return tuple(name for part in self.parts if (name := f"{layer}.{part}") in self.source.tensors)

    def _quantized(self) -> list[str]:
        """The names of the layers that have codes."""
        codes = f".{self.parts[0]}"
        return [name.removesuffix(codes) for name in self.source if name.endswith(codes)]

    def _matrix(self, name: str) -> tuple[int, int]:
        """The shape of a tensor with two axes. Raises DetentError where it has others."""
        shape = self.source.info(name).shape
        if len(shape) != 2 or min(shape) < 1:
            raise DetentError(f"{self._place(name)} has shape {shape}, which no matrix has")
        return shape[0], shape[1]

    def _inferred(self, name: str) -> LayerFormats:
        """The formats of a layer from its tensors and from config.json."""
        raise NotImplementedError

    def _expected(self, name: str, fmt: Format, shape: tuple[int, ...]) -> Expected:
        """(shape, dtype) of each tensor of a layer, by part."""
        raise NotImplementedError

    def _unpacked(self, name: str, fmt: Format, shape: tuple[int, ...]) -> Tensor:
        """Codes uint8 [out, in] as they are stored."""
        raise NotImplementedError

    def _scales(self, name: str, fmt: Format, shape: tuple[int, ...]) -> Scales:
        """The scales of a layer whose tensors are as expected."""
        raise NotImplementedError

    def _check_description(self, layers: list[str], layout: Layout) -> None:
        """Engines read config.json and tensors alone, so these have to say what Detent left in the header."""
        reason = layout.can_hold(self.formats)
        for key, value in ({} if reason else layout.quantization_config(self.formats)).items():
            if key not in _NOT_COMPARED and self.config.get(key) != value:
                reason = f"{key} is {shown(self.config.get(key))}, but the weights were written with {shown(value)}"
        if set(layers) != self.formats.layers.keys():
            reason = "other layers are quantized than the header of the weights says"
        if reason:
            where = f"{self.source.path / 'config.json'}: quantization_config"
            raise DetentError(f"{where}: {reason}; one of the two was edited. Quantize again")

    def layer(self, name: str) -> LayerCheckpoint:
        """The contents of one layer, read now. Raises DetentError where a tensor is missing or misshapen."""
        layer = self.formats.layers[name]

        def weight(fmt: Format) -> QTensor:
            scales = self._checked_scales(name, fmt, layer.shape)
            codes = (self._unpacked(name, fmt, layer.shape) - _moved(fmt)).view(fmt.element.storage_dtype)
            q = QTensor(fmt, layer.shape, codes, scales.scale, scales.zero_point)
            return check_stored(q, self._place(f"{name}.{self.parts[0]}"))

        return assemble(name, layer, weight, _no_scales)

    def check(self) -> None:
        """Look at all headers and scales, without reading codes. Raises DetentError as `layer`."""
        for name, layer in self.formats.layers.items():
            if layer.weight is not None:
                self._checked_scales(name, layer.weight, layer.shape)

    def kv_scales(self) -> dict[str, tuple[Scales, ...]]:
        """None: weights alone are quantized."""
        return {}

    def _checked_scales(self, name: str, fmt: Format, shape: tuple[int, ...]) -> Scales:
        for part, (wanted, dtype) in self._expected(name, fmt, shape).items():
            info = self.source.info(f"{name}.{part}")
            if (info.shape, info.dtype) != (wanted, dtype):
                raise DetentError(
                    f"{self._place(f'{name}.{part}')} is {info.dtype} {info.shape}; a weight of {shape} as"
                    f" {fmt} has {dtype} {wanted}"
                )
        scales = self._scales(name, fmt, shape)
        check_scales(fmt, scales, self._place(f"{name}.{self.parts[-1]}"), of_weight=True)
        return scales

    def _zero_points(self, name: str, fmt: Format, stored: Tensor) -> Tensor | None:
        """Zero points uint8 [out, groups] as they are stored, as the format has them."""
        if not fmt.symmetric:
            return stored.to(torch.int32) - _moved(fmt)
        half = 1 << (fmt.bits - 1)
        if bool((stored != half).any()):
            other = int(stored[stored != half][0])
            raise DetentError(
                f"{self._place(f'{name}.qzeros')} holds the zero point {other}, but config.json says that weights are"
                f" symmetric, which makes it {half}; one of the two is wrong"
            )
        return None

    def _place(self, name: str) -> str:
        return f"{self.source.path / self.source.info(name).file}: {name}"


def _no_scales(side: str, fmt: Format) -> Scales:
    raise DetentError(f"a calibrated {fmt} of an {side} has no place in a layout of weights alone")
