"""Quantized checkpoints as sources: each weight is decoded to floating point when it is asked for.

`open_source` gives a `Source` with the names, shapes and dtypes of the float model. What is on disk is of two kinds:

* layouts that Detent reads in any case (compressed-tensors, Detent's own): their readers decode;
* those in which tensors beside a weight tell how to decode it. ``N`` in FP8 has ``N_scale`` or ``N_scale_inv``: one for
  the tensor, or for each row or block (DeepSeek, ModelOpt, Quark, FBGEMM). ``N`` in packed FP4 has ``N_scale`` in FP8
  and ``N_scale_2`` (NVFP4 of ModelOpt), or exponents in ``N_scale`` (MXFP4 of ModelOpt and Quark). ``N_blocks`` has
  ``N_scales``, and is transposed (MXFP4 of gpt-oss).

Nothing is guessed: what isn't understood as a whole is refused before a weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detent.checkpoints.compressed_tensors.layout import CompressedTensorsReader
from detent.checkpoints.detent_layout import DetentReader
from detent.checkpoints.gguf.reader import GgufReader, open_stored
from detent.checkpoints.layout import LayoutReader
from detent.checkpoints.source import Source, TensorInfo, quant_method
from detent.errors import DetentError
from detent.external.files import shown
from detent.formats import Format, QTensor, all_finite, decode, fp8, mx, nvfp4, per_block, per_tensor
from detent.formats.packing import unpack
from detent.formats.scales import ScaleDtype
from detent.formats.stored import check_stored, stored_layout

#: Methods whose weights are told by the tensors beside them.
_BESIDE = ("fp8", "fbgemm_fp8", "modelopt", "quark", "mxfp4")
_FP8 = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
_E8M0 = (torch.uint8, torch.float8_e8m0fnu)
_SCALES: dict[torch.dtype, ScaleDtype] = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
_FLOATS = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}
#: In these no float model has tensors.
_CODES = (*_FP8, torch.float8_e8m0fnu, torch.uint8, torch.int8, torch.int32)
#: What belongs to activations: it says how the quantized model computes, not what its weights are.
_DROPPED = tuple(
    f"{side}_{part}"
    for side in ("input", "output", "activation", "k", "v", "q", "kv", "prob")
    for part in ("scale", "zero_point", "global_scale")
)


@dataclass(frozen=True)
class _Weight:
    """A weight that is decoded: its shape, the tensors that it is made of, codes first, and how."""

    shape: tuple[int, ...]
    parts: tuple[str, ...]
    decode: Callable[[torch.dtype], Tensor]


def open_source(path: str | Path) -> Source:
    """The float model of a checkpoint folder, quantized or not.

    Raises:
        DetentError: as `Source`; or it is quantized in a way that Detent can't decode.
    """
    source = open_stored(path)
    return source if quant_method(source.config) is None else DecodedSource(source)


class DecodedSource(Source):
    """A quantized checkpoint, seen as the float model that it stands for.

    Args:
        stored: the opened folder.

    Attributes:
        notes: what the user should know about it.

    Raises:
        DetentError: it is quantized in a way that Detent can't decode; a scale is missing or misshapen.
    """

    def __init__(self, stored: Source) -> None:
        self.path, self._stored, self._open = stored.path, stored, stored._open
        self.metadata, self.config = {}, _float_config(stored.config)
        self._dtype = _dtype_of(self.config)
        method = quant_method(stored.config)
        if not isinstance(stored.config.get("quantization_config"), dict):
            raise DetentError(f"{self.path}: quantization_config is not at the top level of config.json")
        if method in _BESIDE:
            self._weights = _told_by_tensors(stored)
        elif method == "compressed-tensors":
            self._weights = _read_by_layout(stored, CompressedTensorsReader(stored, reordered=True))
        elif method == "detent":
            self._weights = _read_by_layout(stored, DetentReader(stored))
        elif method == "gguf":
            self._weights = _read_by_layout(stored, GgufReader(stored))
        else:
            raise DetentError(
                f"{self.path} is quantized already, with {method}, which Detent does not decode; it decodes"
                f" compressed-tensors, detent, gguf, {', '.join(_BESIDE)}. Quantize the original checkpoint instead"
            )
        self.tensors, dropped = self._view()
        self.notes = [
            f"the source is quantized ({method}): {len(self._weights)} weights are decoded to"
            f" {str(self._dtype).removeprefix('torch.')} and quantized again, which costs accuracy that the original"
            " checkpoint still has"
        ]
        if dropped:
            self.notes.append(
                f"{len(dropped)} scales of activations, keys and values of the source are left out, e.g. {dropped[0]}"
            )

    def tensor(self, name: str) -> Tensor:
        """The tensor `name`, decoded where it is quantized, on the CPU, read now.

        Raises:
            DetentError: there is no such tensor, its file can't be read, or its codes or scales are damaged.
        """
        weight = self._weights.get(name)
        if weight is None:
            self.info(name)
            return self._stored.tensor(name)
        if self._dtype != torch.float16:
            return weight.decode(self._dtype)
        wide = weight.decode(torch.float32)
        narrow = wide.to(torch.float16)
        if not all_finite(narrow):
            raise DetentError(
                f"{self.path}: {name} decodes to {float(wide.abs().amax()):g}, too large for the float16 of config.json"
            )
        return narrow

    def close(self) -> None:
        self._stored.close()

    def _view(self) -> tuple[dict[str, TensorInfo], list[str]]:
        """(the tensors of the float model in the order of the files, those that are left out)."""
        made = {weight.parts[0]: name for name, weight in self._weights.items()}
        parts = {part for weight in self._weights.values() for part in weight.parts}
        view: dict[str, TensorInfo] = {}
        dropped = []
        for name, info in self._stored.tensors.items():
            last = name.rpartition(".")[2]
            if name in made:
                view[made[name]] = TensorInfo(info.file, self._weights[made[name]].shape, self._dtype)
            elif name in parts:
                continue
            elif name in self._weights:
                raise DetentError(f"{self.path}: {name} is there quantized and in floating point; which one is meant?")
            elif last in _DROPPED:
                dropped.append(name)
            elif info.dtype in _CODES or last.startswith(("weight_", "weight.", "pre_quant_")):
                raise DetentError(
                    f"{self.path / info.file}: {name} ({str(info.dtype).removeprefix('torch.')}, shape {info.shape})"
                    " belongs to a quantized weight in a form that Detent does not decode; quantize the original"
                    " checkpoint instead"
                )
            else:
                view[name] = info
        return view, dropped


def _float_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the float model."""
    return {
        key: _float_config(value) if key == "text_config" and isinstance(value, dict) else value
        for key, value in config.items()
        if key not in ("quantization_config", "compression_config")
    }


