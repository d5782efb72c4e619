"""R1 to R4 put into a model: which weights turn along which axis, and which quantizers rotate what they are given.

Nothing here proves anything: `detent.transforms.rotation` compares what the model computes before and after. The
mathematics is in `detent.algorithms.rotation`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detent.algorithms.rotation import Rotation, make_rotation, offset_through, turn_reader, turn_rows, turn_writer
from detent.config.transforms import RotationConfig
from detent.errors import DetentError
from detent.model.edit import WeightEdits, configs_of
from detent.nn import TensorQuantizer
from detent.nn.attention import attention_modules, caches_latents, route_attention
from detent.nn.hadamard import rotation_block
from detent.nn.sequential import members_of
from detent.structure.site import Norm, Site, Structure

#: A norm's bias is divided by its weight only where no weight is smaller than this share of the largest.
_LEAST_GAIN = 0.01


class CannotRotate(DetentError):
    """The model's structure has no place for a rotation; the others may still have theirs."""


@dataclass(frozen=True)
class RotationPart:
    """One of R1 to R4.

    Attributes:
        name: ``R1`` ... ``R4``.
        where: the modules that it was put into; () if it wasn't.
        size: what is rotated, such as ``64 channels`` or ``94 channels in blocks of 2``.
        reason: why it wasn't done, or not everywhere; "" if there is nothing to say.
    """

    name: str
    where: tuple[str, ...]
    size: str
    reason: str

    def __str__(self) -> str:
        done = f"{self.name}: {self.size} at {len(self.where)} places" if self.where else f"{self.name}: not done"
        return f"{done} ({self.reason})" if self.reason else done


