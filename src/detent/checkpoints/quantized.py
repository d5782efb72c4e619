"""Whole quantized checkpoints: which layout, writing one layer after the other, and opening what was written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from detent.checkpoints.awq import AwqLayout, AwqReader
from detent.checkpoints.compressed_tensors.layout import CompressedTensorsLayout, CompressedTensorsReader
from detent.checkpoints.detent_layout import DetentLayout, DetentReader
from detent.checkpoints.folder import MAX_SHARD_SIZE
from detent.checkpoints.fp8 import Fp8Layout, Fp8Reader
from detent.checkpoints.gguf.layout import GgufLayout
from detent.checkpoints.gguf.reader import GgufReader, open_stored
from detent.checkpoints.gptq import GptqLayout, GptqReader, auto_round_reader
from detent.checkpoints.layout import Layout, LayoutReader
from detent.checkpoints.mlx import MlxLayout, MlxReader
from detent.checkpoints.modelopt import ModelOptLayout, ModelOptReader
from detent.checkpoints.mxfp4 import Mxfp4Layout, Mxfp4Reader
from detent.checkpoints.quark import QuarkLayout, QuarkReader
from detent.checkpoints.records import LayerCheckpoint, ModelFormats
from detent.checkpoints.source import Source, quant_method
from detent.errors import DetentError
from detent.formats import Scales

#: Every layout by its name; `hf_format` takes the first of `PREFERRED` that holds the model.
layouts: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        CompressedTensorsLayout(),
        DetentLayout(),
        AwqLayout(),
        GptqLayout(),
        MlxLayout(),
        GgufLayout(),
        QuarkLayout(),
        ModelOptLayout(),
        Fp8Layout(),
        Mxfp4Layout(),
    )
}
PREFERRED = ("compressed-tensors", "detent")
#: Readers by the "quant_method" of config.json.
readers: dict[str, Callable[[Source], LayoutReader]] = {
    "compressed-tensors": CompressedTensorsReader,
    "detent": DetentReader,
    "gguf": GgufReader,
    "awq": AwqReader,
    "gptq": GptqReader,
    "auto-round": auto_round_reader,
    "intel/auto-round": auto_round_reader,
    "mlx": MlxReader,
    "quark": QuarkReader,
    "modelopt": ModelOptReader,
    "fp8": Fp8Reader,
    "mxfp8": Fp8Reader,
    "fbgemm_fp8": Fp8Reader,
    "mxfp4": Mxfp4Reader,
}


#: What of config.json makes a model a quantized one.
QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
#: Other names of layouts.
_ALIASES = {"quark_format": "quark"}
#: What "custom_mode" names, with "hf_format".
CUSTOM_MODES: dict[str, str] = {"quark": "quark", "awq": "awq", "fp8": "fp8"}


def wanted_layouts(export: str, custom_mode: str | None = None, **details: Any) -> list[Layout]:
    """The layouts that will do for what a user names, the best first.

    Args:
        export: ``hf_format``, or the name of a layout.
        custom_mode: with ``hf_format``: a key of `CUSTOM_MODES`.
        details: fields of the layout that a user may choose, by name; those of other layouts are left out.

    Raises:
        DetentError: an unknown name, or two that contradict each other.
    """
    export = _ALIASES.get(export, export)
    if custom_mode is not None:
        if custom_mode not in CUSTOM_MODES:
            raise DetentError(f"unknown custom_mode {custom_mode!r}; known: {', '.join(CUSTOM_MODES)}")
        if export != "hf_format":
            raise DetentError(f"custom_mode is a choice within hf_format, so it can't go with {export}")
        names: Sequence[str] = [CUSTOM_MODES[custom_mode]]
    elif export == "hf_format":
        names = PREFERRED
    elif export in layouts:
        names = [export]
    else:
        raise DetentError(f"unknown checkpoint format {export!r}; known: hf_format, {', '.join(layouts)}")
    return [layouts[name].with_details(alone=len(names) == 1, **details) for name in names]


def choose(
    formats: ModelFormats, wanted: Sequence[Layout] | None = None, *, refused: Mapping[str, str] | None = None
) -> tuple[Layout, list[str]]:
    """The first layout that holds the whole model, and why those before it do not.

    Args:
        formats: of the model.
        wanted: the layouts that will do, the best first; None for those of `PREFERRED`.
        refused: {name of a layout: why its readers would misread the model} for reasons that `formats` don't show.

    Raises:
        DetentError: none holds it.
    """
    reasons: list[str] = []
    for layout in [layouts[name] for name in PREFERRED] if wanted is None else wanted:
        reason = (refused or {}).get(layout.name) or layout.can_hold(formats)
        if reason is None:
            return layout, reasons
        reasons.append(reason)
    other = next((name for name in PREFERRED if layouts[name].can_hold(formats) is None), None)
    if other is not None and wanted is not None:
        reasons.append(f"the layout {other} holds the model")
    raise DetentError("; ".join(reasons))


class QuantizedWriter:
    """Writes a quantized checkpoint, layer by layer, whole or not at all.

    ::

        with QuantizedWriter("out", source=source, formats=formats) as writer:
            for layer in layers:
                writer.add_layer(layer)
            for name in kept:
                writer.add_tensor(name, source.tensor(name))
            writer.finish()

    Args:
        out_dir, overwrite, max_shard_size, progress: as for `CheckpointWriter`.
        source: the original checkpoint: its config and other files go along.
        formats: what will be written; layers must match it.
        layout: the on-disk format; by default what `choose` says.

    Raises:
        DetentError: as `CheckpointWriter`, or the layout cannot hold the formats.
    """

    def __init__(
        self,
        out_dir: str | Path,
        *,
        source: Source,
        formats: ModelFormats,
        layout: Layout | None = None,
        overwrite: bool = False,
        max_shard_size: int = MAX_SHARD_SIZE,
        progress: Path | None = None,
    ) -> None:
        self.layout = layout or choose(formats)[0]
        reason = self.layout.can_hold(formats)
        if reason is not None:
            raise DetentError(reason)
        self.formats = formats
        self.source = source
        self._missing = set(formats.layers)
        self._places = self.layout.stacks(formats)
        self._parts_left = Counter(place.whole for place in self._places.values())
        self._open: dict[str, Tensor] = {}
        self._exact: dict[str, dict[str, str]] = {}
        self._folder = self.layout.folder_writer(
            out_dir, formats, source=source, overwrite=overwrite, max_shard_size=max_shard_size, progress=progress
        )

    def __enter__(self) -> QuantizedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._folder.__exit__(kind, error, traceback)

    def add_layer(self, layer: LayerCheckpoint) -> tuple[list[str], dict[str, str]]:
        """Write a layer's codes and scales. Its bias, if any, is a tensor like others.

        Returns:
            The names of its tensors, and what `Layout.exact` says of it: what `skip_layer` takes.

        Raises:
            DetentError: the layer isn't what `formats` announced.
        """
        if self.formats.layers.get(layer.name) != layer.formats or layer.name not in self._missing:
            raise DetentError(f"layer {layer.name}: not announced with these formats, or written twice")
        self._missing.remove(layer.name)
        tensors = self.layout.layer_tensors(layer)
        for name, tensor in tensors.items():
            self._add(name, tensor)
        exact = self.layout.exact(layer)
        if exact:
            self._exact[layer.name] = exact
        return [self._places[name].whole if name in self._places else name for name in tensors], exact

    def _add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, or put it into the larger one that it is a part of, which is written with its last part."""
        place = self._places.get(name)
        if place is None:
            self._folder.add(name, tensor)
            return
        if self._folder.has([place.whole]):  # finished by an earlier run
            return
        whole = self._open.setdefault(place.whole, tensor.new_empty(place.shape))
        whole[place.index] = tensor
        self._parts_left[place.whole] -= 1
        if not self._parts_left[place.whole]:
            self._folder.add(place.whole, self._open.pop(place.whole))

    def skip_layer(self, name: str, names: Sequence[str], exact: dict[str, str]) -> bool:
        """Leave out a layer whose tensors, `names`, are in files that an earlier run finished; False if they aren't.

        Args:
            name: of the layer. exact: what `Layout.exact` said of it.
        """
        if not self._folder.has(names):
            return False
        self._missing.remove(name)
        if exact:
            self._exact[name] = exact
        return True

    def has(self, name: str) -> bool:
        """Whether a tensor is in a file that is finished."""
        return self._folder.has([name])

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Write a tensor that isn't quantized, unchanged."""
        self._folder.add(name, tensor)

    def add_kv(self, module: str, key: Scales, value: Scales, *more: Scales) -> None:
        """Write the calibrated scales of the keys and values of one attention module; `more`: of its queries and
        probabilities."""
        for name, tensor in self.layout.kv_tensors(module, key, value, *more).items():
            self._folder.add(name, tensor)

    @property
    def digests(self) -> dict[str, int]:
        """{tensor name: checksum of what was written}; see `folder.digest`."""
        return self._folder.digests

    @property
    def nbytes(self) -> int:
        """The size of what was written, in bytes."""
        return self._folder.nbytes

    def finish(self, config: dict[str, Any] | None = None) -> Path:
        """`close` and `commit`."""
        self.close(config)
        return self.commit()

    def examined(self) -> AbstractContextManager[None]:
        """See `CheckpointWriter.examined`."""
        return self._folder.examined()

    def commit(self) -> Path:
        """Put the folder in its place; returns it."""
        return self._folder.commit()

    def close(self, config: dict[str, Any] | None = None) -> Path:
        """Write the rest; the folder is then whole, but still under its temporary name.

        Args:
            config: the content of config.json; that of the source by default. What says how to read the weights is
                added.

        Returns:
            The temporary folder.

        Raises:
            DetentError: a layer that `formats` announced wasn't written.
        """
        if self._missing:
            raise DetentError(f"{len(self._missing)} layers were not written: {', '.join(sorted(self._missing)[:3])}")
        return self._folder.close(
            self.layout.config(config or self.source.config, self.formats),
            metadata=self.layout.metadata(self.formats, self._exact),
            files=self.layout.more_files(self.formats),
        )


