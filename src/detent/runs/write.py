"""From a simulated model to a checkpoint folder: write, read back, compare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detent.checkpoints import QuantizedWriter, Source, open_quantized
from detent.errors import DetentError
from detent.formats import QTensor, Scales, decode
from detent.model.kv_cache import kv_scales
from detent.plan.plan import Plan
from detent.progress import track
from detent.runs.online import with_online_formats
from detent.runs.simulate import SimulatedLayer, Simulation

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
    complete: Callable[[Path, int], None] = lambda folder, size: None,
) -> None:
    """Write the simulated model as a checkpoint, whole or not at all, and compare what is read back.

    Args:
        out_dir: the folder to appear.
        source: the original checkpoint; tensors that aren't quantized are copied from it.
        plan, model, simulation: as planned and simulated.
        dtype: the dtype that the model was held in, which config.json then names.
        convert: write tensors that stay in the dtype that the model held them in; else as they are in `source`.
        overwrite: replace a folder that Detent wrote.
        complete: called with the folder, under its temporary name, and the bytes of its tensors, once it was written
            and read back; may add to it.

    Raises:
        DetentError: the folder can't be written, or what is read back differs from what was simulated.
    """
    scales, layers = kv_scales(model), simulation.layers
    config = {key: value for key, value in source.config.items() if key not in ("torch_dtype", "dtype")}
    config["dtype"] = str(dtype).removeprefix("torch.")
    if plan.unties or _was_untied(model, config):
        config["tie_word_embeddings"] = False
    source.config = config
    held = {name: p.dtype for name, p in model.named_parameters()} if convert else {}
    changed = {
        name: model.get_parameter(name) for name in simulation.changed if name.removesuffix(".weight") not in layers
    }
    kept = [*plan.kept, *sorted(changed.keys() - plan.kept.keys())]

    def check(folder: Path) -> None:
        verify(folder, layers, scales)
        complete(folder, open_quantized(folder).source.nbytes)

    formats = with_online_formats(plan.formats, [layer.record for layer in layers.values()], model)
    with QuantizedWriter(
        out_dir, source=source, formats=formats, overwrite=overwrite, max_shard_size=SHARD_SIZE
    ) as writer:
        for name in track([*layers, *kept], "Writing", len(layers) + len(kept)):
            if name in layers:
                writer.add_layer(layers[name].record)
            elif name in changed:
                writer.add_tensor(name, changed[name].detach().cpu())
            else:
                tensor = source.tensor(name)
                writer.add_tensor(name, tensor.to(held.get(name, tensor.dtype)))
        for module, (key, value) in scales.items():
            writer.add_kv(module, key, value)
        writer.finish(check=check)


def _was_untied(model: nn.Module, config: dict[str, Any]) -> bool:
    """Whether an algorithm gave the output embedding a tensor of its own."""
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", True)
    return bool(config.get("tie_word_embeddings", True)) and not tied


def verify(folder: Path, layers: dict[str, SimulatedLayer], kv: dict[str, tuple[Scales, Scales]]) -> None:
    """Read a written checkpoint and compare it with the simulation, bit for bit.

    Raises:
        DetentError: a weight, a scale or a format differs.
    """
    checkpoint = open_quantized(folder)
    for name, layer in track(layers.items(), "Reading back", len(layers)):
        read = checkpoint.layer(name)
        if read.formats != layer.record.formats:
            raise DetentError(f"{name}: read back as {read.formats}, but {layer.record.formats} was simulated")
        if layer.record.weight is not None and read.weight is not None:
            _same_weight(name, layer.record.weight, read.weight)
        for side in ("input", "output"):
            ours, theirs = getattr(layer.record, side), getattr(read, side)
            if ours is not None and ours.scales is not None:
                _same_scales(f"{name} {side}", ours.scales, theirs.scales)
    read_kv = checkpoint.kv_scales()
    for module, pair in kv.items():
        for which, ours, theirs in zip(("key", "value"), pair, read_kv[module], strict=True):
            _same_scales(f"{module} {which}", ours, theirs)


def _same_weight(name: str, simulated: QTensor, read: QTensor) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        if not torch.equal(decode(simulated, dtype), decode(read, dtype)):
            raise DetentError(f"{name}: the weight read back differs from the one that was simulated")


def _same_scales(name: str, simulated: Scales, read: Scales) -> None:
    for ours, theirs in zip(vars(simulated).values(), vars(read).values(), strict=True):
        if (ours is None) != (theirs is None) or (ours is not None and not _identical(ours, theirs)):
            raise DetentError(f"{name}: the scale read back differs from the calibrated one")


def _identical(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits, whatever their shapes."""
    return a.dtype == b.dtype and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))
