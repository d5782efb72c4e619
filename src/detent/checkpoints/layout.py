"""What a layout is: how a checkpoint on disk lays out what layers hold, and its reader.

A layout of its own is one file: a class that derives from `Layout`, a class with the methods of `LayoutReader`, and an
entry for each in `detent.checkpoints.quantized`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from detent.checkpoints.folder import CheckpointWriter
from detent.checkpoints.records import LayerCheckpoint, ModelFormats, describe, parse_description
from detent.checkpoints.source import Source
from detent.config import Scheme
from detent.external.files import parse_json
from detent.formats import Format, Scales

#: The key of the safetensors header metadata under which Detent leaves what a layout has no place for: the exact
#: formats (scale rules, signedness), and the outer scales, where the layout stores something rounded.
METADATA_KEY = "detent"


@dataclass(frozen=True)
class StackPlace:
    """Where a tensor of a layer goes in one that holds those of several layers, such as experts.

    Attributes:
        whole: the name of the larger tensor. shape: its shape.
        index: of the part in it.
    """

    whole: str
    shape: tuple[int, ...]
    index: tuple[int | slice, ...]


class Layout:
    """How an on-disk format lays out what layers hold.

    Attributes:
        name: as users know it.
        engines: the engines that load it, for `detent formats` and for messages.
        fuses: whether its engines run layers with the same input as one, which then need the same format.
        scales_like_model: whether the scales of all integers are in the dtype of the model, those of 8 bits too.
    """

    name = ""
    engines: tuple[str, ...] = ()
    fuses = True
    scales_like_model = False

    def with_details(self, **details: Any) -> Layout:
        """This layout with what a user may choose of it, such as an order of packing; what it doesn't know is left."""
        return self

    def of(self, source: Source) -> Layout:
        """This layout, with what it has to know of a checkpoint. Raises DetentError where it can't hold such a one."""
        return self

    @property
    def notes(self) -> list[str]:
        """What the user should know of the checkpoint as this layout has it."""
        return []

    def adapt(self, scheme: Scheme) -> Scheme:
        """`scheme` as this layout stores it, where that is another grid or another dtype of scales. It is asked before
        anything is simulated, so that what is simulated is what is written."""
        return scheme

    def types(self, layers: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Format | None, str]] | None:
        """The formats of all weights, where the layout decides instead of the scheme; None where it doesn't.

        Args:
            layers: {name in the file: shape} of linear layers and embeddings.

        Returns:
            {name: (format, or None for what stays; the reason why it stays)}.
        """
        return None

    def importance(self, layer: str) -> Tensor | None:
        """What squared errors in the columns of a layer's weight are weighed with, by its name in the file; None where
        nothing is known."""
        return None

    def can_hold(self, formats: ModelFormats) -> str | None:
        """None, or why this layout can't hold the model: the first layer's reason, and what to do about it."""
        raise NotImplementedError

    def needs(self, formats: ModelFormats) -> dict[str, str]:
        """{engine: what it needs to load these formats, such as a kernel package or a kind of GPU; "" for nothing}, of
        the engines that do."""
        return dict.fromkeys(self.engines, "")

    def layer_tensors(self, layer: LayerCheckpoint) -> dict[str, Tensor]:
        """The tensors of one layer, by their full names."""
        raise NotImplementedError

    def stacks(self, formats: ModelFormats) -> dict[str, StackPlace]:
        """{name that `layer_tensors` gives: its place in a larger tensor}, for those that lie in one."""
        return {}

    def kv_tensors(self, module: str, key: Scales, value: Scales, *more: Scales) -> dict[str, Tensor]:
        """The scales of one attention module's keys and values (and queries and probabilities), by full names."""
        return {f"{module}.k_scale": key.scale.reshape(1), f"{module}.v_scale": value.scale.reshape(1)}

    def exact(self, layer: LayerCheckpoint) -> dict[str, str]:
        """Scalars of a layer that the layout rounds, as exact hexadecimal numbers."""
        return {}

    def stores(self, tensor: str) -> bool:
        """Whether a tensor that isn't quantized has a place in the file."""
        return True

    def settled(self, tensor: str, value: Tensor) -> Tensor:
        """A tensor that isn't quantized, with the values and in the dtype that a reader of the file gets."""
        return value

    def folder_writer(self, out_dir: str | Path, formats: ModelFormats, **options: Any) -> CheckpointWriter:
        """What writes tensors into a folder; `options` as for `CheckpointWriter`."""
        return CheckpointWriter(out_dir, **options)

    def metadata(self, formats: ModelFormats, exact: Mapping[str, dict[str, str]]) -> dict[str, str]:
        """The header metadata that makes this layout exact for Detent's own reader."""
        return {METADATA_KEY: json.dumps({**describe(formats), "outer_scales": dict(exact)})}

    def config(self, config: dict[str, Any], formats: ModelFormats) -> dict[str, Any]:
        """config.json with what says how to read the weights."""
        return {**config, "quantization_config": self.quantization_config(formats)}

    def quantization_config(self, formats: ModelFormats) -> dict[str, Any]:
        """What config.json says under "quantization_config"."""
        raise NotImplementedError

    def more_files(self, formats: ModelFormats) -> dict[str, str]:
        """{name: content} of text files that go beside config.json, such as quantize_config.json."""
        return {}


class LayoutReader(Protocol):
    """Reads a layout, whether Detent or another tool wrote it.

    Attributes:
        formats: the formats of the model, under the names of layers in the file.
        used: the names of all tensors that belong to quantized layers or to the key/value cache.
        described: whether Detent wrote it, and left a description; else formats are made from what is there.
    """

    formats: ModelFormats
    used: set[str]
    described: bool

    def layer(self, name: str) -> LayerCheckpoint:
        """The contents of one layer, read now. Raises DetentError where a tensor is missing or misshapen."""
        ...

    def kv_scales(self) -> dict[str, tuple[Scales, ...]]:
        """(scales of keys, scales of values) by attention module; empty where none were calibrated."""
        ...

    def check(self) -> None:
        """Look at all headers and scales, without reading codes. Raises DetentError as `layer`."""
        ...


def left_description(source: Source) -> tuple[ModelFormats, dict[str, dict[str, str]]] | None:
    """What `Layout.metadata` left in the headers of a checkpoint: its formats, and what `Layout.exact` said of layers.
    None where another tool wrote it."""
    note = source.metadata.get(METADATA_KEY)
    if note is None:
        return None
    description = parse_json(note, f"{source.path}: the metadata that Detent wrote")
    return parse_description(description, str(source.path)), description.get("outer_scales", {})
