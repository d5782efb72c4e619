"""The layout of AutoGPTQ and GPTQModel, which vLLM, SGLang and transformers read too; AutoRound's are the same tensors.

``<module>.qweight`` int32 [in * b / 32, out] holds codes, packed along the input features; ``.qzeros`` int32
[groups, out * b / 32] zero points, packed along the output features; ``.scales`` float16 [groups, out]; ``.g_idx``
int32 [in] the group of each input feature. Codes of 3 bits cross words. A value is (code - zero point) * scale. Version
1 (``checkpoint_format: gptq``) stores zero points less 1, so it has none of 0; version 2 (``gptq_v2``) stores them as
they are.

Detent's own `gptq` keeps columns in their places whatever order it rounds them in, so the ``g_idx`` that it writes are
those of neighbours ("static groups"), and ``desc_act`` is false. Others may have any: each column is then a group.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from detent._version import __version__
from detent.checkpoints.awq import AwqReader
from detent.checkpoints.layout import Layout
from detent.checkpoints.records import LayerCheckpoint, LayerFormats, ModelFormats
from detent.checkpoints.source import Source
from detent.checkpoints.weights_only import Expected, WeightOnlyLayout, WeightOnlyReader, group_size, integers, unsigned
from detent.errors import DetentError
from detent.external.files import check_as
from detent.external.weights_only_schemas import GptqConfig
from detent.formats import Format, Scales
from detent.formats.packing import pack_int32, unpack_int32

#: Beside config.json, for readers from before "quantization_config".
QUANTIZE_CONFIG = "quantize_config.json"
_BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class GptqLayout(WeightOnlyLayout):
    """Writes the layout of GPTQ.

    Attributes:
        version: 1, 2, or None for 1 where all weights are symmetric, which most engines read, and 2 elsewhere.
    """

    version: int | None = None

    name = "gptq"
    engines = ("vLLM", "SGLang", "GPTQModel", "transformers")
    bits = _BITS
    multiples = (32, 32)

    def with_details(self, *, gptq_version: int | None = None, **details: Any) -> Layout:
        """This layout in another version. Raises DetentError where there is no such version."""
        if gptq_version not in (None, 1, 2):
            raise DetentError(f"gptq_version is 1 or 2, not {gptq_version}")
        return replace(self, version=gptq_version)

    def can_hold(self, formats: ModelFormats) -> str | None:
        """None, or the reason why this layout can't hold the model."""
        kinds = {layer.weight.symmetric: name for name, layer in formats.layers.items() if layer.weight is not None}
        if self.version == 1 and False in kinds:
            return (
                f"version 1 of gptq has no zero point of 0, which the asymmetric {kinds[False]} may need; version 2 has"
            )
        if self.version is None and len(kinds) > 1:
            return f"{kinds[False]} is asymmetric and {kinds[True]} is not; version 2 of gptq holds both"
        return super().can_hold(formats)

    def needs(self, formats: ModelFormats) -> dict[str, str]:
        """vLLM and SGLang load symmetric weights of 4 and 8 bits alone."""
        weights = [layer.weight for layer in formats.layers.values() if layer.weight is not None]
        many = ("vLLM", "SGLang") if all(fmt.symmetric and fmt.bits in (4, 8) for fmt in weights) else ()
        return {**dict.fromkeys((*many, "GPTQModel"), ""), "transformers": "the packages gptqmodel and optimum"}

    def _version(self, symmetric: bool) -> int:
        return self.version or (1 if symmetric else 2)

    def layer_tensors(self, layer: LayerCheckpoint) -> dict[str, Tensor]:
        """The tensors of one layer, by their full names."""
        assert layer.weight is not None
        fmt, (codes, zeros) = layer.weight.format, unsigned(layer.weight)
        stored = zeros - int(self._version(fmt.symmetric) == 1)
        size = fmt.granularity.lengths(layer.shape)[1]
        return {
            f"{layer.name}.qweight": pack_int32(codes, fmt.bits).t().contiguous(),
            f"{layer.name}.qzeros": pack_int32(stored.t().contiguous(), fmt.bits),
            f"{layer.name}.scales": layer.weight.scale.t().contiguous(),
            f"{layer.name}.g_idx": _neighbours(layer.shape[1], size),
        }

    def quantization_config(self, formats: ModelFormats) -> dict[str, Any]:
        """What config.json says under "quantization_config"."""
        weights = {name: layer.weight for name, layer in formats.layers.items() if layer.weight is not None}
        own = {name: (fmt.bits, group_size(fmt), fmt.symmetric) for name, fmt in weights.items()}
        usual = Counter(own.values()).most_common(1)[0][0]
        fields = ("bits", "group_size", "sym")
        dynamic: dict[str, dict[str, Any]] = {f"-:{_pattern(name)}": {} for name in formats.ignored}
        for name, differs in own.items():
            if differs != usual:
                for each in dict.fromkeys((name, formats.aliases.get(name, name))):
                    dynamic[f"+:{_pattern(each)}"] = dict(zip(fields, differs, strict=True))
        return {
            "quant_method": self.name,
            **dict(zip(fields, usual, strict=True)),
            "checkpoint_format": "gptq"
            if self._version(all(fmt.symmetric for fmt in weights.values())) == 1
            else "gptq_v2",
            "desc_act": False,
            "static_groups": True,
            "true_sequential": False,
            "damp_percent": 0.01,
            "lm_head": "lm_head" in formats.layers,
            "pack_dtype": "int32",
            **({"dynamic": dynamic} if dynamic else {}),
            "meta": {"quantizer": [f"detent:{__version__}"]},
        }

    def more_files(self, formats: ModelFormats) -> dict[str, str]:
        """What older readers look for."""
        return {QUANTIZE_CONFIG: json.dumps(self.quantization_config(formats), indent=2)}


