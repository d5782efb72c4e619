"""From a simulated model to a checkpoint folder: write, read back, compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detent.checkpoints import LayerCheckpoint, ModelFormats, QuantizedWriter, Source, layouts, open_quantized
from detent.model.kv_cache import kv_scales
from detent.plan.plan import Plan
from detent.pretrained.names import CheckpointNames
from detent.progress import track
from detent.runs.online import with_online_formats
from detent.runs.simulate import Simulation
from detent.runs.verify import Kept, kept_tensor, probe_logits, verify

#: Bytes in a file of weights: small enough that progress shows while they are written.
SHARD_SIZE = 1_000_000_000


def write(
    out_dir: Path,
    source: Source,
    plan: Plan,
    model: nn.Module,
    simulation: Simulation,
    *,
    dtype: torch.dtype,
    convert: bool = False,
    overwrite: bool = False,
    load: Callable[[Path], nn.Module] | None = None,
    complete: Callable[[Path, int], None] = lambda folder, size: None,
) -> None:
    """Write the simulated model as a checkpoint, whole or not at all, and prove what was written; see `verify`.

    Args:
        out_dir: the folder to appear.
        source: the original checkpoint; tensors that aren't quantized are copied from it.
        plan, model, simulation: as planned and simulated.
        dtype: the dtype that the model was held in, which config.json then names.
        convert: write tensors that stay in the dtype that the model held them in; else as they are in `source`.
        overwrite: replace a folder that Detent wrote.
        load: loads the folder as its user would, for a comparison of logits; the model is then emptied (its weights
            move to the meta device), so that there are never two of it in memory. None compares what is stored alone.
        complete: called with the folder, under its temporary name, and the bytes of its tensors, once it was written
            and proved; may add to it.

    Raises:
        DetentError: the folder can't be written, or what is read back differs from what was simulated.
    """
    names, scales = plan.names, kv_scales(model)
    config = {key: value for key, value in source.config.items() if key not in ("torch_dtype", "dtype")}
    config["dtype"] = str(dtype).removeprefix("torch.")
    if plan.unties or _was_untied(model, config):
        config["tie_word_embeddings"] = False
    source.config = config
    simulated = [layer.record for layer in simulation.layers.values()]
    records = {record.name: record for record in (_in_file(record, names) for record in simulated)}
    formats = _formats_in_file(with_online_formats(plan.formats, simulated, model), names)
    kv = {names.container(module): pair for module, pair in scales.items()}
    kept = _kept(plan, model, {name for name in simulation.changed if name not in _weights(simulated)}, convert)

    def check(folder: Path) -> None:
        expected = None
        if load is not None:
            expected = probe_logits(model)
            model.to("meta")
        verify(folder, records=records, kept=kept, source=source, kv=kv, expected_logits=expected, load=load)
        complete(folder, open_quantized(folder).source.nbytes)

    with QuantizedWriter(
        out_dir,
        source=source,
        formats=formats,
        layout=layouts[plan.layout] if layouts[plan.layout].can_hold(formats) is None else None,
        overwrite=overwrite,
        max_shard_size=SHARD_SIZE,
    ) as writer:
        for name in track([*records, *kept], "Writing", len(records) + len(kept)):
            if name in records:
                writer.add_layer(records[name])
            else:
                writer.add_tensor(name, kept_tensor(name, kept[name], source))
        for module, (key, value) in kv.items():
            writer.add_kv(module, key, value)
        writer.finish(check=check)


def _kept(plan: Plan, model: nn.Module, changed: Iterable[str], convert: bool) -> dict[str, Kept]:
    """What becomes of each tensor that isn't a quantized weight, by its name in the file."""
    held: dict[str, torch.dtype] = {}
    if convert:
        dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        for group in plan.names.groups:
            held |= {tensor: dtypes[p] for p in group.parameters[:1] for tensor in group.tensors if p in dtypes}
    kept: dict[str, Kept] = {name: held.get(name) for name in plan.kept}
    values = {name: model.get_parameter(name).detach() for name in sorted(changed)}
    return kept | dict(plan.names.to_file(values))


def _weights(records: Iterable[LayerCheckpoint]) -> set[str]:
    return {f"{record.name}.weight" for record in records if record.weight is not None}


def _in_file(record: LayerCheckpoint, names: CheckpointNames) -> LayerCheckpoint:
    return replace(record, name=names.layer(record.name) or record.name)


def _formats_in_file(formats: ModelFormats, names: CheckpointNames) -> ModelFormats:
    return replace(formats, layers={names.layer(name) or name: layer for name, layer in formats.layers.items()})


def _was_untied(model: nn.Module, config: Mapping[str, Any]) -> bool:
    """Whether an algorithm gave the output embedding a tensor of its own."""
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", True)
    return bool(config.get("tie_word_embeddings", True)) and not tied
