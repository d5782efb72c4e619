"""What holds for every folder that Detent writes, checked before it takes its place.

Each tensor of the source is there exactly once, quantized or kept; what was kept has the bits that it should have, and
is finite; codes and scales read back are those that were simulated; and the model that a user loads from the folder
computes what the simulated model computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detent.checkpoints import LayerCheckpoint, QuantizedCheckpoint, Source, open_quantized
from detent.errors import DetentError
from detent.formats import Scales
from detent.formats.qtensor import all_finite
from detent.pretrained.facts import input_device, vocabulary_size
from detent.progress import track

#: A tensor that stays: None as it is in the source, a dtype for that cast to it, or new values.
Kept = Tensor | torch.dtype | None

#: Relative difference of logits, by dtype, that another order of the same sums may make.
_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-8}
_COARSE = 2e-2
#: Tokens that logits are compared on.
_PROBE_LENGTH = 8


def verify(
    folder: Path,
    *,
    records: Mapping[str, LayerCheckpoint],
    kept: Mapping[str, Kept],
    source: Source,
    kv: Mapping[str, tuple[Scales, Scales]] | None = None,
    expected_logits: Tensor | None = None,
    load: Callable[[Path], nn.Module] | None = None,
) -> None:
    """Prove that a written folder holds what was simulated.

    Args:
        folder: with everything in it.
        records: what was simulated, by the name of the layer in the file.
        kept: by the name of the tensor in the file.
        source: the original checkpoint.
        kv: scales of keys and values, by the name of the attention module in the file.
        expected_logits: of the simulated model, from `probe_logits`; None compares what is stored alone.
        load: loads the folder as its user would; needed with `expected_logits`.

    Raises:
        DetentError: a tensor is missing, there twice, changed or not finite; a layer or scale differs; the reloaded
            model computes something else.
    """
    checkpoint = open_quantized(folder)
    _check_names(checkpoint, records, kept, source)
    for name, record in track(records.items(), "Reading back", len(records)):
        _check_layer(name, record, checkpoint.layer(name))
    for name, how in kept.items():
        _check_kept(name, checkpoint.tensor(name), kept_tensor(name, how, source))
    read_kv = checkpoint.kv_scales()
    for module, pair in (kv or {}).items():
        for which, ours, theirs in zip(("key", "value"), pair, read_kv[module], strict=True):
            _check_tensors(f"{module}: the scale of its {which}", vars(ours), vars(theirs))
    checkpoint.source.close()
    if expected_logits is not None and load is not None:
        _check_logits(expected_logits, probe_logits(load(folder)))


def kept_tensor(name: str, how: Kept, source: Source) -> Tensor:
    """A tensor that stays, as it is to be written.

    Raises:
        DetentError: a value is too large for the dtype that it is cast to.
    """
    if isinstance(how, Tensor):
        return how.cpu()
    tensor = source.tensor(name)
    if how is None or how == tensor.dtype:
        return tensor
    cast = tensor.to(how)
    if how.is_floating_point and not all_finite(cast):
        raise does_not_fit(name, tensor, how)
    return cast


def does_not_fit(name: str, tensor: Tensor, dtype: torch.dtype) -> DetentError:
    """What to say about a tensor that overflows `dtype`."""
    short = str(dtype).removeprefix("torch.")
    return DetentError(
        f"{name} has a value of {float(tensor.abs().max()):g}, and {short} ends at {torch.finfo(dtype).max:g}; keep the"
        " model in bfloat16 or float32"
    )


@torch.no_grad()
def probe_logits(model: nn.Module) -> Tensor:
    """The logits [1, tokens, vocabulary] of a language model on a few fixed tokens, on the CPU."""
    net: Any = model
    size = vocabulary_size(net.config) or 2
    ids = (torch.arange(1, _PROBE_LENGTH + 1) * 7919 % size).unsqueeze(0).to(input_device(model))
    logits: Tensor = net(input_ids=ids, use_cache=False).logits
    return logits.cpu()


def _check_names(
    checkpoint: QuantizedCheckpoint, records: Mapping[str, LayerCheckpoint], kept: Mapping[str, Kept], source: Source
) -> None:
    weights = {f"{name}.weight" for name, record in records.items() if record.weight is not None}
    problems = [
        ("is neither quantized nor kept", source.tensors.keys() - weights - kept.keys()),
        ("is both quantized and kept", weights & kept.keys()),
        ("was kept and isn't there", kept.keys() - set(checkpoint.kept)),
        ("is there, although nothing asked for it", set(checkpoint.kept) - kept.keys()),
        ("was quantized and isn't there", records.keys() - checkpoint.formats.layers.keys()),
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


def _check_kept(name: str, read: Tensor, wanted: Tensor) -> None:
    if read.shape != wanted.shape or not _identical(read, wanted):
        raise DetentError(f"the written checkpoint is wrong: {name} differs from what it should be")
    if read.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16) and not all_finite(read):
        raise DetentError(f"{name} holds NaN or infinity, so it is not written")


def _identical(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits, whatever their shapes."""
    if a.dtype != b.dtype or a.numel() != b.numel():
        return False
    return torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.cpu().contiguous().flatten().view(integers[tensor.element_size()])


def _check_logits(expected: Tensor, found: Tensor) -> None:
    if expected.shape != found.shape:
        raise DetentError(
            f"the model read back gives logits of shape {tuple(found.shape)}, not {tuple(expected.shape)}"
        )
    tolerance = _TOLERANCES.get(expected.dtype, _COARSE)
    difference = float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))
    if not difference <= tolerance:  # NaN too
        raise DetentError(
            f"the model read back computes something else than the one that was simulated: its logits differ by"
            f" {difference:.2%}; nothing is written"
        )
