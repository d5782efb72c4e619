"""What holds for every folder that Detent writes, checked before it takes its place.

Each tensor of the source is there exactly once, quantized or kept; what was kept has the bits that it should have, and
is finite; codes and scales read back are those that were simulated; and the model that a user loads from the folder
computes what the simulated model computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detent.checkpoints import LayerCheckpoint, Layout, ModelFormats, QuantizedCheckpoint, Source, open_quantized
from detent.checkpoints.folder import digest
from detent.checkpoints.records import ATTENTION_SIDES
from detent.errors import DetentError
from detent.formats import Scales
from detent.formats.checks import all_finite
from detent.model.usage import quantizer_usage
from detent.pretrained.facts import input_device, vocabulary_size
from detent.pretrained.loading import damaged
from detent.progress import track

#: A tensor that is not quantized: None for its values in the source, a dtype for those cast to it, or new values.
Kept = Tensor | torch.dtype | None

_CHECKED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: Relative difference of logits, by dtype, that another order of the same sums may make.
_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-8}
_COARSE = 2e-2
#: Tokens that logits are compared on.
_PROBE_LENGTH = 8


@dataclass(frozen=True)
class Expected:
    """What has to be found in a written folder; names are those in the file.

    Attributes:
        formats: of all layers.
        examples: the contents of a layer of each form, which are read back and compared bit for bit.
        kept: checksums of the tensors that stay, as they should be.
        parts: tensors of the source that are written as layers of other names: they hold several.
        kv: scales of keys and values, by attention module.
        digests: checksums of all tensors, as they were passed to the file system.
    """

    formats: ModelFormats
    examples: list[LayerCheckpoint]
    kept: dict[str, int]
    kv: Mapping[str, tuple[Scales, ...]]
    digests: dict[str, int]
    parts: frozenset[str] = frozenset()


def verify(folder: Path, expected: Expected, source: Source) -> int:
    """Prove that a written folder holds what was quantized; returns the number of its tensors.

    Args:
        folder: with everything in it.
        expected: what it should hold.
        source: the original checkpoint.

    Raises:
        DetentError: a tensor is missing, there twice or changed; a layer, format or scale differs.
    """
    checkpoint = open_quantized(folder)
    _check_names(checkpoint, expected, source)
    tensors = checkpoint.source.tensors
    for name in track(tensors, "Reading back", len(tensors)):
        found = digest(checkpoint.source.tensor(name))
        if found != expected.digests.get(name) or found != expected.kept.get(name, found):
            raise DetentError(f"the written checkpoint is wrong: {name} differs from what it should be")
    for name, formats in expected.formats.layers.items():
        if checkpoint.formats.layers[name] != formats:
            raise DetentError(f"{name}: read back as {checkpoint.formats.layers[name]}, but {formats} was simulated")
    for record in expected.examples:
        _check_layer(record.name, record, checkpoint.layer(record.name))
    read_kv = checkpoint.kv_scales()
    for module, pair in expected.kv.items():
        for which, ours, theirs in zip(ATTENTION_SIDES[: len(pair)], pair, read_kv[module], strict=True):
            _check_tensors(f"{module}.{which}: its scale", vars(ours), vars(theirs))
    checkpoint.source.close()
    return len(tensors)


def kept_tensor(name: str, how: Kept, source: Source, layout: Layout) -> Tensor:
    """A tensor that is not quantized, as it will be written, and read.

    Raises:
        DetentError: a value is not finite, or too large for the dtype that it is cast to.
    """
    if isinstance(how, Tensor):
        if not all_finite(how):
            raise DetentError(f"{name} became NaN or infinite while the model was changed, so it is not written")
        return layout.settled(name, how.cpu())
    tensor = source.tensor(name)
    if tensor.dtype in _CHECKED and not all_finite(tensor):
        raise damaged(source, name)
    cast = layout.settled(name, tensor if how is None else tensor.to(how))
    if cast.is_floating_point() and not all_finite(cast):
        raise does_not_fit(name, tensor, cast.dtype)
    return cast


def does_not_fit(name: str, tensor: Tensor, dtype: torch.dtype) -> DetentError:
    """The error for a tensor that overflows `dtype`."""
    short = str(dtype).removeprefix("torch.")
    return DetentError(
        f"{name} has a value of {float(tensor.abs().max()):g}, but the largest in {short} is"
        f" {torch.finfo(dtype).max:g}; keep the model in bfloat16 or float32"
    )


@torch.no_grad()
def probe_logits(model: nn.Module) -> Tensor:
    """The logits [1, tokens, vocabulary] of a language model on a few fixed tokens, on the CPU.

    Raises:
        DetentError: a quantizer that is on was bypassed, so the model isn't what it is said to be.
    """
    net: Any = model
    size = vocabulary_size(net.config) or 2
    ids = (torch.arange(1, _PROBE_LENGTH + 1) * 7919 % size).unsqueeze(0).to(input_device(model))
    with quantizer_usage(model) as usage:
        logits: Tensor = net(input_ids=ids, use_cache=False).logits
    usage.check()
    return logits.cpu()


def _check_names(checkpoint: QuantizedCheckpoint, expected: Expected, source: Source) -> None:
    layers, kept, there = expected.formats.layers, expected.kept.keys(), set(checkpoint.kept)
    weights = {f"{name}.weight" for name, formats in layers.items() if formats.weight is not None}
    problems = [
        ("is neither quantized nor kept", source.tensors.keys() - weights - kept - expected.parts),
        ("is both quantized and kept", weights & kept),
        ("was kept but is missing", kept - there),
        ("was written but not planned", there - kept),
        ("was quantized but is missing", layers.keys() - checkpoint.formats.layers.keys()),
        ("was written but is missing", expected.digests.keys() - checkpoint.source.tensors.keys()),
    ]
    for problem, names in problems:
        if names:
            raise DetentError(f"the written checkpoint is wrong: {min(names)} {problem}")


def _check_layer(name: str, simulated: LayerCheckpoint, read: LayerCheckpoint) -> None:
    if read.formats != simulated.formats:
        raise DetentError(f"{name}: read back as {read.formats}, but {simulated.formats} was simulated")
    if simulated.weight is not None:
        _check_tensors(f"{name}: its weight", _tensors(simulated.weight), _tensors(read.weight))
    for side in ("input", "output"):
        ours, theirs = getattr(simulated, side), getattr(read, side)
        if ours is not None and ours.scales is not None:
            _check_tensors(f"{name}: the scale of its {side}", vars(ours.scales), vars(theirs.scales))
    if simulated.low_rank is not None:
        for ours, theirs in zip(simulated.low_rank, read.low_rank or (), strict=True):
            _check_tensors(f"{name}: its low-rank branch", {"": ours}, {"": theirs})


def _tensors(weight: Any) -> dict[str, Tensor | None]:
    return {part: getattr(weight, part) for part in ("codes", "scale", "zero_point", "outer_scale", "micro")}


def _check_tensors(what: str, simulated: Mapping[str, Tensor | None], read: Mapping[str, Tensor | None]) -> None:
    for part, ours in simulated.items():
        theirs = read.get(part)
        if (ours is None) != (theirs is None) or (
            ours is not None and theirs is not None and not _identical(ours, theirs)
        ):
            raise DetentError(f"{what} read back differs from the one that was simulated")


def _identical(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits, whatever their shapes."""
    if a.dtype != b.dtype or a.numel() != b.numel():
        return False
    return torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.cpu().contiguous().flatten().view(integers[tensor.element_size()])


def check_logits(expected: Tensor, found: Tensor) -> float:
    """Refuse a reloaded model whose `probe_logits` aren't those of the simulated one, up to the order of sums.

    Returns:
        How far they are from them, relative to the length of the simulated ones.

    Raises:
        DetentError: they differ.
    """
    if expected.shape != found.shape:
        raise DetentError(
            f"the model read back gives logits of shape {tuple(found.shape)}, not {tuple(expected.shape)}"
        )
    tolerance = _TOLERANCES.get(expected.dtype, _COARSE)
    difference = float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))
    if not difference <= tolerance:  # NaN too
        raise DetentError(
            f"the model read back does not compute what the simulated one did: its logits differ by {difference:.2%}"
        )
    return difference
