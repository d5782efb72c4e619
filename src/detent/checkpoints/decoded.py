"""Quantized checkpoints as sources: each weight is decoded to floating point when it is asked for.

`open_source` gives a `Source` with the names, shapes and dtypes of the float model. The reader of its layout
decodes: what that doesn't understand as a whole is refused before a weight is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detent.checkpoints.beside import OF_ACTIVATIONS, BesideReader, refuse_unexplained
from detent.checkpoints.compressed_tensors.layout import CompressedTensorsReader
from detent.checkpoints.gguf.reader import open_stored
from detent.checkpoints.layout import LayoutReader
from detent.checkpoints.mxfp4 import Mxfp4Reader
from detent.checkpoints.quantized import QUANTIZATION_KEYS, readers
from detent.checkpoints.source import Source, TensorInfo, quant_method
from detent.checkpoints.weights_only import WeightOnlyReader
from detent.errors import DetentError
from detent.formats import all_finite, decode

_FLOATS = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}


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
        if method not in readers:
            raise DetentError(
                f"{self.path} is quantized already, with {method}, which Detent does not decode; it decodes"
                f" {', '.join(readers)}. Quantize the original checkpoint instead"
            )
        if method == "compressed-tensors":
            self._weights = _read_by_layout(stored, CompressedTensorsReader(stored, reordered=True))
        else:
            self._weights = _read_by_layout(stored, readers[method](stored))
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
        refuse_unexplained(self._stored, parts)
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
            elif OF_ACTIVATIONS.fullmatch(last):
                dropped.append(name)
            else:
                view[name] = info
        return view, dropped


def _float_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the float model."""
    return {
        key: _float_config(value) if key == "text_config" and isinstance(value, dict) else value
        for key, value in config.items()
        if key not in QUANTIZATION_KEYS
    }


def _dtype_of(config: dict[str, Any]) -> torch.dtype:
    """The dtype of the float model: that of config.json, else bfloat16."""
    names = [part.get(key) for part in (config, config.get("text_config") or {}) for key in ("dtype", "torch_dtype")]
    return next((_FLOATS[name] for name in names if name in _FLOATS), torch.bfloat16)


def _read_by_layout(stored: Source, reader: LayoutReader) -> dict[str, _Weight]:
    if isinstance(reader, Mxfp4Reader):
        return {name: _Weight(*known) for name, known in reader.stacked().items()}
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
        if layer.weight is None:
            continue
        if isinstance(reader, BesideReader | WeightOnlyReader):
            own = [part for part in reader.weight_names(name) if part in stored.tensors]
            codes = own[:1]
        else:
            own = [part for part in parts.get(name, []) if part.removeprefix(f"{name}.").startswith("weight")]
            codes = [
                f"{name}.{part}" for part in ("weight_packed", "weight.codes", "weight") if f"{name}.{part}" in own
            ]
        if not codes:
            raise DetentError(f"{stored.path}: {name} is quantized, and its codes are missing; download it again")
        others = (part for part in own if part not in codes)
        whole = name if codes[0] == name else f"{name}.weight"  # experts that are one tensor are named like a module
        weights[whole] = _Weight(layer.shape, (codes[0], *others), partial(_decode_layer, stored, reader, name))
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
