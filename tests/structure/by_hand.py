"""Folding and rotating written out from the fields of `Fold`, `Site` and `Stream` alone: the oracle of these tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from detent.structure import Fold, Site, Stream, Structure


def holder(model: Any, name: str) -> tuple[Any, str]:
    """The module and attribute of a weight's parameter."""
    modules = dict(model.named_modules())
    if name in modules and not isinstance(getattr(modules[name], "weight", None), type(None)):
        return modules[name], "weight"
    parent, _, attribute = name.rpartition(".")
    return modules[parent], attribute


def random_scale(site: Site, fold: Fold, seed: int) -> Tensor:
    """Factors of a third to three, [width] or [experts, width], equal where channels share a row."""
    generator = torch.Generator().manual_seed(seed)
    shape = (site.experts, site.width) if site.experts else (site.width,)
    scale = torch.exp((torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5) * 2.2)
    for channel, row in enumerate(fold.channels or ()):
        scale[..., channel] = scale[..., fold.channels.index(row)]  # type: ignore[union-attr]
    return scale


@torch.no_grad()
def apply_fold(model: Any, site: Site, fold: Fold, scale: Tensor) -> None:
    """Divide the producer's rows, multiply the readers' columns; one number at a time where it is about rows."""
    module = model.get_submodule(fold.module)
    for index, name in enumerate(fold.parameters):
        parameter = getattr(module, name)
        axis = fold.axis if index == 0 else -1
        rows = parameter.movedim(axis, -1)
        done = set()
        for channel in range(site.width):
            row = channel if fold.channels is None else fold.channels[channel]
            if row in done:
                continue
            done.add(row)
            s = scale[..., channel]
            if s.dim():  # one for each expert
                s = s.reshape(-1, *[1] * (rows[..., row].dim() - 1))
            if fold.kind == "offset_norm" and index == 0:
                rows[row] = (1 + rows[row]) / s - 1
            else:
                rows[..., row] = rows[..., row] / s
    for name, axis in zip(site.weights, site.column_axes, strict=True):
        owner, attribute = holder(model, name)
        weight = getattr(owner, attribute)
        columns = weight.movedim(axis, -1)
        groups = getattr(owner, "groups", 1)
        if groups > 1:
            each = weight.shape[0] // groups
            for out in range(weight.shape[0]):
                group = out // each
                size = weight.shape[1]
                factor = scale[group * size : (group + 1) * size]
                weight[out] = weight[out] * factor.reshape(-1, *[1] * (weight.dim() - 2))
        elif scale.dim() == 2:
            columns.copy_(columns * scale.reshape(scale.shape[0], *[1] * (columns.dim() - 2), -1))
        else:
            columns.copy_(columns * scale)


def apply_all(model: Any, structure: Structure, seed: int = 0) -> int:
    """Every fold with a random scale; returns how many."""
    folds = [(site, site.fold) for site in structure.sites if site.fold is not None]
    for index, (site, fold) in enumerate(folds):
        apply_fold(model, site, fold, random_scale(site, fold, seed + index))
    return len(folds)


@torch.no_grad()
def rotate(model: Any, structure: Structure, stream: Stream) -> None:
    """Fuse norms, centre where they subtract means, untie the head, and rotate the residual stream."""
    width = stream.width
    generator = torch.Generator().manual_seed(7)
    q = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    if stream.tied:
        head, attribute = holder(model, stream.head or "")
        setattr(head, attribute, torch.nn.Parameter(getattr(head, attribute).clone()))
    sites = {site.name: site for site in structure.sites}
    for reader in stream.readers:
        site = sites[reader.site]
        gain = torch.ones(width, dtype=torch.float64)
        if reader.norm is not None and reader.norm.parameters:
            norm = model.get_submodule(reader.norm.name)
            offset = 1.0 if reader.norm.fold == "offset_norm" else 0.0
            gain = getattr(norm, reader.norm.parameters[0]).clone() + offset
            for name in reader.norm.parameters[1:]:
                assert not getattr(norm, name).any(), "give the model norms without biases"
        for name, axis in zip(site.weights, site.column_axes, strict=True):
            owner, attribute = holder(model, name)
            columns = getattr(owner, attribute).movedim(axis, -1)
            columns.copy_((columns * gain) @ q)
    for norm in stream.norms:
        module = model.get_submodule(norm.name)
        if norm.kind == "layer":  # of a centred stream, an RMS norm
            parent, _, attribute = norm.name.rpartition(".")
            eps = getattr(module, "eps", getattr(module, "variance_epsilon", 1e-5))
            setattr(model.get_submodule(parent), attribute, torch.nn.RMSNorm(width, eps, elementwise_affine=False))
        elif norm.parameters:
            getattr(module, norm.parameters[0]).fill_(0.0 if norm.fold == "offset_norm" else 1.0)
    centre = any(norm.kind == "layer" for norm in stream.norms)
    # (x - mean(x)) Q = x (Q - mean over its rows)
    turn = q - q.mean(0, keepdim=True) if centre else q

    def mix(tensor: Tensor, axis: int) -> None:
        tensor.movedim(axis, -1).copy_(tensor.movedim(axis, -1) @ turn)

    for name in stream.embeddings:
        mix(model.get_submodule(name).weight, 1)
    for name in stream.writers:
        owner, attribute = holder(model, name)
        weight = getattr(owner, attribute)
        site = next(s for s in structure.sites if name in s.weights)
        columns = site.column_axes[site.weights.index(name)]
        mix(weight, {0: 1, 1: 0, -1: -2, -2: -1}[columns])
        bias = getattr(owner, "bias" if attribute == "weight" else f"{attribute}_bias", None)
        if bias is not None:
            mix(bias, -1)