class Rotator:
    """The rotations of one model. Each method puts one of them in and says where."""

    def __init__(self, model: nn.Module, structure: Structure, config: RotationConfig) -> None:
        self.model, self.structure, self.config = model, structure, config
        self.modules, self.weights = dict(model.named_modules()), WeightEdits(model)
        self.sites = {site.name: site for site in structure.sites}

    # ---- R1 ---------------------------------------------------------------------------------------------------------

    def stream(self) -> RotationPart:
        """Norms into readers; embeddings, readers and writers of the residual stream turned."""
        stream = self.structure.stream
        if stream is None or not stream.rotatable:
            reason = "no single residual stream was found" if stream is None else stream.reason
            raise CannotRotate(f"R1: the residual stream can't be rotated: {reason}")
        if self.structure.unread:  # a tower of images or sounds, cross-attention with them
            raise CannotRotate(
                f"R1: {self.structure.unread[0]} isn't reached by text alone, so nothing tells whether it reads the"
                " residual stream or adds to it"
            )
        rotation = make_rotation(
            stream.width,
            block_size=self.config.rotation_size,
            random=self.config.random,
            seed=self.config.seed,
            keeps_mean=any(norm.kind == "layer" for norm in stream.norms),
        )
        names = [reader.site for reader in stream.readers]
        if len(names) != len(set(names)):
            twice = next(name for name in names if names.count(name) > 1)
            raise CannotRotate(f"R1: {twice} reads the residual stream through more than one norm")
        if stream.head is not None and stream.tied:  # the norm before it goes into the head, not into the embedding
            self.weights.untie(stream.head)
        gains = {norm.name: self._release(norm, rotation) for norm in stream.norms}
        for reader in stream.readers:
            gain = None if reader.norm is None else gains[reader.norm.name]
            for name, axis in self._weights_at(reader.site):
                self._check_unscaled(name)
                self.weights.put(name, turn_reader(self.weights.get(name), rotation, axis, gain))
        for name in stream.embeddings:
            self.weights.put(name, turn_writer(self.weights.get(name), rotation, -1))
        for name in stream.writers:
            self.weights.put(name, turn_writer(self.weights.get(name), rotation, self._row_axis(name)))
            bias = self.weights.bias_of(name)
            if bias is not None:
                self.weights.put(bias, turn_writer(self.weights.get(bias), rotation, -1))
        return RotationPart("R1", (*stream.embeddings, *stream.writers), str(rotation), "")

    def _weights_at(self, site: str) -> list[tuple[str, int]]:
        """(name, axis of its columns) of the weights that read a site."""
        return list(zip(self.sites[site].weights, self.sites[site].column_axes, strict=True))

    def _release(self, norm: Norm, rotation: Rotation) -> Tensor | None:
        """What a norm multiplied by, float64, which its readers now do; its bias goes into theirs."""
        gain = None
        if norm.fold:
            weight = self.weights.get(norm.name)
            ones = 1.0 if norm.fold == "offset_norm" else 0.0
            gain = weight.detach().double() + ones
            self.weights.put(norm.name, torch.full_like(gain, 1.0 - ones))
        bias = self.weights.bias_of(norm.name) if "bias" in norm.parameters else None
        if bias is not None and bool(self.weights.get(bias).any()):
            self._move_bias(norm, bias, gain, rotation)
        return gain

    def _move_bias(self, norm: Norm, name: str, gain: Tensor | None, rotation: Rotation) -> None:
        stream, offset = self.structure.stream, self.weights.get(name)
        assert stream is not None
        readers = [pair for r in stream.readers if r.norm == norm for pair in self._weights_at(r.site)]
        biases = [bias for reader, _ in readers if (bias := self.weights.bias_of(reader)) is not None]
        if len(biases) == len(readers):
            for (reader, axis), bias in zip(readers, biases, strict=True):
                moved = offset_through(self.weights.get(reader), offset, axis)
                self.weights.put(bias, self.weights.get(bias).detach().double() + moved)
            self.weights.put(name, torch.zeros_like(offset))
            return
        # W (g n + b) = W diag(g) (n + b / g): the bias can stay at the norm, divided and turned.
        gain = torch.ones_like(offset, dtype=torch.float64) if gain is None else gain
        if float(gain.abs().min()) < _LEAST_GAIN * float(gain.abs().max()):
            raise CannotRotate(
                f"R1: {norm.name} has a bias that can't be moved: a layer that reads it has no bias, and some of the"
                " norm's weights are too small to divide by"
            )
        self.weights.put(name, rotation.turn(offset.detach().double() / gain))

    # ---- R2 ---------------------------------------------------------------------------------------------------------

    def heads(self) -> RotationPart:
        """Each head's values turned by the value projection's rows, and back by the output projection's columns."""
        where: list[str] = []
        reasons: list[str] = []
        size = ""
        for site in self.structure.sites:
            fold = site.fold
            if fold is None or fold.kind != "rows" or fold.module not in self.structure.values:
                continue
            try:
                rotation = make_rotation(self._head_width(site), random=self.config.random2, seed=self.config.seed + 1)
                rows = _rows_of_heads(site, rotation.width)
            except DetentError as error:
                reasons.append(f"{site.name}: {error}")
                continue
            size = str(rotation)
            if rows is None:
                rows = torch.arange(self.weights.get(fold.module).shape[fold.axis])
            producer = self.weights.get(fold.module)
            self.weights.put(fold.module, turn_rows(producer, rotation, rows, fold.axis))
            bias = self.weights.bias_of(fold.module)
            if bias is not None:
                self.weights.put(bias, turn_rows(self.weights.get(bias), rotation, rows, -1))
            for name, axis in zip(site.weights, site.column_axes, strict=True):
                self._check_unscaled(name)
                self.weights.put(name, turn_reader(self.weights.get(name), rotation, axis))
            where.append(site.name)
        if not where and not reasons:
            reasons = ["no value projection was found whose rows an output projection reads unchanged"]
        return RotationPart("R2", tuple(where), size, "; ".join(reasons))

    def _head_width(self, site: Site) -> int:
        """Channels of a head: what the attention module or the configuration says."""
        parent = site.name
        while parent:
            parent = parent.rpartition(".")[0]
            width = getattr(self.modules[parent], "head_dim", None)
            if isinstance(width, int):
                return width
        width = _head_width_of(self.model)
        if width is None:
            raise DetentError("the width of a head is unknown")
        return width

    # ---- R3 ---------------------------------------------------------------------------------------------------------

    def keys(self) -> RotationPart:
        """Queries and keys turned before their products, where there are quantizers."""
        asked = self.config.r3 is True
        chosen = [
            (name, module)
            for name, module in attention_modules(self.model)
            if not caches_latents(type(module))
            if (quantizer := _key_quantizer(module)) is not None and (asked or quantizer.is_enabled)
        ]
        if not chosen:
            if asked:
                raise DetentError(
                    "rotation: R3 turns queries and keys in quantizers, and this model has none on them; quantize it,"
                    " or set r3=False"
                )
            return RotationPart("R3", (), "", "keys aren't quantized")
        width = _head_width_of(self.model)
        if width is not None:
            try:
                rotation_block(width)
            except DetentError as error:
                if asked:
                    raise DetentError(f"rotation: R3: {error}") from None
                return RotationPart("R3", (), "", str(error))
        for _, module in chosen:
            for side in ("q", "k"):
                rotate_in(getattr(module, f"{side}_bmm_quantizer"))
        route_attention(self.model)
        size = "heads" if width is None else str(make_rotation(width))
        return RotationPart("R3", tuple(name for name, _ in chosen), size, "")

    # ---- R4 ---------------------------------------------------------------------------------------------------------

    def inputs(self) -> RotationPart:
        """The input of each MLP's last projection turned in its quantizer, the weight turned back."""
        asked = self.config.r4 is True
        chosen = [name for site in self._inner_sites() for name in site.weights if self._rotates_input(name, asked)]
        if not chosen:
            if asked:
                raise DetentError(
                    "rotation: R4 turns the input of an MLP's last projection in its quantizer, and no such projection"
                    " with an input quantizer was found; quantize the model, or set r4=False"
                )
            return RotationPart("R4", (), "", "no MLP's last projection has a quantized input")
        sizes: dict[str, None] = {}
        done, reasons = [], []
        for name in chosen:
            self._check_unscaled(name)
            weight, axis = self.weights.get(name), self._column_axis(name)
            try:
                rotation = make_rotation(weight.shape[axis], block_size=self.config.rotation_size)
            except DetentError as error:
                if asked or self.config.rotation_size is not None:
                    raise DetentError(f"rotation: R4: {name}: {error}") from None
                reasons.append(f"{name}: {error}")
                continue
            self.weights.put(name, turn_reader(weight, rotation, axis))
            rotate_in(self.modules[name].input_quantizer, self.config.rotation_size)
            done.append(name)
            sizes[str(rotation)] = None
        return RotationPart("R4", tuple(done), ", ".join(sizes), "; ".join(reasons))

    def _inner_sites(self) -> Iterator[Site]:
        """Sites inside blocks that neither read the stream or a norm (R1 is for those) nor attention's values (R2)."""
        stream = self.structure.stream
        readers = set() if stream is None else {reader.site for reader in stream.readers}
        for site in self.structure.sites:
            behind_norm = site.fold is not None and site.fold.kind != "rows"
            reads_values = site.fold is not None and site.fold.module in self.structure.values
            if site.block is not None and not (site.name in readers or site.router or behind_norm or reads_values):
                yield site

    def _rotates_input(self, name: str, asked: bool) -> bool:
        module = self.modules.get(name)
        quantizer = getattr(module, "input_quantizer", None)
        return isinstance(module, nn.Linear) and quantizer is not None and (asked or quantizer.is_enabled)

    # ---- weights ----------------------------------------------------------------------------------------------------

    def _column_axis(self, name: str) -> int:
        site = self.structure.site_of(name)
        return site.column_axes[site.weights.index(name)] if site is not None else 1

    def _row_axis(self, name: str) -> int:
        """The axis of output channels: the other one of the two that a matrix has."""
        column = self._column_axis(name)
        return {1: 0, 0: 1, -1: -2, -2: -1}[column]

    def _check_unscaled(self, name: str) -> None:
        """Refuse a reader whose quantizers scale its input or that has a low-rank branch."""
        module = self.modules.get(name)
        for child in () if module is None else module.modules():
            if isinstance(child, TensorQuantizer) and child.state_tensors() and child.pre_quant_scale is not None:
                raise DetentError(
                    f"rotation: {name}: its input is scaled already; name rotation first in the algorithms"
                )


