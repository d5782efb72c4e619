"""The layout of GGUF: formats as types of llama.cpp, and the reader of a file as a quantized checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from detent.checkpoints.folder import CheckpointWriter
from detent.checkpoints.gguf.architectures import (
    Architecture,
    architecture_of,
    extra_tensors,
    hyper_parameters,
    notes_on,
)
from detent.checkpoints.gguf.blocks import BLOCKS, Block
from detent.checkpoints.gguf.container import gguf_package
from detent.checkpoints.gguf.imatrix import read_imatrix
from detent.checkpoints.gguf.mixtures import MIXTURES, Facts, mixture_named, type_of, wanted_type
from detent.checkpoints.gguf.names import NAMES_KEY, TensorNames, without_number
from detent.checkpoints.gguf.vocabulary import vocabulary
from detent.checkpoints.gguf.writer import GgufWriter
from detent.checkpoints.layout import Layout
from detent.checkpoints.records import LayerCheckpoint, ModelFormats
from detent.checkpoints.source import Source
from detent.config import Scheme
from detent.errors import DetentError
from detent.external.files import user_path
from detent.formats import Format
from detent.formats.gguf import as_gguf, same_grid


@dataclass(frozen=True)
class _Checkpoint:
    """What the layout knows of the checkpoint that is written."""

    arch: Architecture
    config: Any
    names: TensorNames
    tensors: list[str]
    values: dict[str, Any]
    notes: list[str]
    importances: dict[str, Tensor]

    @property
    def facts(self) -> Facts:
        config = self.config
        experts = (getattr(config, f"num{part}experts", None) for part in ("_local_", "_"))
        heads = config.num_attention_heads
        return Facts(
            config.num_hidden_layers,
            next((count for count in experts if count), 0) or getattr(config, "n_routed_experts", None) or 0,
            heads // (getattr(config, "num_key_value_heads", None) or heads),
            bool(config.tie_word_embeddings),
            bool(self.importances),
        )


@dataclass(frozen=True)
class GgufLayout(Layout):
    """Writes GGUF files.

    Args:
        mixture: what gives each tensor its type, from `mixture_named`; None for the format of the scheme.
        imatrix: a file of importances.
        checkpoint: what is written; see `of`.
    """

    mixture: str | None = None
    imatrix: Path | None = None
    checkpoint: _Checkpoint | None = field(default=None, compare=False, repr=False)

    name = "gguf"
    engines = ("llama.cpp",)
    fuses = False

    def with_details(self, *, gguf_type: str | None = None, imatrix: str | None = None, **_: Any) -> GgufLayout:
        mixture = None if gguf_type is None else mixture_named(gguf_type)
        return replace(self, mixture=mixture, imatrix=None if imatrix is None else user_path(imatrix))

    def of(self, source: Source) -> GgufLayout:
        arch, config = architecture_of(source.config)
        names = TensorNames(arch, config)
        tensors = [tensor for tensor in source if not names.left_out(tensor)]
        for tensor in tensors:
            names.places(tensor)  # or a refusal
        values = {
            "general.type": "model",
            "general.name": source.path.resolve().name,
            "general.quantization_version": 2,
            **hyper_parameters(arch, config),
        }
        tokens, notes = vocabulary(source.path, config.vocab_size)
        importances = {} if self.imatrix is None else read_imatrix(self.imatrix)
        if self.imatrix is not None and not importances.keys() & {names.places(tensor)[0].name for tensor in tensors}:
            raise DetentError(
                f"{self.imatrix} is of another model: it has importances of {next(iter(importances))}, ..."
            )
        notes += notes_on(arch, config)
        known = _Checkpoint(arch, config, names, tensors, values | tokens, notes, importances)
        notes += [] if self.mixture is None else _narrow(self.mixture, known, source)
        return replace(self, checkpoint=known)

    @property
    def notes(self) -> list[str]:
        return [] if self.checkpoint is None else self.checkpoint.notes

    def importance(self, layer: str) -> Tensor | None:
        if self.checkpoint is None:
            return None
        place = self.checkpoint.names.places(f"{layer}.weight")[0]
        found = self.checkpoint.importances.get(place.name)
        return found if found is None or found.dim() == 1 or place.expert is None else found[place.expert]

    # ---- which format each tensor gets ------------------------------------------------------------------------------

    def adapt(self, scheme: Scheme) -> Scheme:
        if self.mixture is not None:
            return replace(scheme, weight=BLOCKS[MIXTURES[self.mixture]].format)
        return scheme if scheme.weight is None else replace(scheme, weight=as_gguf(scheme.weight) or scheme.weight)

    def types(self, layers: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Format | None, str]] | None:
        if self.mixture is None:
            return None
        assert self.checkpoint is not None
        names, facts = self.checkpoint.names, self.checkpoint.facts
        found: dict[str, tuple[Format | None, str]] = {}
        for layer, shape in layers.items():
            tensor = f"{layer}.weight"
            if names.split(tensor) is not None:
                found[layer] = None, "llama.cpp has it in two parts, one of them transposed"
            elif layer == "lm_head" and facts.tied:
                found[layer] = None, "it is the input embedding"
            else:
                kind = type_of(self.mixture, names.places(tensor)[0].name, shape[-1], facts)
                fmt = None if kind is None else BLOCKS[kind].format
                found[layer] = fmt, f"kept by the mixture {self.mixture}"
        return found

    def can_hold(self, formats: ModelFormats) -> str | None:
        if formats.kv_cache is not None or formats.attention is not None:
            return (
                "GGUF has no place for scales of keys and values; llama.cpp chooses the type of its cache at run time"
            )
        for name, layer in formats.layers.items():
            if layer.input is not None or layer.output is not None:
                return f"{name}: GGUF holds weights alone, no formats of activations; leave them out of the scheme"
            if layer.rotated or layer.low_rank:
                return f"{name}: llama.cpp knows no {'rotation at run time' if layer.rotated else 'low-rank branch'}"
            reason = None if layer.weight is None else self._why_not(layer.weight, layer.shape)
            if reason is not None:
                return f"{name}: {reason}"
        return None

    def _why_not(self, fmt: Format, shape: tuple[int, ...]) -> str | None:
        block = self._block(fmt)
        if block is None:
            return (
                f"GGUF has no type for [{fmt}]; gguf_type gives one, such as Q4_K_M, and so do schemes of 4, 5 or 8"
                " bits with groups of 32"
            )
        return block.refusal(shape)

    def _block(self, fmt: Format) -> Block | None:
        """The type that holds a format: that of the mixture, if several do."""
        base = None if self.mixture is None else MIXTURES[self.mixture]
        kinds = [block for block in BLOCKS.values() if block.format is not None and same_grid(fmt, block.format)]
        return next((block for block in kinds if block.name == base), kinds[0] if kinds else None)

    # ---- what is written ---------------------------------------------------------------------------------------------

    def layer_tensors(self, layer: LayerCheckpoint) -> dict[str, Tensor]:
        assert layer.weight is not None
        block = self._block(layer.weight.format)
        assert block is not None
        tensors = {f"{layer.name}.weight": block.pack(layer.weight)}
        if layer.weight.format.scale.outer and layer.weight.outer_scale is not None:
            tensors[f"{layer.name}.scale"] = layer.weight.outer_scale.reshape(1)
        return tensors

    def stores(self, tensor: str) -> bool:
        return self.checkpoint is None or not self.checkpoint.names.left_out(tensor)

    def settled(self, tensor: str, value: Tensor) -> Tensor:
        """Vectors and norms are float32 in a file; matrices stay, but where the type of the file is a plain one."""
        assert self.checkpoint is not None
        place = self.checkpoint.names.places(tensor)[0]
        if value.dim() < 2 or place.flat or "_norm." in place.name or not value.is_floating_point():
            return place.settled(value.float())
        plain = None if self.mixture is None else BLOCKS[MIXTURES[self.mixture]].dtype
        keeps = plain is None or type_of(self.mixture or "", place.name, 1, self.checkpoint.facts) is None
        return value if keeps else value.to(plain)

    def metadata(self, formats: ModelFormats, exact: Mapping[str, dict[str, str]]) -> dict[str, str]:
        return {}

    def config(self, config: dict[str, Any], formats: ModelFormats) -> dict[str, Any]:
        return config

    def folder_writer(self, out_dir: str | Path, formats: ModelFormats, **options: Any) -> CheckpointWriter:
        known = self.checkpoint
        assert known is not None
        blocks = {name: self._block(layer.weight) for name, layer in formats.layers.items() if layer.weight is not None}
        kinds = {f"{name}.weight": block.name for name, block in blocks.items() if block is not None}
        scales = [f"{name.removesuffix('weight')}scale" for name, kind in kinds.items() if kind == "NVFP4"]
        tensors = list(dict.fromkeys([*known.tensors, *kinds, *scales, "lm_head.weight"]))
        # Experts that the source holds in one tensor are tensors of their own where they are quantized.
        apart = {place.name for tensor in kinds for place in known.names.places(tensor)}
        whole = [t for t in known.tensors if not apart.intersection(place.name for place in known.names.places(t))]
        listed = dict.fromkeys(without_number(tensor) for tensor in [*whole, *kinds])
        values = known.values | {"general.file_type": self._file_type(kinds), NAMES_KEY: list(listed)}
        return GgufWriter(
            out_dir,
            names=known.names,
            tensors=tensors,
            kinds=kinds,
            arch=known.arch.name,
            values=values,
            extra=extra_tensors(known.config),
            **options,
        )

    def _file_type(self, kinds: Mapping[str, str]) -> int:
        """llama.cpp's number of the mixture, or of the type that most layers have."""
        counts = list(kinds.values())
        name = self.mixture or max(sorted(set(counts)), key=counts.count, default="F32")
        known = gguf_package().LlamaFileType.__members__
        given = (f"MOSTLY_{name}", f"ALL_{name}", f"MOSTLY_{name}_M", "GUESSED")
        return int(next(known[key] for key in given if key in known))


def _narrow(mixture: str, known: _Checkpoint, source: Source) -> list[str]:
    """A line about tensors that get another type than the mixture has for them, since their rows don't fill blocks."""
    found: dict[str, str] = {}
    for tensor in known.tensors:
        shape, place = source.info(tensor).shape, known.names.places(tensor)[0]
        if len(shape) > 1 and known.names.split(tensor) is None:
            width = shape[0 if place.turned else -1]
            wanted, given = (find(mixture, place.name, width, known.facts) for find in (wanted_type, type_of))
            if wanted is not None and wanted != given:
                found[tensor] = f"{given} instead of {wanted}, as {tensor} with rows of {width}"
    if not found:
        return []
    return [f"{len(found)} tensors have rows that don't fill the blocks of {mixture}: {next(iter(found.values()))}"]
