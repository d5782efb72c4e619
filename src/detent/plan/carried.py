"""What a checkpoint has beside the model: weights that the model's class has no place for, such as the layers that
predict several tokens at once (MTP) of DeepSeek-V3, GLM-4.5 and Qwen3-Next.

Engines have classes of their own for them. Such weights are copied unchanged, or quantized without data like the layers
of the same names and shapes in the model's blocks. What has no such twin stays: the projection that joins a token with
the hidden state, embeddings, heads.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from detent.checkpoints import LayerFormats, Source
from detent.config import QuantizeAlgorithmConfig
from detent.config.transforms import RotationConfig
from detent.errors import DetentError
from detent.nn import QuantWeightBase
from detent.pretrained.names import CheckpointNames
from detent.structure import Structure


@dataclass(frozen=True)
class Carried:
    """Layers beside the model that are quantized.

    Attributes:
        formats: by name in the file.
        modules: their quantized twins, on the meta device.
        groups: those that engines fuse, as `Structure.fused_groups`.
    """

    formats: Mapping[str, LayerFormats] = field(default_factory=dict)
    modules: Mapping[str, QuantWeightBase] = field(default_factory=dict)
    groups: tuple[tuple[str, ...], ...] = ()


def beside_the_model(source: Source, names: CheckpointNames) -> list[str]:
    """The matrices of a checkpoint that the model has no place for."""
    return [
        name
        for name, info in source.tensors.items()
        if len(info.shape) == 2 and info.dtype.is_floating_point and not names.of_tensor(name).parameters
    ]


def carried_layers(
    model: nn.Module,
    beside: list[str],
    source: Source,
    names: CheckpointNames,
    layers: Mapping[str, LayerFormats],
    structure: Structure | None,
) -> Carried:
    """How the linear layers among `beside` are quantized: as their twins in the model are.

    Args:
        model: with its quantizers set.
        beside: from `beside_the_model`.
        source, names, structure: of the checkpoint.
        layers: the formats of the model's layers.

    Raises:
        DetentError: there are no such layers; their activations would have to be calibrated.
    """
    twins: dict[str, str] = {}
    for name in layers:
        if (tail := _tail(names.layer(name) or name)) and layers[name].weight is not None:
            twins.setdefault(tail, name)
    found = {}
    for tensor in beside:
        name = tensor.removesuffix(".weight")
        twin = twins.get(_tail(name)) if name != tensor else None
        if twin is not None and layers[twin].shape == tuple(source.info(tensor).shape):
            found[name] = twin
    if not found:
        raise DetentError(
            f"quantize_mtp: {source.path} has no layers beside {type(model).__name__} that are like those in its"
            " blocks; leave it out"
        )
    for name, twin in found.items():
        if any(side is not None and not side.dynamic for side in (layers[twin].input, layers[twin].output)):
            raise DetentError(
                f"quantize_mtp: the activations of {name} can't be calibrated, since {type(model).__name__} doesn't run"
                " it; choose a scheme of weights alone or with dynamic activations"
            )
    groups = []
    for group in () if structure is None else structure.fused_groups:
        tails = {_tail(names.layer(name) or name) for name in group}
        alike: dict[str, list[str]] = {}
        for name in found:
            if _tail(name) in tails:
                alike.setdefault(name.removesuffix(_tail(name)), []).append(name)
        groups += [tuple(members) for members in alike.values() if tuple(members) not in groups]
    modules = {name: copy.deepcopy(model.get_submodule(twin)) for name, twin in found.items()}
    return Carried(
        {name: layers[twin] for name, twin in found.items()},
        {name: module for name, module in modules.items() if isinstance(module, QuantWeightBase)},
        tuple(groups),
    )


def _tail(name: str) -> str:
    """A name inside its block: what follows the first number; "" outside of blocks."""
    found = re.search(r"\.\d+\.", name)
    return name[found.end() :] if found else ""


def note_on(beside: list[str], carried: Carried, model: nn.Module) -> str:
    """What the user should know about the matrices beside the model."""
    left = [name for name in beside if name.removesuffix(".weight") not in carried.formats]
    done = f" {len(beside) - len(left)} are quantized like those in its blocks;" if carried.formats else ""
    return (
        f"{type(model).__name__} has no place for {len(beside)} matrices of the checkpoint, as for layers that predict"
        f" several tokens:{done} {len(left)} are copied unchanged and listed as not quantized, for instance"
        f" {', '.join(left[:3])}"
    )


def without_r1(
    algorithms: list[QuantizeAlgorithmConfig], beside: list[str], source: Source, structure: Structure | None
) -> tuple[list[QuantizeAlgorithmConfig], list[str]]:
    """(algorithms, notes): weights beside the model read its residual stream as it was, so it isn't rotated.

    Raises:
        DetentError: the rotation of the stream is insisted on.
    """
    stream = None if structure is None else structure.stream
    reader = next((n for n in beside if stream is not None and stream.width in source.info(n).shape), None)
    turning = [step for step in algorithms if isinstance(step, RotationConfig) and step.r1 is not False]
    if reader is None or not turning:
        return algorithms, []
    if any(step.r1 for step in turning):
        raise DetentError(
            f"rotation: R1 would turn the residual stream, which {reader} beside the model reads as well; set r1=False"
        )
    changed: list[QuantizeAlgorithmConfig] = [
        step.model_copy(update={"r1": False}) if isinstance(step, RotationConfig) else step for step in algorithms
    ]
    return changed, [f"rotation: R1: not done (weights beside the model, such as {reader}, read the residual stream)"]