def _rows_of_heads(site: Site, width: int) -> Tensor | None:
    """The producer's rows, head after head and each once; None for all of them in order."""
    if site.width % width:
        raise DetentError(f"{site.width} channels aren't heads of {width}")
    fold = site.fold
    assert fold is not None
    if fold.channels is None:
        return None
    heads = torch.tensor(fold.channels).reshape(-1, width)
    if not bool((heads == heads[:, :1] + torch.arange(width)).all()):
        raise DetentError(f"its channels aren't heads of {width} neighbouring rows")
    return heads[_first_of_each(heads[:, 0])].reshape(-1)


def _first_of_each(values: Tensor) -> list[int]:
    seen: dict[int, int] = {}
    for index, value in enumerate(values.tolist()):
        seen.setdefault(value, index)
    return list(seen.values())


def _key_quantizer(module: nn.Module) -> Any:
    return getattr(module, "k_bmm_quantizer", None)


def _head_width_of(model: nn.Module) -> int | None:
    config = (configs_of(model) or [None])[-1]
    width = getattr(config, "head_dim", None)
    if isinstance(width, int):
        return width
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None


def rotate_in(quantizer: Any, block_size: int | None = None) -> None:
    """Let a quantizer, or the first of several in sequence, rotate what it is given, on or off."""
    members_of(quantizer)[0].fused_rotation = block_size or 0