def _dtype_of(config: dict[str, Any]) -> torch.dtype:
    """The dtype of the float model: that of config.json, else bfloat16."""
    names = [part.get(key) for part in (config, config.get("text_config") or {}) for key in ("dtype", "torch_dtype")]
    return next((_FLOATS[name] for name in names if name in _FLOATS), torch.bfloat16)


# ---- layouts with readers -------------------------------------------------------------------------------------------


def _read_by_layout(stored: Source, reader: LayoutReader) -> dict[str, _Weight]:
    parts: dict[str, list[str]] = {}
    for part in (name for name in stored if name in reader.used):
        parts.setdefault(part.rpartition(".")[0].removesuffix(".weight"), []).append(part)
    weights = {}
    for name, layer in reader.formats.layers.items():
        if layer.rotated or layer.low_rank:
            raise DetentError(
                f"{stored.path}: {name} computes with {'a rotated input' if layer.rotated else 'a low-rank branch'}, so"
                " its codes are not the whole weight; quantize the original checkpoint instead"
            )
        own = [part for part in parts.get(name, []) if part.removeprefix(f"{name}.").startswith("weight")]
        if layer.weight is not None:
            codes = [
                f"{name}.{part}" for part in ("weight_packed", "weight.codes", "weight") if f"{name}.{part}" in own
            ]
            if not codes:
                raise DetentError(f"{stored.path}: {name} is quantized, and its codes are missing; download it again")
            others = (part for part in own if part not in codes)
            decoded = partial(_decode_layer, stored, reader, name)
            weights[f"{name}.weight"] = _Weight(layer.shape, (codes[0], *others), decoded)
    return weights


