"""What structure discovery hands to algorithms: sites, folds, the residual stream; and how a scale is put into weights.

Invariant: for a site with a fold, ``fold_scale(model, fold, s)`` together with ``scale_columns(model, site, s)`` leaves
the model's function unchanged for any positive s that went through ``tie_scale(fold, s)``.

A weight is named by its module (``model.layers.0.mlp.down_proj``: its parameter is ``weight``) or, where a module holds
weights of other names, such as fused experts, by the parameter (``model.layers.0.mlp.experts.down_proj``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detent.errors import DetentError
from detent.model import edit


@dataclass(frozen=True)
class Fold:
    """Where the inverse of a site's channel scale can be put without changing the model's function.

    Attributes:
        kind: "norm" (the weight multiplies, as in Llama), "offset_norm" (1 + weight multiplies, as in Gemma) or "rows"
            (output channels of a linear, convolution or fused experts before the site).
        module: qualified name of the producing module.
        parameters: names of its parameters that take the scale; the weight first, then a bias.
        channels: None if site channel i is made by row i; else site channel i is made by row ``channels[i]``. Slices of
            fused matrices (qkv, gate_up) are given so, and grouped-query attention, where several site channels share
            one row: then the scale has to be the same for them (`tie_scale`).
        proved: the probe's function did not change under a random scale. Only proved folds are in `Site.fold`.
        axis: axis of the first parameter that counts its rows: 0 for `nn.Linear`, 1 for GPT-2's ``Conv1D``; counted
            from the end (-2 or -1) for fused experts [experts, ., .]. Biases have their rows along the last axis.
    """

    kind: str
    module: str
    parameters: tuple[str, ...]
    channels: tuple[int, ...] | None
    proved: bool
    axis: int = 0


@dataclass(frozen=True)
class Site:
    """One activation [..., width] and the weights that read it.

    Attributes:
        name: the first weight's name.
        weights: names of the weights, in call order. All of their columns have to be scaled when the fold is used:
            where a router and experts read the same normalised tokens they are one site.
        block: name of the block that it is in; None outside the blocks.
        width: number of channels.
        fold: where its scale can go; None if there is no such place.
        reason: why there is no fold; "" if there is.
        column_axes: for each weight the axis of its parameter that counts the site's channels: 1 for `nn.Linear`
            and convolutions, 0 for GPT-2's ``Conv1D``, counted from the end for fused experts.
        routed: those of `weights` that see only the tokens that a router sends them.
        router: whether one of the weights is a router.
        experts: for fused experts their number where each has its own rows of activations here (the input of
            ``down_proj``): a scale may then be [experts, width]; else 0.
    """

    name: str
    weights: tuple[str, ...]
    block: str | None
    width: int
    fold: Fold | None
    reason: str
    column_axes: tuple[int, ...] = ()
    routed: tuple[str, ...] = ()
    router: bool = False
    experts: int = 0


@dataclass(frozen=True)
class Norm:
    """A normalisation of the residual stream.

    Attributes:
        name: its module's name.
        kind: "rms" (no mean is subtracted: commutes with a rotation once its weight is fused into the readers) or
            "layer" (subtracts the mean: first subtract the mean over output channels from each writer and embedding
            row, after which it is "rms").
        fold: how its multiplier is stored: the ``kind`` of `Fold` ("norm" or "offset_norm"), "" if it has none.
        parameters: its parameters: (), ("weight",) or ("weight", "bias"). A bias b becomes W b in the readers' biases.
    """

    name: str
    kind: str
    fold: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Reader:
    """A site that reads the residual stream.

    Attributes:
        site: name of the `Site`; its weights W become W diag(norm weight) Q under a rotation x -> x Q of the stream.
        norm: the norm between the stream and the site, or None where it reads the stream itself.
    """

    site: str
    norm: Norm | None


@dataclass(frozen=True)
class Stream:
    """The residual stream: the tensor [..., width] that blocks read and add to.

    Attributes:
        width: number of channels.
        embeddings: names of embedding tables [rows, width] whose rows start the stream: token, position, type
            embeddings.
        readers: who reads it, through which norm.
        writers: names of the weights whose output (bias included) is added, possibly times a constant or a router's
            weight for the token. Under a rotation W -> Q^T W, b -> b Q.
        head: name of the weight that reads the final norm (lm_head), None if there is none.
        tied: whether head and embedding are one tensor, which a rotation with norms fused has to untie.
        rotatable: whether ``x -> x Q`` for orthogonal Q, done to embeddings and writers, reaches every reader's norm
            unchanged (proved on the probe) and every norm commutes with it once its weight is fused (for kind "layer"
            once writers are centred too).
        reason: why not rotatable; "" if it is.
    """

    width: int
    embeddings: tuple[str, ...]
    readers: tuple[Reader, ...]
    writers: tuple[str, ...]
    head: str | None
    tied: bool
    rotatable: bool
    reason: str

    @property
    def norms(self) -> tuple[Norm, ...]:
        """The norms of all readers, each once."""
        return tuple(dict.fromkeys(r.norm for r in self.readers if r.norm is not None))


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts.

    Attributes:
        module: name of the module that holds the experts.
        router: name of the weight whose output chooses among them; None if none was found.
        count: number of experts.
        kind: how they are stored: "stacked" in tensors [experts, ., .], "joined" one after the other in matrices
            [experts * n, .], or "list" where each is a module. In both kinds of tensors experts are parts along axis 0.
        weights: names of all of their weights.
        members: the experts' modules; () unless kind is "list".
        shared: names of the weights of shared experts: they read what the experts read, for every token.
    """

    module: str
    router: str | None
    count: int
    kind: str
    weights: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()


