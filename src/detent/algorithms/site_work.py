"""One site at work: the object passed to the handlers of algorithms, and what is remembered of each layer.

An algorithm's functions are pure; through `SiteWork` a handler reads weights, formats and statistics, and writes
what they return into the modules. What each did is kept in the `Ledger` as an `Outcome`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from detent.algorithms.layer import Layer
from detent.algorithms.objective import error_measure
from detent.algorithms.outcome import Outcome
from detent.algorithms.site import ObservedSite
from detent.algorithms.weight_ranges import calibrate_weight
from detent.config import QuantizeAlgorithmConfig
from detent.formats import FloatScale, Format, QTensor, Scales, decode, fake_quantize, scales_from_range
from detent.statistics import SiteStatistics

#: From a scale to the one that can be used, such as equal ones for channels that share a producer.
Tie = Callable[[Tensor], Tensor]


class Folds(Protocol):
    """Where channel scales are folded to: `detent.transforms.folding.Folding`. Layers are given by name."""

    def reason(self, layers: list[str]) -> str:
        """Why the layers of an activation take no scale; "" if they do."""

    def tie(self, layers: list[str]) -> Tie:
        """Makes a scale foldable."""

    def apply(self, layers: list[str], scale: Tensor) -> list[str]:
        """Fold a scale; the columns of `layers` are left to the caller. Names of the modules that have changed."""


class Stage(IntEnum):
    """How far a layer's weight is: each stage includes the ones before it."""

    #: The weight quantizer holds no range for the weight as it is now.
    FRESH = 0
    #: It holds the range of round-to-nearest.
    RANGED = 1
    #: It holds a range that an algorithm chose.
    SEARCHED = 2
    #: The weight is on its grid: rounding it again changes nothing.
    ROUNDED = 3


@dataclass
class LayerState:
    """What holds of one layer while a list of algorithms is at work.

    The only transitions::

        FRESH, RANGED, SEARCHED --ranged, searched, rounded--> that stage
        any                     --changed--> FRESH, without a latent: something else changed the weight

    Attributes:
        stage: of the weight.
        latent: float [out, in]: what a rounded weight was before, where an algorithm of the list wants to know.
        rescaled: whether the input is scaled, and its static range has not been found since.
    """

    stage: Stage = Stage.FRESH
    latent: Tensor | None = None
    rescaled: bool = False

    def ranged(self) -> None:
        self.stage = Stage.RANGED

    def searched(self) -> None:
        self.stage = Stage.SEARCHED

    def rounded(self, latent: Tensor | None = None) -> None:
        self.stage, self.latent = Stage.ROUNDED, latent

    def changed(self) -> None:
        self.stage, self.latent = Stage.FRESH, None


@dataclass
class Ledger:
    """What a list of algorithms has done to the layers of a model so far.

    Attributes:
        folds: where channel scales go; None: they stay in the layers' input quantizers.
        keeps_latents: whether an algorithm of the list starts from what weights were before they were rounded.
        states: by layer name. outcomes: likewise, in order.
        errors: by layer name, how far a rounded weight is from what it was before, relative to its length.
    """

    folds: Folds | None = None
    keeps_latents: bool = False
    states: dict[str, LayerState] = field(default_factory=dict)
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def state(self, layer: Layer) -> LayerState:
        return self.states.setdefault(layer.name, LayerState())

    def note(self, layer: Layer, outcome: Outcome) -> None:
        self.outcomes.setdefault(layer.name, []).append(outcome)

    def forget(self, layers: Sequence[Layer]) -> None:
        """Keep nothing of layers that are finished but what was done to them."""
        for layer in layers:
            self.states.pop(layer.name, None)

    def adopt(self, layer: Layer, values: Tensor, scales: Scales, latent: Tensor | None = None) -> None:
        """Give a layer values [out, in] that are on the grid of `scales`."""
        state = self.state(layer)
        before = state.latent if state.stage is Stage.ROUNDED else layer.matrix()
        if before is not None:
            length = float(before.norm())
            self.errors[layer.name] = float((values - before).norm()) / length if length else 0.0
        layer.set_scales(scales)
        layer.set_matrix(values)
        state.rounded(latent if self.keeps_latents else None)


