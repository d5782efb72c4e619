"""From what was quantized to a checkpoint folder, layer by layer, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detent.algorithms.outcome import Outcome
from detent.checkpoints import LayerCheckpoint, LayerFormats, Layout, ModelFormats, QuantizedWriter, Source, choose
from detent.checkpoints.folder import digest
from detent.external.schemas import WrittenTensor
from detent.plan.plan import Plan
from detent.pretrained.names import CheckpointNames
from detent.progress import track
from detent.runs.journal import Journal
from detent.runs.simulate import Quantized
from detent.runs.verify import Expected, Kept, kept_tensor

#: Bytes in a file of weights: small enough that progress shows while they are written.
SHARD_SIZE = 1_000_000_000


@dataclass(frozen=True)
class LayerResult:
    """What a report says about a layer: its formats, the error of its weight, and what algorithms did to it."""

    formats: LayerFormats
    relative_error: float | None
    outcomes: list[Outcome] = field(default_factory=list)


@dataclass(frozen=True)
class Written:
    """A checkpoint that is written and not yet in its place.

    Attributes:
        folder: under its temporary name.
        layers: by the name of the module.
        kept: what was written for each tensor that isn't a quantized weight, by its name in the file.
        expected: what has to be found when it is read back.
    """

    folder: Path
    layers: dict[str, LayerResult]
    kept: dict[str, Kept]
    expected: Expected
    _writer: QuantizedWriter

    @property
    def layout(self) -> Layout:
        """The on-disk format."""
        return self._writer.layout

    def examined(self) -> AbstractContextManager[None]:
        """For looking at the folder: errors name it as the user did, and say that nothing was written."""
        return self._writer.examined()

    @property
    def nbytes(self) -> int:
        """The size of all tensors in bytes."""
        return self._writer.nbytes

    def commit(self) -> None:
        """Put the folder in its place."""
        self._writer.commit()


@contextmanager
def written(
    out_dir: Path,
    source: Source,
    plan: Plan,
    quantized: Quantized,
    *,
    dtype: torch.dtype,
    held: Mapping[str, torch.dtype],
    overwrite: bool = False,
    journal: Journal | None = None,
) -> Iterator[Written]:
    """Write what was quantized. The folder appears with `Written.commit`; without it, nothing is left.

    Args:
        out_dir: the folder to appear.
        source: the original checkpoint; tensors that aren't quantized are copied from it.
        plan: of the checkpoint.
        quantized: by the plan. Its layers are asked for in the order of the source's files.
        dtype: that config.json then names.
        held: {parameter: dtype} of those that are written in another dtype than that of the source.
        overwrite: replace a folder that Detent wrote.
        journal: where files that are finished are kept if the run ends before, and were kept by the run before this.

    Raises:
        DetentError: the folder can't be written; a value that stays is not finite, or not in its new dtype.
    """
    names, layers = plan.names, dict[str, LayerResult]()
    formats = in_file(quantized.formats, names)
    kv = {names.container(module): pair for module, pair in quantized.kv.items()}
    examples: dict[LayerFormats, LayerCheckpoint] = {}
    module_of = {f"{names.layer(name) or name}.weight": name for name in quantized.formats.layers}
    # Algorithms may have left something that the plan doesn't know of: a rotation at run time, a low-rank branch.
    layout = plan.layout if plan.layout.can_hold(formats) is None else choose(formats, plan.wanted)[0]
    kept = {tensor: how for tensor, how in _kept(plan, quantized, held).items() if layout.stores(tensor)}
    place = {tensor: index for index, tensor in enumerate(source.tensors)}
    order = sorted(module_of.keys() | kept.keys(), key=lambda tensor: (place.get(tensor, len(place)), tensor))
    done = {} if journal is None else journal.written()
    with QuantizedWriter(
        out_dir,
        source=source,
        formats=formats,
        layout=layout,
        overwrite=overwrite,
        max_shard_size=SHARD_SIZE,
        progress=None if journal is None else journal.output,
    ) as writer:
        same: dict[str, int] = {}
        note = (lambda tensor: None) if journal is None else journal.note
        for tensor in track(order, "Writing", len(order)):
            before, layer = done.get(tensor), tensor.removesuffix(".weight")
            if tensor in module_of:
                shown = formats.layers[layer] in examples
                if before and shown and writer.skip_layer(layer, before.names, before.exact):
                    layers[module_of[tensor]] = LayerResult(formats.layers[layer], before.error)
                    continue
                simulated = quantized.layer(module_of[tensor])
                record = replace(simulated.record, name=layer)
                tensors, exact = writer.add_layer(record)
                error = simulated.relative_error
                note(WrittenTensor(tensor=tensor, names=tensors, error=error, exact=exact))
                layers[module_of[tensor]] = LayerResult(record.formats, error, list(simulated.outcomes))
                examples.setdefault(record.formats, record)
            if tensor in kept:
                if before and before.digest is not None and writer.has(tensor):
                    same[tensor] = before.digest
                    continue
                value = kept_tensor(tensor, kept[tensor], source, layout)
                writer.add_tensor(tensor, value)
                same[tensor] = digest(value)
                note(WrittenTensor(tensor=tensor, names=[tensor], digest=same[tensor]))
        for module, (key, value_scales, *more) in kv.items():
            writer.add_kv(module, key, value_scales, *more)
        folder = writer.close(_config(source, plan, quantized, dtype))
        parts = frozenset(
            [*(plan.parameters.keys() - module_of.keys()), *(name for name in plan.kept if not layout.stores(name))]
        )
        expected = Expected(formats, list(examples.values()), same, kv, dict(writer.digests), parts)
        yield Written(folder, layers, kept, expected, writer)


def _config(source: Source, plan: Plan, quantized: Quantized, dtype: torch.dtype) -> dict[str, Any]:
    config = {key: value for key, value in source.config.items() if key not in ("torch_dtype", "dtype")}
    config["dtype"] = str(dtype).removeprefix("torch.")
    if plan.unties or (quantized.untied and config.get("tie_word_embeddings", True)):
        config["tie_word_embeddings"] = False
    return config


def _kept(plan: Plan, quantized: Quantized, held: Mapping[str, torch.dtype]) -> dict[str, Kept]:
    """What is written for each tensor that isn't a quantized weight, by its name in the file."""
    dtypes = {
        tensor: held[group.parameters[0]]
        for group in plan.names.groups
        for tensor in group.tensors
        if group.parameters and group.parameters[0] in held
    }
    values: dict[str, Tensor] = plan.names.to_file(quantized.values)
    kept: dict[str, Kept] = {name: dtypes.get(name) for name in plan.kept}
    return kept | values


def in_file(formats: ModelFormats, names: CheckpointNames) -> ModelFormats:
    """`formats` under the names that layers have in the file."""
    return replace(formats, layers={names.layer(name) or name: layer for name, layer in formats.layers.items()})
