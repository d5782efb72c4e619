"""Reading a GGUF file as a checkpoint: its tensors under the names that they have in transformers.

A quantized matrix is the bytes of its codes, uint8 [rows, n], and a layer of `GgufReader`. What is quantized in a way
that Detent has no format for, or is a part of a larger tensor, is decoded as it is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detent.checkpoints.gguf.architectures import architecture_of, extra_tensors
from detent.checkpoints.gguf.blocks import BLOCKS
from detent.checkpoints.gguf.container import Entry, gguf_package, is_gguf_file, read_header
from detent.checkpoints.gguf.names import EMBEDDING, NAMES_KEY, OUTPUT, TensorNames, TensorPlace, names_of_model
from detent.checkpoints.records import LayerCheckpoint, LayerFormats, ModelFormats
from detent.checkpoints.source import INDEX_NAME, SINGLE_NAME, Source, TensorInfo
from detent.errors import DetentError
from detent.external.files import is_file, is_folder, names_in, user_path
from detent.external.mistakes import as_detent_error, first_line
from detent.external.model_folder import CONFIG_NAME, read_config
from detent.formats import QTensor, Scales, decode
from detent.nn.own_linear import TRANSPOSED

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FLOATS |= {"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}


def gguf_file(path: str | Path) -> Path | None:
    """The GGUF file that a path names: itself, or the only one in a folder that holds no safetensors.

    Raises:
        DetentError: a folder holds several.
    """
    path = user_path(path)
    if is_gguf_file(path) and is_file(path):
        return path
    names = names_in(path) if is_folder(path) else []
    found = [name for name in names if is_gguf_file(Path(name))]
    if not found or SINGLE_NAME in names or INDEX_NAME in names:
        return None
    if len(found) > 1:
        raise DetentError(f"{path} holds {len(found)} GGUF files; name one of them: {', '.join(sorted(found)[:3])}")
    return path / found[0]


def open_stored(path: str | Path) -> Source:
    """A checkpoint as it is on disk, quantized or not: a folder with safetensors, or a GGUF file.

    Raises:
        DetentError: as `Source` and `GgufSource`.
    """
    file = gguf_file(path)
    return Source(path, quantized=True) if file is None else GgufSource(file)


class GgufSource(Source):
    """An opened GGUF file. `config` is the config.json beside it, or else made from what the file says.

    Raises:
        DetentError: it isn't a GGUF file of a known architecture, or is truncated or corrupt; it is one of several
            parts; a tensor in it is no part of its model.
    """

    def __init__(self, file: Path) -> None:
        self.path, self.file, self.metadata, self._open = file.parent, file, {}, {}
        header = read_header(file)
        if int(header.values.get("split.count", 1)) > 1:
            raise DetentError(
                f"{file} is one of {header.values['split.count']} parts; join them with llama-gguf-split first"
            )
        self._entries = header.tensors
        self.config = _config(file) | {"quantization_config": {"quant_method": "gguf"}}
        arch, config = architecture_of(self.config)
        if header.values.get("general.architecture") != arch.name:
            raise DetentError(
                f"{file} is a model of type {header.values.get('general.architecture')}, but its config.json is of"
                f" {arch.name}; one of the two belongs to another model"
            )
        self._names = TensorNames(arch, config)
        self._computed = {*extra_tensors(config), *(name for name in self._entries if name.startswith("rope_f"))}
        self._data = np.memmap(file, mode="r")
        self._places = self._find(list(header.values.get(NAMES_KEY, ())) or names_of_model(config))
        self.tensors = {name: self._describe(name) for name in self._places}

    def _find(self, names: list[str]) -> dict[str, list[TensorPlace]]:
        found: dict[str, list[TensorPlace]] = {}
        for name in self._numbered(names):
            if self._names.left_out(name):
                continue
            places = self._names.places(name)
            if all(place.name in self._entries for place in places):
                found[name] = places
                scale = replace(places[0], name=places[0].name.removesuffix("weight") + "scale", rows=None)
                if scale.name in self._entries:
                    found[name.removesuffix("weight") + "scale"] = [scale]
        used = {place.name for places in found.values() for place in places} | self._computed
        if strange := self._entries.keys() - used - {OUTPUT}:
            raise DetentError(f"{self.file}: {min(strange)} is no part of a {self.config['model_type']} model")
        order = {name: at for at, name in enumerate(self._entries)}
        return dict(sorted(found.items(), key=lambda item: (order[item[1][0].name], item[1][0].expert or 0)))

    def _numbered(self, names: list[str]) -> list[str]:
        """Names of experts, once for each that there is."""
        every: dict[str, None] = {}
        for name in names:
            head, experts, tail = name.partition(".experts.*.")
            count = 1
            if experts:
                stack = self._entries.get(self._names.places(f"{head}.experts.0.{tail}")[0].name)
                count = 0 if stack is None else stack.shape[0]
            every |= dict.fromkeys(f"{head}.experts.{i}.{tail}" if experts else name for i in range(count))
        return list(every)

    def entry(self, name: str) -> tuple[Entry, TensorPlace]:
        """What the header says of a tensor, and its first place."""
        return self._entries[self._places[name][0].name], self._places[name][0]

    def coded(self, name: str) -> bool:
        """Whether a tensor is given as the bytes of its codes."""
        entry, _ = self.entry(name)
        block = BLOCKS.get(entry.kind)
        return (
            block is not None and block.format is not None and len(entry.shape) > 1 and self._names.split(name) is None
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """The logical shape of a coded tensor."""
        entry, place = self.entry(name)
        return entry.shape if place.expert is None else entry.shape[1:]

    def _describe(self, name: str) -> TensorInfo:
        places = self._places[name]
        for place in places:
            shape = self._entries[place.name].shape
            if place.expert is not None and (not shape or place.expert >= shape[0]):
                raise DetentError(f"{self.file}: {place.name} has shape {shape}, which has no part {place.expert}")
        with as_detent_error(lambda error: f"{self.file}: {places[0].name} has a wrong shape: {first_line(error)}"):
            value = self._value(name, self._on_meta)
        return TensorInfo(self.file.name, tuple(value.shape), value.dtype)

    def tensor(self, name: str) -> Tensor:
        self.info(name)
        return self._value(name, self._read)

    def close(self) -> None:
        """Nothing is held but a mapping of the file."""

    def _value(self, name: str, read: Callable[[Entry, int | None, bool], Tensor]) -> Tensor:
        coded = self.coded(name)
        split, places = self._names.split(name), self._places[name]
        parts = [
            place.from_file(read(self._entries[place.name], place.expert, coded), coded=coded)
            for place in (places if split else places[:1])
        ]
        return self._names.join(name, parts).contiguous()

    def _on_meta(self, entry: Entry, expert: int | None, coded: bool) -> Tensor:
        shape = entry.shape if expert is None else entry.shape[1:]
        if coded:
            block = BLOCKS[entry.kind]
            shape = (*shape[:-1], shape[-1] // block.elements * block.bytes)
        dtype = torch.uint8 if coded else _FLOATS.get(entry.kind, torch.float32)
        return torch.empty(shape, dtype=dtype, device="meta")

    def _read(self, entry: Entry, expert: int | None, coded: bool) -> Tensor:
        shape, start, nbytes = entry.shape, entry.start, entry.nbytes
        if expert is not None:
            shape, nbytes = shape[1:], nbytes // shape[0]
            start += expert * nbytes
        data = torch.from_numpy(np.array(self._data[start : start + nbytes]))
        if coded:
            return data.reshape(*shape[:-1], -1)
        if entry.kind in _FLOATS:
            return data.view(_FLOATS[entry.kind]).reshape(shape)
        block = BLOCKS.get(entry.kind)
        if block is not None:
            found = block.unpack(data, shape, entry.kind)
            assert isinstance(found, QTensor)
            return decode(found)
        gguf = gguf_package()
        values = gguf.quants.dequantize(data.reshape(*shape[:-1], -1).numpy(), gguf.GGMLQuantizationType[entry.kind])
        return torch.from_numpy(values).reshape(shape)


def _config(file: Path) -> dict[str, Any]:
    """The config.json beside a file, or what transformers makes of its header."""
    if is_file(file.parent / CONFIG_NAME):
        return read_config(file.parent)
    from transformers import AutoConfig

    start = f"{file} has no config.json beside it, and transformers makes none of what it says itself"
    with as_detent_error(lambda error: f"{start} ({first_line(error)}); put the one of the original checkpoint there"):
        config: dict[str, Any] = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name).to_dict()
    return config


class GgufReader:
    """Reads the layers of a GGUF file.

    Attributes:
        formats: by the types of the tensors. used: the tensors of codes.
        described: True: the header gives all shapes.
    """

    described = True

    def __init__(self, source: Source) -> None:
        assert isinstance(source, GgufSource)
        self._source = source
        coded = [name for name in source if source.coded(name)]
        self.used = {*coded, *(s for name in coded if (s := name.removesuffix("weight") + "scale") in source.tensors)}
        self.formats = ModelFormats({name.removesuffix(".weight"): self._formats(name) for name in coded})

    def _formats(self, name: str) -> LayerFormats:
        entry, place = self._source.entry(name)
        kind = TRANSPOSED if place.turned else "Embedding" if place.name == EMBEDDING else "Linear"
        return LayerFormats(self._source.shape(name), BLOCKS[entry.kind].format, kind=kind)

    def layer(self, name: str) -> LayerCheckpoint:
        """One layer, read now. Raises DetentError where its bytes can't be codes and scales of its type."""
        formats, tensor = self.formats.layers[name], f"{name}.weight"
        entry, _ = self._source.entry(tensor)
        weight = BLOCKS[entry.kind].unpack(self._source.tensor(tensor), formats.shape, f"{self._source.file}: {tensor}")
        assert isinstance(weight, QTensor)
        if (scale := f"{name}.scale") in self.used and weight.outer_scale is not None:
            weight = replace(weight, outer_scale=self._source.tensor(scale).reshape(()))
        return LayerCheckpoint(name, formats.shape, weight, kind=formats.kind)

    def kv_scales(self) -> dict[str, tuple[Scales, ...]]:
        """{}: a GGUF file holds none."""
        return {}

    def check(self) -> None:
        """Nothing: the header was checked when the file was opened, and scales lie among the codes."""