class SiteWork:
    """One site at work.

    Attributes:
        layers: those of its layers whose weights are quantized. readers: all that read the activation.
    """

    def __init__(self, site: ObservedSite, ledger: Ledger) -> None:
        self._site, self.ledger = site, ledger
        self.readers = site.layers
        self.layers = [layer for layer in site.layers if layer.quantizer.is_enabled]

    @property
    def name(self) -> str:
        return self._site.name

    @property
    def statistics(self) -> SiteStatistics:
        """Of the activation, divided by whatever scale was put in."""
        return self._site.statistics

    def state(self, layer: Layer) -> LayerState:
        return self.ledger.state(layer)

    def note(self, layer: Layer, outcome: Outcome) -> None:
        """Keep what was done, for the report."""
        self.ledger.note(layer, outcome)

    # ---- ranges and scales of weights -------------------------------------------------------------------------------

    def set_range_of(self, layer: Layer, step: QuantizeAlgorithmConfig | None) -> None:
        """The range that an algorithm finds from the weight alone, or that of round-to-nearest."""
        layer.quantizer.reset_amax()
        calibrate_weight(layer.name, layer.module.weight_quantizer, layer.weight.detach(), step)
        if layer.format.has_outer_scale:
            layer.quantizer.global_amax = self.outer_amax()
        layer.module.refresh_weight()
        state = self.state(layer)
        state.ranged() if step is None or step.method in (None, "max") else state.searched()

    def set_range(self, layer: Layer, low: Tensor, high: Tensor) -> None:
        """A range that was searched, in the shape of the format's scales."""
        fmt = layer.format
        # A static float range stays in the quantizer. Powers of two and dynamic scales are not derived from one, so
        # those get the scales themselves.
        if isinstance(fmt.scale, FloatScale) and not fmt.dynamic:
            grid = fmt.granularity.grid(tuple(layer.weight.shape))
            layer.quantizer.set_range(low.reshape(grid), high.reshape(grid))
        else:
            layer.set_scales(scales_from_range(fmt, low, high, amax_tensor=self.amax_behind(fmt)))
        layer.module.refresh_weight()
        self.state(layer).searched()

    def set_scales(self, layer: Layer, scales: Scales) -> None:
        """Scales that were searched."""
        layer.set_scales(scales)
        self.state(layer).searched()

    def outer_amax(self) -> Tensor:
        """The largest magnitude of all weights: engines fuse the layers of a site into one matrix, so a scale of scales
        has to be the same in all of them."""
        return torch.stack([layer.weight.detach().abs().amax().float() for layer in self.layers]).amax()

    def amax_behind(self, fmt: Format) -> Tensor | None:
        """`outer_amax` where the format has a scale of scales."""
        return self.outer_amax() if fmt.has_outer_scale else None

    def output_error(self, layer: Layer) -> float:
        """The objective of round-to-nearest; the squared error of the weight where nothing was observed."""
        if self.statistics.second_moment is None and self.statistics.sample is None:
            return squared_error(layer)
        weight = layer.matrix()
        return error_measure(self.statistics)(fake_quantize(weight, layer.format) - weight)

    # ---- channel scales ---------------------------------------------------------------------------------------------

    @property
    def is_linear(self) -> bool:
        """Whether each channel of the activation is one column of the weights, which doesn't hold for convolutions."""
        return all(layer.width == layer.channels for layer in self.readers)

    def cannot_scale(self) -> str:
        """Why the site takes no channel scale; "" if it does."""
        for layer in self.readers:
            if layer.input_quantizer is not None and layer.input_quantizer.rotation is not None:
                return "its input is rotated"
        if self.ledger.folds is not None:
            return self.ledger.folds.reason(self._names)
        if any(layer.input_quantizer is None for layer in self.readers):
            return "there is no input quantizer to hold a scale"
        return ""

    @property
    def tie(self) -> Tie:
        folds = self.ledger.folds
        return (lambda scale: scale) if folds is None else folds.tie(self._names)

    @property
    def channel_amax(self) -> Tensor:
        """The largest magnitude of each channel of the activation, float32 [channels]."""
        return self.statistics.amax.reshape(self.readers[0].channels, -1).amax(1)

    @property
    def weight_amax(self) -> Tensor:
        """The largest magnitude of each channel's columns, over all readers, float32 [channels]."""
        magnitudes = [r.matrix().abs().amax(0).reshape(r.channels, -1).amax(1) for r in self.readers]
        return torch.stack(magnitudes).amax(0)

    def scale_channels(self, scale: Tensor) -> None:
        """Multiply the readers' columns with `scale` [channels], and divide the activation by it."""
        folds = self.ledger.folds
        if folds is None:
            scale = _keep_in_quantizers(self.readers, scale)
        else:
            # A fold changes the layer before, at another site: what was found for its weight no longer holds.
            for name in folds.apply(self._names, scale):
                if name in self.ledger.states:
                    self.ledger.states[name].changed()
        for layer in self.readers:
            layer.set_matrix(layer.matrix() * layer.columns(scale))
            state = self.state(layer)
            state.changed()
            state.rescaled = True
        self._site.divide(scale)

    @property
    def _names(self) -> list[str]:
        return [layer.name for layer in self.readers]

    # ---- at the end -------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Ranges for weights without one, for what comes after the first quantizer of a sequence, and for inputs."""
        for layer in self.layers:
            if self.state(layer).stage is Stage.FRESH:
                self.set_range_of(layer, None)
            quantizers = layer.module.weight_quantizer
            # Algorithms chose for the first quantizer of a sequence; the others see the weight that it rounded.
            calibrate_weight(layer.name, quantizers, layer.weight.detach(), None, skip_first=True)
        # Statistics were divided by the channel scale, so they give a static per-tensor input range without another
        # run. Any other range that the scale has made stale stays marked as `rescaled`, and is found from data later.
        for layer in self.readers:
            quantizer, state = layer.input_quantizer, self.state(layer)
            if state.rescaled and quantizer is not None and _follows_channels(layer):
                low, high = self.statistics.low.amin(), self.statistics.high.amax()
                quantizer.set_range(low.reshape(()), high.reshape(()))
                state.rescaled = False