def _decode_layer(stored: Source, reader: LayoutReader, name: str, dtype: torch.dtype) -> Tensor:
    q, order_name = reader.layer(name).weight, f"{name}.weight_g_idx"
    assert q is not None
    if order_name not in stored.tensors:
        return decode(q, dtype)
    # The group of each column (compressed-tensors, "actorder"): columns sorted by group are groups of neighbours.
    groups, size = stored.tensor(order_name), q.format.granularity.group_size
    if bool((groups == -1).all()):  # what its modules start with, and keep where nothing was reordered
        return decode(q, dtype)
    order, columns = groups.argsort(stable=True), q.shape[1]
    if size is None or groups.shape != (columns,) or groups[order].tolist() != [n // size for n in range(columns)]:
        raise DetentError(f"{stored.path}: {order_name} does not give each group {size} columns, so it is damaged")
    values = decode(replace(q, codes=q.codes[:, order]), dtype)
    return torch.empty_like(values).index_copy_(1, order, values)


# ---- weights that are told by the tensors beside them ---------------------------------------------------------------


def _told_by_tensors(stored: Source) -> dict[str, _Weight]:
    block = stored.config["quantization_config"].get("weight_block_size")
    if block is not None and not (isinstance(block, list) and [type(n) is int and n > 0 for n in block] == [True] * 2):
        raise DetentError(f"{stored.path / 'config.json'}: weight_block_size is two whole numbers, not {shown(block)}")
    weights = {}
    for name, info in stored.tensors.items():
        float_name, outer = name.removesuffix("_blocks"), f"{name}_scale_2"
        scale = next((full for end in ("_scale_inv", "_scale") if (full := name + end) in stored.tensors), None)
        if float_name != name and f"{float_name}_scales" in stored.tensors and info.dtype == torch.uint8:
            weights[float_name] = _packed(stored, name, (f"{float_name}_scales",), mx("e2m1"), transposed=True)
        elif scale is None:
            continue
        elif info.dtype in _FP8:
            weights[name] = _fp8(stored, name, scale, block)
        elif info.dtype == torch.uint8 and stored.info(scale).dtype in _E8M0:
            weights[name] = _packed(stored, name, (scale,), mx("e2m1"))
        elif info.dtype == torch.uint8 and outer in stored.tensors:
            weights[name] = _packed(stored, name, (scale, outer), nvfp4())
    return weights


def _packed(stored: Source, name: str, scales: tuple[str, ...], fmt: Format, *, transposed: bool = False) -> _Weight:
    """FP4, two codes to a byte, the first in its lower half. `transposed`: of gpt-oss, whose blocks have an axis."""
    packed = stored.info(name).shape
    rows = packed[:-2] if transposed else packed[:-1]
    shape = (*rows, 2 * math.prod(packed[len(rows) :]))
    _expect(stored, scales[0], stored_layout(fmt, shape)["scale"][0])

    def decoded(dtype: torch.dtype) -> Tensor:
        codes = unpack(stored.tensor(name).reshape(*rows, -1), 4, shape[-1])
        scale, *outer = (stored.tensor(part) for part in scales)
        scale = scale.view(torch.uint8) if scale.dtype in _E8M0 else scale
        q = QTensor(fmt, shape, codes, scale, outer_scale=outer[0].to(torch.float32).reshape(()) if outer else None)
        values = decode(check_stored(q, f"{stored.path / stored.info(name).file}: {name}"), dtype)
        return values.transpose(-1, -2).contiguous() if transposed else values

    return _Weight((*shape[:-2], shape[-1], shape[-2]) if transposed else shape, (name, *scales), decoded)


def _fp8(stored: Source, name: str, scale: str, block: list[int] | None) -> _Weight:
    """FP8 under one scale for the tensor, or one for each block: `block`, one index, or a whole axis."""
    info, found = stored.info(name), stored.info(scale)
    shape, whole = info.shape, math.prod(found.shape) == 1
    grid = (*found.shape, *(1,) * (len(shape) - len(found.shape)))
    lengths = [None if n == 1 else max(1, size // max(1, n)) for n, size in zip(grid, shape, strict=False)]
    if block is not None and scale.endswith("_scale_inv"):
        whole, lengths[-2:] = False, block
    fmt = fp8(_FP8[info.dtype], per_tensor() if whole else per_block(dict(enumerate(lengths, -len(shape)))))
    if not whole:
        _expect(stored, scale, fmt.granularity.grid(shape), grid)
    if found.dtype not in (torch.float32, torch.float8_e8m0fnu, *_SCALES):
        raise DetentError(f"{stored.path / found.file}: {scale} is {found.dtype}, which no scale of FP8 is")
    fmt = fmt.with_scale_dtype(_SCALES.get(found.dtype, "float32"))

    def decoded(dtype: torch.dtype) -> Tensor:
        scales = stored.tensor(scale).to(fmt.scale.stored_dtype).reshape(() if whole else grid)
        q = QTensor(fmt, shape, stored.tensor(name), scales)
        return decode(check_stored(q, f"{stored.path / info.file}: {name}"), dtype)

    return _Weight(shape, (name, scale), decoded)


def _expect(stored: Source, name: str, shape: tuple[int, ...], found: tuple[int, ...] | None = None) -> None:
    info = stored.info(name)
    if (found or info.shape) != shape:
        raise DetentError(f"{stored.path / info.file}: {name} has shape {info.shape}; its codes call for {shape}")