def _pattern(name: str) -> str:
    return name[3:] if name.startswith("re:") else f"^{re.escape(name)}$"


def _neighbours(width: int, size: int) -> Tensor:
    return torch.arange(width, dtype=torch.int32) // size


class GptqReader(WeightOnlyReader):
    """Reads the layout of GPTQ, whether Detent or another tool wrote it."""

    parts = ("qweight", "qzeros", "g_idx", "scales")

    def __init__(self, source: Source) -> None:
        where = f"{source.path / 'config.json'}: quantization_config"
        self._told = check_as(GptqConfig, source.config["quantization_config"], where)
        #: The group of each column of the layers in which groups aren't made of neighbours.
        self._groups: dict[str, Tensor] = {}
        super().__init__(source, GptqLayout(1 if self._told.less_one else 2))

    def _inferred(self, name: str) -> LayerFormats:
        (rows, out), (groups, columns) = (self._matrix(f"{name}.{part}") for part in ("qweight", "qzeros"))
        bits = columns * 32 // out
        width = rows * 32 // max(1, bits)
        if bits not in _BITS or bits * out != columns * 32 or width * bits != rows * 32:
            raise DetentError(
                f"{self._place(f'{name}.qweight')} has shape {(rows, out)} and its qzeros {(groups, columns)}; of no"
                f" number of bits that is read ({', '.join(map(str, _BITS))}) both hold whole codes"
            )
        fitting = [
            (size, symmetric)
            for own_bits, size, symmetric in self._told.settings()
            if own_bits == bits and groups == (1 if size < 0 else math.ceil(width / size))
        ]
        if not fitting:
            raise DetentError(
                f"{self._place(f'{name}.qweight')} has codes of {bits} bits and {groups} groups in {width} input"
                f" features, which config.json says of no layer: (bits, group_size, sym) are {self._told.settings()}"
            )
        size = self._ungrouped(name, width, groups, fitting[0][0])
        scale = self.source.info(f"{name}.scales").dtype
        return LayerFormats((out, width), integers(bits, size, scale, symmetric=all(sym for _, sym in fitting)))

    def _ungrouped(self, name: str, width: int, groups: int, size: int) -> int:
        """`size`; or 1 where columns of a group aren't neighbours, which are kept in `_groups`.

        Raises:
            DetentError: a group that isn't there.
        """
        full = f"{name}.g_idx"
        if full not in self.source.tensors:
            return size
        info = self.source.info(full)
        if (info.shape, info.dtype) != ((width,), torch.int32):
            raise DetentError(f"{self._place(full)} is {info.dtype} {info.shape}, not torch.int32 {(width,)}")
        order = self.source.tensor(full)
        if torch.equal(order, _neighbours(width, width if size < 0 else size)):
            return size
        low, high = int(order.min()), int(order.max())
        if low < 0 or high >= groups:
            raise DetentError(f"{self._place(full)} names groups from {low} to {high}; there are 0 to {groups - 1}")
        self._groups[name] = order.long()
        return 1

    def _expected(self, name: str, fmt: Format, shape: tuple[int, ...]) -> Expected:
        (out, width), bits = shape, fmt.bits
        groups = fmt.granularity.grid(shape)[1]
        if name in self._groups:
            groups = self.source.info(f"{name}.qzeros").shape[0]
        elif self.described:
            self._ungrouped(name, width, groups, group_size(fmt))
        return {
            "qweight": ((width * bits // 32, out), torch.int32),
            "qzeros": ((groups, out * bits // 32), torch.int32),
            "scales": ((groups, out), fmt.scale.stored_dtype),
        }

    def _unpacked(self, name: str, fmt: Format, shape: tuple[int, ...]) -> Tensor:
        return unpack_int32(self.source.tensor(f"{name}.qweight").t().contiguous(), fmt.bits, shape[1])

    def _scales(self, name: str, fmt: Format, shape: tuple[int, ...]) -> Scales:
        stored = unpack_int32(self.source.tensor(f"{name}.qzeros"), fmt.bits, shape[0])
        zeros = ((stored + int(self._told.less_one)) & ((1 << fmt.bits) - 1)).t().contiguous()
        scales = Scales(self.source.tensor(f"{name}.scales").t().contiguous(), self._zero_points(name, fmt, zeros))
        groups = self._groups.get(name)
        return scales if groups is None else scales.map(lambda t: t[:, groups])


def auto_round_reader(source: Source) -> AwqReader | GptqReader:
    """The reader of what AutoRound packs: it has the tensors of GPTQ or of AutoAWQ."""
    packing = source.config["quantization_config"].get("packing_format")
    return AwqReader(source) if packing == "auto_round:auto_awq" else GptqReader(source)