def _keep_in_quantizers(layers: Sequence[Layer], scale: Tensor) -> Tensor:
    """Have the input quantizers multiply by 1 / scale; the inverse of what they really multiply by."""
    weight = layers[0].weight
    # The model's dtype rounds the reciprocal, so the weight is multiplied by the inverse of what was really stored.
    reciprocal = (1 / scale).to(weight.dtype)
    now = reciprocal.reshape(-1, *[1] * (weight.dim() - 2))
    for layer in layers:
        quantizer = layer.input_quantizer
        assert quantizer is not None
        before = quantizer.pre_quant_scale
        quantizer.pre_quant_scale = now if before is None else (before * now).to(weight.dtype)
    return 1 / reciprocal.float()


def _follows_channels(layer: Layer) -> bool:
    """Whether the range of the layer's input follows from the ranges of its channels: static, one for the tensor."""
    quantizer = layer.input_quantizer
    if quantizer is None or not quantizer.is_enabled or quantizer.attributes.bias or quantizer.rotation is not None:
        return False
    fmt = quantizer.format
    static = isinstance(fmt.scale, FloatScale) and not fmt.scale.outer and not fmt.dynamic
    return static and fmt.granularity.kind == "per_tensor" and quantizer.attributes.calibrator == "max"


def squared_error(layer: Layer) -> float:
    """The squared error of a layer's weight as it is rounded now."""
    weight = layer.matrix()
    rounded = layer.quantizer(layer.weight.detach())
    rounded = decode(rounded) if isinstance(rounded, QTensor) else rounded  # codes, where these were asked for
    return float((rounded.float().reshape(weight.shape) - weight).square().sum())
