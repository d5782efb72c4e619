"""`svdquant`: a low-rank branch in full precision alongside the rounded weight (SVDQuant, arXiv 2411.05007).

``W ~ B A + Q(W - B A)`` with A [rank, in] and B [out, rank]. Objective: ``tr(D G D^T)``, ``D = W - B A - Q(W - B A)``,
G the second moment of the layer's inputs; ``sum D^2`` where there is none.

For a fixed rounded rest Q the best branch is known: with U the leading eigenvectors of ``E G E^T``, ``E = W - Q``, it
is ``B = U, A = U^T E`` (the truncated singular value decomposition of ``E G^1/2``, and G is never inverted). So branch
and rest are fitted in turns, from two starts: the leading part of W itself, as in the paper, which leaves a smaller
range to round; and no branch, which makes the first branch that of round-to-nearest's error. The best branch seen is
kept, measured with its own rest rounded. ``rest + B A`` is the weight, so that without rounding nothing has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from detent.algorithms.awq import search_channel_scale
from detent.algorithms.layer import Layer
from detent.algorithms.objective import output_error
from detent.algorithms.outcome import Outcome
from detent.algorithms.registry import Handler, LayerFacts, register, scale_after_branch, with_branch
from detent.algorithms.site import Wanted
from detent.algorithms.site_work import SiteWork
from detent.algorithms.smoothquant import smoothquant_scale
from detent.config.algorithm import AWQLiteCalibConfig
from detent.config.transforms import SVDQuantConfig
from detent.errors import DetentError
from detent.formats import Format, fake_quantize
from detent.nn.low_rank import drop_low_rank, low_rank_of, set_low_rank
from detent.nn.own_linear import TRANSPOSED

#: Up to this many rows eigenvectors are computed exactly, beyond by subspace iteration.
_EXACT = 256
_ITERATIONS, _OVERSAMPLING = 6, 16


@dataclass(frozen=True)
class LowRank:
    """A weight as a branch and a rest.

    Attributes:
        a: [rank, in], in the weight's dtype.
        b: [out, rank], likewise.
        rest: [out, in], likewise: the weight without the branch, to be rounded in its place.
        before: the objective of round-to-nearest without a branch.
        after: the objective with `a` and `b` and the rounded rest; never above `before`.
        energy: the objective of a weight of zeros.
    """

    a: Tensor
    b: Tensor
    rest: Tensor
    before: float
    after: float
    energy: float

    @property
    def rank(self) -> int:
        return len(self.a)


def svdquant(
    weight: Tensor,
    fmt: Format,
    rank: int = 32,
    *,
    moment: Tensor | None = None,
    rounds: int = 6,
    quantize: Callable[[Tensor], Tensor] | None = None,
) -> LowRank | None:
    """Split a weight into a low-rank branch and a rest to be rounded.

    Args:
        weight: float [out, in].
        fmt: the format of the rest.
        rank: of the branch; at most the smaller side of the weight is used.
        moment: G, float32 [in, in], or its diagonal [in]; None weighs all inputs equally.
        rounds: how often branch and rest are fitted to each other, from each start.
        quantize: rounds a rest [out, in]; by default with the scales that it asks for itself.

    Returns:
        The split, or None where no branch gives a smaller objective than round-to-nearest (an exact format, or a branch
        that its dtype can't hold well enough).

    Raises:
        DetentError: the weight isn't a matrix, the rank isn't positive, or the moment has another width.
    """
    if weight.dim() != 2:
        raise DetentError(
            f"svdquant: a low-rank branch needs a weight [out, in], not one of shape {tuple(weight.shape)}"
        )
    if rank < 1 or rounds < 1:
        raise DetentError(f"svdquant: rank and rounds are at least 1, not {rank} and {rounds}")
    width = weight.shape[1]
    if moment is not None and moment.shape not in ((width,), (width, width)):
        raise DetentError(
            f"svdquant: a weight with {width} inputs needs a moment of the same size, not {tuple(moment.shape)}"
        )
    dtype = weight.dtype
    weight = weight.detach().to(torch.float32)
    rounded = quantize or (lambda rest: fake_quantize(rest, fmt))
    rank = min(rank, *weight.shape)

    def measure(difference: Tensor) -> float:
        return _measure(difference, moment)

    plain = rounded(weight)
    before, energy = _measure(weight - plain, moment), _measure(weight, moment)
    best: LowRank | None = None
    none = (weight.new_zeros(rank, width).to(dtype), weight.new_zeros(len(weight), rank).to(dtype))
    for branch in (_branch(weight, moment, rank, dtype), none):
        for _ in range(rounds):
            product = _product(branch)
            rest = (weight - product).to(dtype)
            values = rounded(rest.to(torch.float32))
            after = _measure(weight - values - product, moment)
            if after < (before if best is None else best.after):
                best = LowRank(*branch, rest, before, after, energy)
            branch = _branch(weight - values, moment, rank, dtype)
    return best


def _measure(difference: Tensor, moment: Tensor | None) -> float:
    if moment is None:
        return float(difference.pow(2).sum(dtype=torch.float64))
    if moment.dim() == 1:
        return float((difference.pow(2) * moment).sum(dtype=torch.float64))
    return float(output_error(difference, moment))


def _product(branch: tuple[Tensor, Tensor]) -> Tensor:
    a, b = branch
    return b.to(torch.float32) @ a.to(torch.float32)


def _branch(error: Tensor, moment: Tensor | None, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(A, B) of the best approximation B A of `error` [out, in] under G, rounded to `dtype`."""
    u = _leading(error, moment, rank)
    return (u.T @ error).to(dtype), u.to(dtype)


def _leading(error: Tensor, moment: Tensor | None, rank: int) -> Tensor:
    """The `rank` leading eigenvectors of E G E^T as orthonormal columns, float32 [out, rank]."""
    weighed = error if moment is None else error * moment if moment.dim() == 1 else error @ moment
    out = error.shape[0]
    if out <= _EXACT:
        gram = weighed.double() @ error.double().T
        vectors: Tensor = torch.linalg.eigh((gram + gram.T) / 2).eigenvectors
        return vectors[:, -rank:].flip(1).float()
    # Any orthonormal columns give a valid branch, and the error of a nearly leading subspace is nearly the least.
    columns = min(out, rank + _OVERSAMPLING)
    start = torch.randn(error.shape[1], columns, generator=torch.Generator().manual_seed(0)).to(error)
    basis = torch.linalg.qr(weighed @ start).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(weighed @ (error.T @ basis)).Q
    small = (basis.T @ weighed).double() @ (error.T @ basis).double()
    vectors = torch.linalg.eigh((small + small.T) / 2).eigenvectors
    leading: Tensor = basis.double() @ vectors[:, -rank:].flip(1)
    return leading.float()


# ---- at a site ------------------------------------------------------------------------------------------------------


def split_layer(layer: Layer, moment: Tensor | None, step: SVDQuantConfig) -> Outcome:
    """Give a linear layer a low-rank branch, in place of one that it has. The rest has no range yet.

    Args:
        layer: the layer; channel scales are in its weight already, since they would not reach the branch later.
        moment: second moment of its inputs, scaled and rotated as they are; None weighs all inputs equally.
        step: rank, and which layers get none.

    Returns:
        What was done. Where no branch makes the objective smaller, the layer stays as it is and the outcome says so.

    Raises:
        DetentError: the module isn't a quantized linear.
    """
    objective = "sum of squared errors" if moment is None else "tr(D G D^T)"
    if _is_skipped(layer.name, step):
        return Outcome("svdquant", objective, 0.0, 0.0, notice=f"{layer.name} is in skip_layers")
    weight = layer.matrix()
    branch = low_rank_of(layer.module)
    if branch is not None:
        weight = weight + branch[1].to(weight) @ branch[0].to(weight)
    dtype = layer.weight.dtype
    split = svdquant(weight.to(dtype), layer.format, step.lowrank, moment=moment, rounds=step.rounds)
    if split is None:
        layer.set_matrix(weight)
        drop_low_rank(layer.module)
        notice = "no low-rank branch beat round-to-nearest; keeping round-to-nearest"
        return Outcome("svdquant", objective, 0.0, 0.0, notice=notice, kept_plain=True, noteworthy=True)
    set_low_rank(layer.module, split.a, split.b, layer.name)
    layer.set_matrix(split.rest)
    return Outcome("svdquant", objective, split.before, split.after, split.energy, {"rank": split.rank})


def _is_skipped(name: str, step: SVDQuantConfig) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in step.skip_layers or [])