class QuantizedCheckpoint:
    """An opened quantized checkpoint.

    Attributes:
        path: its folder.
        source: its tensors as they are on disk.
        method: the name of its layout.
        config: its config.json without what makes the model a quantized one: the config of the simulated model.
        formats: the formats of its layers and of its key/value cache.
        kept: the names of the tensors that aren't quantized.
        described: whether the shapes of its layers are written down in it, rather than made from its tensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.source = open_stored(path)
        self.path = self.source.path
        method = quant_method(self.source.config)
        if method is None:
            raise DetentError(f"{self.path} is not quantized: its config.json has no quantization_config")
        if method not in readers:
            raise DetentError(f"{self.path} is quantized with {method}; Detent reads {', '.join(readers)}")
        if not isinstance(self.source.config.get("quantization_config"), dict):
            raise DetentError(f"{self.path}: quantization_config is not at the top level of config.json")
        self.method = method
        self._reader: LayoutReader = readers[method](self.source)
        self.formats, self.described = self._reader.formats, self._reader.described
        self.config = {key: value for key, value in self.source.config.items() if key not in QUANTIZATION_KEYS}
        self.kept = [name for name in self.source if name not in self._reader.used]

    def layer(self, name: str) -> LayerCheckpoint:
        """One layer's codes and scales, read now. Raises DetentError where a tensor is missing or misshapen."""
        return self._reader.layer(name)

    def check(self) -> None:
        """Look at all headers and scales, without reading codes. Raises DetentError as `layer`."""
        self._reader.check()

    def tensor(self, name: str) -> Tensor:
        """A tensor that isn't quantized, read now."""
        return self.source.tensor(name)

    def kv_scales(self) -> dict[str, tuple[Scales, ...]]:
        """(scales of keys, scales of values) by attention module."""
        return self._reader.kv_scales()


def open_quantized(path: str | Path) -> QuantizedCheckpoint:
    """Open a quantized checkpoint: Detent's own layout, or compressed-tensors from Detent or another tool.

    Raises:
        DetentError: as `Source`; or the checkpoint isn't quantized, or not in a way that Detent reads.
    """
    return QuantizedCheckpoint(path)
