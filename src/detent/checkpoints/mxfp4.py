"""MXFP4 as gpt-oss has it: the experts of each layer stacked, everything else as it was.

``experts.gate_up_proj_blocks`` [experts, 2 * intermediate, hidden / 32, 16] holds the rows of the gate and of the up
projection in turn, two codes to a byte, and ``_scales`` the exponent of each block; ``down_proj`` likewise. The model
holds them transposed. Biases stay what they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from detent.checkpoints.beside import refuse_unexplained
from detent.checkpoints.layout import Layout, StackPlace, left_description
from detent.checkpoints.records import LayerCheckpoint, LayerFormats, ModelFormats
from detent.checkpoints.source import Source
from detent.errors import DetentError
from detent.formats import E2M1, Format, PowerOfTwoScale, QTensor, Scales, decode, mx
from detent.formats.packing import pack, unpack
from detent.formats.stored import check_scales, check_stored

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj")
_STACKS = {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}
_FORMAT = mx("e2m1")


class Mxfp4Layout(Layout):
    """Writes MXFP4 as gpt-oss has it."""

    name = "mxfp4"
    engines = ("transformers", "vLLM", "SGLang")

    def can_hold(self, formats: ModelFormats) -> str | None:
        """None, or the reason why this layout can't hold the model."""
        for name, layer in formats.layers.items():
            if _EXPERT.fullmatch(name) is None:
                return (
                    f"mxfp4 does not hold {name}: it has experts alone in MXFP4, and all else in floating point;"
                    " exclude the other layers, such as '*self_attn*'"
                )
            if reason := _why_not(layer):
                return f"mxfp4 does not hold {name}: {reason}"
        if formats.kv_cache is not None or formats.attention is not None:
            return "mxfp4 does not hold a quantized key/value cache"
        for experts, members in _experts(formats).items():
            count = len(members) // 3
            if members.keys() != {(e, kind) for e in range(count) for kind in _STACKS}:
                return f"mxfp4 does not hold {experts}: it has all experts and projections of a layer, or none"
            if len({members[0, "gate"], members[0, "up"]} | {members[e, "gate"] for e in range(count)}) > 1:
                return f"mxfp4 does not hold {experts}: its experts differ in shape or format"
        return None

    def stacks(self, formats: ModelFormats) -> dict[str, StackPlace]:
        """Where the blocks and scales of each expert go."""
        places = {}
        for experts, members in _experts(formats).items():
            for (expert, kind), layer in members.items():
                (rows, columns), count = layer.shape, len(members) // 3
                index: tuple[int | slice, ...] = (expert,)
                if kind != "down":
                    rows, index = 2 * rows, (expert, slice(int(kind == "up"), None, 2))
                for end, inner in (("blocks", (columns // 32, 16)), ("scales", (columns // 32,))):
                    whole = f"{experts}.{_STACKS[kind]}_{end}"
                    places[f"{experts}.{expert}.{kind}_proj.{end}"] = StackPlace(whole, (count, rows, *inner), index)
        return places

    def layer_tensors(self, layer: LayerCheckpoint) -> dict[str, Tensor]:
        """The blocks and scales of one expert's projection, which `stacks` puts together."""
        q = layer.weight
        assert q is not None
        blocks = pack(q.codes, 4).reshape(*q.scale.shape, 16)
        return {f"{layer.name}.blocks": blocks, f"{layer.name}.scales": q.scale}

    def quantization_config(self, formats: ModelFormats) -> dict[str, Any]:
        """What config.json says."""
        stays = [name.removeprefix("re:") for name in formats.ignored]
        return {"quant_method": self.name, "modules_to_not_convert": stays}


def _why_not(layer: LayerFormats) -> str | None:
    if layer.rotated or layer.low_rank:
        return "a rotated input, or a low-rank branch"
    if layer.input is not None or layer.output is not None:
        return "quantized inputs or outputs: weights alone are; use w_mxfp4"
    weight = layer.weight
    if weight is None or weight.element != E2M1 or not isinstance(weight.scale, PowerOfTwoScale):
        return f"a weight in {weight}: only MXFP4"
    if weight.granularity != _FORMAT.granularity or layer.shape[1] % 32:
        return f"{layer.shape[1]} input features of {weight.granularity}: only whole blocks of 32"
    return None


def _experts(formats: ModelFormats) -> dict[str, dict[tuple[int, str], LayerFormats]]:
    """{module of experts: {(expert, projection): layer}}."""
    found: dict[str, dict[tuple[int, str], LayerFormats]] = {}
    for name, layer in formats.layers.items():
        match = _EXPERT.fullmatch(name)
        assert match is not None
        found.setdefault(match[1], {})[int(match[2]), match[3]] = layer
    return found


class Mxfp4Reader:
    """Reads MXFP4 of gpt-oss, whoever wrote it: a `LayoutReader` of a layer for each projection of each expert.

    Args:
        source: the opened folder.

    Raises:
        DetentError: blocks without scales, or of other shapes.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._shapes = {
            name.removesuffix("_blocks"): self._shape(name)
            for name in source
            if name.endswith("_blocks") and source.info(name).dtype == torch.uint8
        }
        left = left_description(source)
        self.described = left is not None
        stays = source.config["quantization_config"].get("modules_to_not_convert")
        ignored = tuple(map(str, stays)) if isinstance(stays, list) else ()
        self._of = self._members()
        told = {name: LayerFormats(self._layer_shape(name), _FORMAT) for name in self._of}
        self.formats = ModelFormats(told, ignored=ignored) if left is None else left[0]
        if left is not None and {n: x.shape for n, x in told.items()} != {
            n: x.shape for n, x in left[0].layers.items()
        }:
            raise DetentError(
                f"{source.path}: the experts in its files are not those that were written; download it again"
            )
        self.used = {f"{stack}_{end}" for stack in self._shapes for end in ("blocks", "scales")}
        refuse_unexplained(source, self.used)

    def _shape(self, name: str) -> tuple[int, ...]:
        """(experts, rows, columns) of what blocks stand for, once their scales are known to fit."""
        blocks, scales = self.source.info(name), self.source.info(f"{name.removesuffix('blocks')}scales")
        shape = blocks.shape
        if len(shape) != 4 or shape[3] != 16 or scales.shape != shape[:3] or scales.dtype != torch.uint8:
            raise DetentError(
                f"{self.source.path / scales.file}: the scales of {name} are {scales.dtype} with shape {scales.shape};"
                f" its blocks {shape} of 16 bytes call for bytes {shape[:3]}"
            )
        return (shape[0], shape[1], shape[2] * 32)

    def _members(self) -> dict[str, tuple[str, int, int]]:
        """{layer: (stack, expert, first row; -1: all rows)}."""
        found = {}
        for stack, shape in self._shapes.items():
            experts, _, kind = stack.rpartition(".")
            for expert in range(shape[0]):
                if kind == "down_proj":
                    found[f"{experts}.{expert}.down_proj"] = (stack, expert, -1)
                elif kind == "gate_up_proj":
                    found[f"{experts}.{expert}.gate_proj"] = (stack, expert, 0)
                    found[f"{experts}.{expert}.up_proj"] = (stack, expert, 1)
        return found

    def _layer_shape(self, name: str) -> tuple[int, ...]:
        stack, _, first = self._of[name]
        _, rows, columns = self._shapes[stack]
        return (rows if first < 0 else rows // 2, columns)

    def layer(self, name: str) -> LayerCheckpoint:
        """The contents of one layer, read now. Raises DetentError where it is damaged."""
        layer, (stack, expert, first) = self.formats.layers[name], self._of[name]
        assert layer.weight is not None
        q = self._read(stack, expert, layer.weight)
        if first >= 0:
            q = QTensor(q.format, layer.shape, q.codes[first::2].contiguous(), q.scale[first::2].contiguous())
        return LayerCheckpoint(name, layer.shape, q)

    def check(self) -> None:
        """Look at all scales, without reading codes. Raises DetentError as `layer`."""
        for stack in self._shapes:
            check_scales(_FORMAT, Scales(self.source.tensor(f"{stack}_scales")), f"{self.source.path}: {stack}_scales")

    def kv_scales(self) -> dict[str, tuple[Scales, ...]]:
        """Nothing: this layout has no key/value cache."""
        return {}

    def stacked(self) -> dict[str, tuple[tuple[int, ...], tuple[str, str], Callable[[torch.dtype], Tensor]]]:
        """{parameter of the float model: (its shape, the tensors it is made of, what decodes it)}."""

        def decoder(stack: str, experts: int) -> Callable[[torch.dtype], Tensor]:
            def decoded(dtype: torch.dtype) -> Tensor:
                each = (decode(self._read(stack, expert, _FORMAT), dtype).t() for expert in range(experts))
                return torch.stack(list(each)).contiguous()

            return decoded

        return {
            stack: ((count, columns, rows), (f"{stack}_blocks", f"{stack}_scales"), decoder(stack, count))
            for stack, (count, rows, columns) in self._shapes.items()
        }

    def _read(self, stack: str, expert: int, fmt: Format) -> QTensor:
        """One expert of a stack."""
        _, rows, columns = self._shapes[stack]
        blocks, scales = self.source.tensor(f"{stack}_blocks")[expert], self.source.tensor(f"{stack}_scales")[expert]
        codes = unpack(blocks.reshape(rows, math.prod(blocks.shape[1:])), 4, columns)
        return check_stored(
            QTensor(fmt, (rows, columns), codes, scales), f"{self.source.path}: {stack}, expert {expert}"
        )