@register(SVDQuantConfig)
class SVDQuantHandler(Handler[SVDQuantConfig]):
    """A channel scale for each site, then a branch for each of its layers."""

    scales_channels = True

    def wants(self, step: SVDQuantConfig) -> Wanted:
        return Wanted(second_moment=True)

    def refusal(self, step: SVDQuantConfig, layer: LayerFacts) -> str | None:
        if layer.kind not in ("Linear", TRANSPOSED) and not _is_skipped(layer.name, step):
            return f"a low-rank branch needs a linear layer, not {layer.kind}; name it in skip_layers or exclude it"
        return scale_after_branch(layer, step.method)

    def leaves(self, step: SVDQuantConfig, layer: LayerFacts) -> LayerFacts:
        return layer if _is_skipped(layer.name, step) else with_branch(layer)

    def solve(self, step: SVDQuantConfig, site: SiteWork) -> None:
        if not site.cannot_scale() and site.is_linear:
            if step.alpha is None:
                search_channel_scale(site, AWQLiteCalibConfig(), "svdquant (channel scale)")
            else:
                site.scale_channels(site.tie(smoothquant_scale(site.channel_amax, site.weight_amax, step.alpha)))
        statistics = site.statistics
        moment = None if statistics.second_moment is None else statistics.moment()
        for layer in site.layers:
            site.note(layer, split_layer(layer, moment, step))
            site.state(layer).changed()
