"""`svdquant` at one layer: its weight becomes the rest, and what rounding would lose most goes into a branch."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import Tensor

from detent.algorithms.layer import Layer
from detent.algorithms.outcome import Outcome
from detent.algorithms.svdquant import svdquant
from detent.config.transforms import SVDQuantConfig
from detent.errors import DetentError
from detent.nn.low_rank import drop_low_rank, low_rank_of, set_low_rank


def split_layer(layer: Layer, moment: Tensor | None, step: SVDQuantConfig) -> Outcome:
    """Give a linear layer a low-rank branch, in place of one that it has. The rest has no range yet.

    Args:
        layer: the layer; channel scales are in its weight already, since they would not reach the branch later.
        moment: second moment of its inputs, scaled and rotated as they are; None weighs all inputs alike.
        step: rank, and which layers get none.

    Returns:
        What was done. Where no branch makes the objective smaller, the layer stays as it is and the outcome says so.

    Raises:
        DetentError: the module isn't a quantized linear.
    """
    objective = "sum of squared errors" if moment is None else "tr(D G D^T)"
    if any(fnmatchcase(layer.name, pattern) for pattern in step.skip_layers or []):
        return Outcome("svdquant", objective, 0.0, 0.0, notice=f"{layer.name} is in skip_layers")
    weight = layer.matrix()
    branch = low_rank_of(layer.module)
    if branch is not None:
        weight = weight + branch[1].to(weight) @ branch[0].to(weight)
    dtype = layer.module.weight.dtype
    split = svdquant(weight.to(dtype), layer.format, step.lowrank, moment=moment, rounds=step.rounds)
    if split is None:
        layer.set_matrix(weight)
        drop_low_rank(layer.module)
        return Outcome("svdquant", objective, 0.0, 0.0, notice="no branch is better than none: plain rounding is kept")
    set_low_rank(layer.module, split.a, split.b, layer.name)
    layer.set_matrix(split.rest)
    return Outcome("svdquant", objective, split.before, split.after, split.energy, {"rank": split.rank})


def refuse_scale_after_branch(layer: Layer, algorithm: str) -> None:
    """A channel scale on a layer with a branch would have to scale the branch too.

    Raises:
        DetentError: the layer has a branch.
    """
    if low_rank_of(layer.module) is not None:
        raise DetentError(f"{algorithm}: {layer.name} has a low-rank branch; name {algorithm} before svdquant")