@dataclass(frozen=True)
class Structure:
    """What was found in a model.

    Attributes:
        blocks: names of the repeated blocks, in the order in which they run; () if no chain was found.
        sites: every activation that weights read, in call order.
        routers: names of weights whose output chooses experts.
        experts: names of expert modules: one each, or the module that holds fused experts.
        keys, values: names of the weights that make attention's keys and values; a fused qkv is in both.
        stream: the residual stream; None where there is none or more than one (encoder-decoder).
        unread: names of modules with weight matrices that the probe never reached.
        taken: names of weights that a module other than their own multiplies with, without calling their own.
        notes: what a user should know: why no blocks were found, and the like.
        chains: the blocks by chain, in the order in which they run: each reads what the one before it gave, all of one
            shape. An encoder and a decoder are two chains.
        gates: names of weights in blocks with one row, whose output multiplies all channels of others, such as what a
            shared expert makes. They choose nothing, but every channel depends on each of their few weights.
        mixtures: the mixtures of experts.
        fused_groups: weights that engines join into one matrix: they are in one module, read the same activation, and
            their outputs meet (query, key and value; gate and up). They have to have the same format, and where a scale
            covers a matrix the same scale. All weights of a `Mixture` have to have the same format too.
    """

    blocks: tuple[str, ...]
    sites: tuple[Site, ...]
    routers: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    stream: Stream | None = None
    unread: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    chains: tuple[tuple[str, ...], ...] = ()
    gates: tuple[str, ...] = ()
    mixtures: tuple[Mixture, ...] = ()
    fused_groups: tuple[tuple[str, ...], ...] = ()
    taken: tuple[str, ...] = ()

    def block_of(self, name: str) -> str | None:
        """The block that a module or weight is in, or is itself; None outside the blocks."""
        parts = name.split(".")
        blocks = set(self.blocks)
        return next((p for i in range(len(parts), 0, -1) if (p := ".".join(parts[:i])) in blocks), None)

    def mixture_of(self, name: str) -> Mixture | None:
        """The mixture that a weight is an expert's of, or None (for routers and shared experts)."""
        return next((m for m in self.mixtures if name in m.weights), None)

    def expert_of(self, name: str) -> str | None:
        """The expert that a module or weight belongs to: its module, or that of all experts where they are tensors."""
        for mixture in self.mixtures:
            inside = (m for m in mixture.members if name == m or name.startswith(f"{m}."))
            found = next(inside, mixture.module if name in mixture.weights or name == mixture.module else None)
            if found is not None:
                return found
        return None

    def routed_shares(self, config: object) -> dict[str, float]:
        """The share of the tokens that reaches each weight of a routed expert, by the model's configuration."""
        shares: dict[str, float] = {}
        for mixture in self.mixtures:
            chosen = getattr(config, "num_experts_per_tok", None) or mixture.count
            shares |= dict.fromkeys(mixture.weights, min(1.0, chosen / max(1, mixture.count)))
        return shares

    def site_of(self, weight: str) -> Site | None:
        """The site that a weight reads, or None."""
        return next((site for site in self.sites if weight in site.weights), None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def weight_parameter(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module and the attribute that hold the weight called `name`: of a module, or of a parameter.

    Raises:
        DetentError: there is no such module or parameter.
    """
    return edit.place(dict(model.named_modules()), name)


def tie_scale(fold: Fold, scale: Tensor) -> Tensor:
    """`scale` [..., width] made equal where channels share a row, by the geometric mean."""
    if fold.channels is None:
        return scale
    rows = torch.tensor(fold.channels, device=scale.device)
    _, group, counts = torch.unique(rows, return_inverse=True, return_counts=True)
    if int(counts.max()) == 1:
        return scale
    logs = scale.double().log()
    means = logs.new_zeros(*scale.shape[:-1], len(counts)).index_add_(-1, group, logs) / counts
    tied: Tensor = means.exp()[..., group].to(scale.dtype)
    return tied


@torch.no_grad()
def fold_scale(model: nn.Module, fold: Fold, scale: Tensor) -> None:
    """Divide the producer's rows by `scale`; computed in float32 at least.

    Args:
        model: the model.
        fold: of the site.
        scale: positive, [width], or [experts, width] where the producer is fused experts.

    Raises:
        DetentError: channels that share a row have different scales (see `tie_scale`); the producer's weight is packed.
    """
    module = model.get_submodule(fold.module)
    tensors = {name: edit.get(module, name, fold.module) for name in fold.parameters}
    weight = tensors[fold.parameters[0]]
    divisor = _per_row(fold, scale, weight.shape[fold.axis])
    for (name, tensor), axis in zip(tensors.items(), [fold.axis] + [-1] * len(tensors), strict=False):
        by = _along(divisor.to(tensor.device), tensor, axis)
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        # A norm that multiplies with 1 + w: (1 + w') = (1 + w) / s. Its bias is divided like any other.
        offset = 1.0 if fold.kind == "offset_norm" and tensor is weight else 0.0
        edit.put(module, name, (wide + offset) / by - offset, fold.module)


@torch.no_grad()
def scale_columns(model: nn.Module, site: Site, scale: Tensor, weights: Sequence[str] | None = None) -> None:
    """Multiply the columns of a site's weights by `scale`: the counterpart of `fold_scale`.

    Args:
        model: the model.
        site: the site.
        scale: positive, [width], or [experts, width] where `site.experts`.
        weights: only these of the site's weights; None means all.
    """
    for name, axis in zip(site.weights, site.column_axes, strict=True):
        if weights is not None and name not in weights:
            continue
        module, attribute = weight_parameter(model, name)
        tensor = edit.get(module, attribute, name)
        factor = scale.to(tensor.device)
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        groups = getattr(module, "groups", 1)
        if (
            groups > 1 and axis == 1
        ):  # a grouped convolution [out, in / groups, ...] whose outputs read their group alone
            grouped = wide.unflatten(0, (groups, -1))
            factor = factor.reshape(groups, 1, -1, *(1 for _ in wide.shape[2:]))
            edit.put(module, attribute, (grouped * factor).flatten(0, 1), name)
        else:
            edit.put(module, attribute, wide * _along(factor, tensor, axis), name)


def _per_row(fold: Fold, scale: Tensor, rows: int) -> Tensor:
    """The divisor of each of the producer's rows: 1 where a row makes no channel of the site."""
    wide = scale.detach().to(torch.promote_types(scale.dtype, torch.float32))
    if fold.channels is None:
        if wide.shape[-1] != rows:
            raise DetentError(f"{fold.module}: a scale of {wide.shape[-1]} channels for {rows} rows")
        return wide
    if len(fold.channels) != wide.shape[-1]:
        raise DetentError(f"{fold.module}: a scale of {wide.shape[-1]} channels for {len(fold.channels)} channels")
    index = torch.tensor(fold.channels, device=wide.device)
    divisor = wide.new_ones(*wide.shape[:-1], rows)
    divisor[..., index] = wide
    if not torch.equal(divisor[..., index], wide):
        raise DetentError(
            f"{fold.module}: channels of the site that share a row have different scales; pass the scale through"
            " tie_scale first"
        )
    return divisor


def _along(factor: Tensor, tensor: Tensor, axis: int) -> Tensor:
    """`factor` [n] or [experts, n] shaped to multiply `tensor` with n along `axis`, experts along axis 0."""
    shape = [1] * tensor.dim()
    shape[axis] = factor.shape[-1]
    if factor.dim() == 2:
        shape[0] = factor.shape[0]
    return factor.reshape(shape)
