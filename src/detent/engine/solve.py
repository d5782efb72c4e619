"""From statistics to weights: the algorithms of a list, one after the other, at one site.

Algorithms are pure functions; here they are handed what they need, and what they answer with is put into the modules.
What each did is kept as an `Outcome` on the layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from detent.algorithms.gptq import Job, factorise, gptq
from detent.algorithms.layer import Layer
from detent.algorithms.low_rank import refuse_scale_after_branch, split_layer
from detent.algorithms.mse import least_error_range, multipliers
from detent.algorithms.objective import check_elementwise, energy_of, error_measure
from detent.algorithms.outcome import Outcome
from detent.algorithms.retarget import retarget
from detent.algorithms.scale_search import RangeChoice, can_turn, range_factors, weighing_of, weighted_range
from detent.algorithms.site import ObservedSite, Wanted
from detent.algorithms.smooth import Clipping, ScaleChoice, Tie, awq_scale, smoothquant_scale, smoothquant_search
from detent.algorithms.weight_ranges import calibrate_weight
from detent.config.algorithm import (
    AutoRoundCalibConfig,
    AWQClipCalibConfig,
    AWQFullCalibConfig,
    AWQLiteCalibConfig,
    BlockAPCalibConfig,
    DataAlgorithmConfig,
    DistillCalibConfig,
    GPTQCalibConfig,
    LocalHessianCalibConfig,
    QuantizeAlgorithmConfig,
    SmoothQuantCalibConfig,
)
from detent.config.transforms import SVDQuantConfig
from detent.errors import DetentError
from detent.formats import FloatScale, Format, Scales, fake_quantize
from detent.formats.qtensor import scales_from_range
from detent.nn import TensorQuantizer
from detent.notices import notify
from detent.progress import track
from detent.transforms.folding import Folding

_log = logging.getLogger(__name__)


def wanted(steps: Sequence[QuantizeAlgorithmConfig]) -> Wanted:
    """The statistics that the steps need together."""
    need = Wanted()
    for step in steps:
        if isinstance(step, SmoothQuantCalibConfig):
            need |= Wanted(sample_size=step.sample_size if step.alpha == "auto" else 0)
        elif isinstance(step, AutoRoundCalibConfig):
            need |= Wanted(references=True, estimate=step.scale_search)
        elif isinstance(step, BlockAPCalibConfig):
            need |= Wanted(references=True)
        elif isinstance(step, GPTQCalibConfig):
            need |= Wanted(second_moment=True, cross_moment=step.retarget, references=step.retarget)
        elif isinstance(step, (AWQLiteCalibConfig, AWQClipCalibConfig)):
            need |= Wanted(estimate=True)
        elif isinstance(step, DataAlgorithmConfig) and not isinstance(step, DistillCalibConfig):
            need |= Wanted(second_moment=True)
    return need


@dataclass
class Solver:
    """The algorithms of a list, at work on the sites of a block or of a model.

    Attributes:
        steps: their configurations, in order.
        folding: where channel scales are folded to; None: they stay in the input quantizers.
        scaled: names of the layers whose inputs are scaled now and whose input ranges have to be found anew.
    """

    steps: Sequence[QuantizeAlgorithmConfig]
    folding: Folding | None = None
    scaled: set[str] = field(default_factory=set)
    #: Layers whose weight quantizers hold a range for the weight as it is now; of these, those that a step chose.
    ranged: set[str] = field(default_factory=set)
    searched: set[str] = field(default_factory=set)
    #: Layers whose weights are on their grids: rounding them again changes nothing.
    rounded: set[str] = field(default_factory=set)
    #: What the weights of layers were before they were rounded, where a step wants to know.
    latents: dict[str, Tensor] = field(default_factory=dict)

    @property
    def keeps_latents(self) -> bool:
        """Whether a step starts from what rounded weights were before."""
        return any(isinstance(step, (BlockAPCalibConfig, DistillCalibConfig)) for step in self.steps)

    @torch.no_grad()
    def solve(
        self, sites: Sequence[ObservedSite], task: str = "", steps: Sequence[QuantizeAlgorithmConfig] | None = None
    ) -> None:
        """Run the steps, each on all sites before the next: a scale that is folded changes another site's weights.

        Args:
            sites: of a block, or of the model.
            task: what progress is shown as; "" for none.
            steps: only these of the steps.

        Raises:
            DetentError: an algorithm can't serve a layer's format; named.
        """
        work = [_AtWork(self, site) for site in sites]
        for step in self.steps if steps is None else steps:
            for one in track(work, f"{task}: {step.method}", len(work)) if task else work:
                if isinstance(step, DataAlgorithmConfig) and one.tokens < step.min_tokens:
                    one.without_data(step)
                else:
                    for changed in one.run(step):
                        self.forget(changed)
        for one in work:
            one.finish()

    def grids(self, layers: Sequence[Layer]) -> list[TensorQuantizer]:
        """Quantizers of weights that are on their grids already."""
        return [
            layer.quantizer
            for layer in layers
            if layer.name in self.rounded and layer.quantizer is layer.module.weight_quantizer
        ]

    def forget(self, layer: str) -> None:
        """Note that a layer's weight has changed, so that its range no longer fits."""
        self.ranged.discard(layer)
        self.searched.discard(layer)
        self.rounded.discard(layer)


class _AtWork:
    """One site while it is solved."""

    def __init__(self, solver: Solver, site: ObservedSite) -> None:
        self._solver, self._site = solver, site
        self.layers = [layer for layer in site.layers if layer.quantizer.is_enabled]
        #: Modules that the running step changed beside the site's own layers.
        self._changed: list[str] = []

    @property
    def tokens(self) -> int:
        return self._site.statistics.tokens

    # ---- steps ------------------------------------------------------------------------------------------------------

    def run(self, step: QuantizeAlgorithmConfig) -> list[str]:
        """Run one step; the names of modules that it changed beside the site's layers."""
        self._changed = []
        self._run(step)
        return self._changed

    def _run(self, step: QuantizeAlgorithmConfig) -> None:
        match step:
            case SmoothQuantCalibConfig():
                self._smooth(step)
            case AWQFullCalibConfig():
                clip = Clipping(step.min_clip_ratio, step.shrink_step, step.signed_scales)
                self._awq(step, clip)
                self._clip(clip, "awq_full (clip)")
            case AWQLiteCalibConfig():
                self._awq(step)
            case AWQClipCalibConfig():
                self._clip(Clipping(step.min_clip_ratio, step.shrink_step, step.signed_scales), str(step.method))
            case LocalHessianCalibConfig():
                factors = multipliers(step.step_size, step.start_multiplier, step.stop_multiplier)
                by_block, sweep = step.weighting == "block", step.fp8_scale_sweep
                self._search(str(step.method), factors, block=by_block, sweep=sweep)
            case GPTQCalibConfig():
                if self.layers:
                    self._round(step)
            case SVDQuantConfig():
                self._split(step)
            case AutoRoundCalibConfig():
                for layer in self.layers:
                    if step.scale_search and layer.name not in self._solver.searched | self._solver.rounded:
                        self._check(layer, str(step.method))
                        layer.set_scales(self._searched_scales(layer, step.search_steps, step.signed_scales))
            case BlockAPCalibConfig() | DistillCalibConfig():
                pass  # not one site's affair
            case _:
                for layer in self.layers:
                    self._range(layer, step)

    def without_data(self, step: DataAlgorithmConfig) -> None:
        """The rule for layers that saw too few tokens: the scales of least squared error, data-free."""
        for layer in self.layers:
            text = (
                f"{layer.name}: only {self._site.statistics.tokens} tokens reached it ({step.method} wants"
                f" {step.min_tokens}), so its scales are those of least squared error, without data"
            )
            notify(text)
            self._range(layer, None)
            fmt = layer.format
            if isinstance(fmt.scale, FloatScale) and layer.quantizer.needs_calibration:
                low, high = least_error_range(layer.matrix(), fmt, multipliers(0.05, 0.4, 1.0))
                self._set_range(layer, low, high)
            error = _squares(layer)
            layer.note(Outcome(str(step.method), "squared error of the weight", error, error, notice=text))

    def finish(self) -> None:
        """Ranges for layers that no step gave one, and for what comes after the first quantizer of a sequence."""
        for layer in self.layers:
            if layer.name not in self._solver.ranged:
                self._range(layer, None)
            members = layer.module.weight_quantizer
            calibrate_weight(layer.name, members, layer.module.weight.detach(), None, skip_first=True)
        self._follow_inputs()

    # ---- channel scales ---------------------------------------------------------------------------------------------

    def _smooth(self, step: SmoothQuantCalibConfig) -> None:
        layers = self._site.layers
        quantizers = [layer.input_quantizer for layer in layers]
        on = [q for q in quantizers if q is not None and q.is_enabled]
        name = str(step.method)
        if len(on) != len(layers):
            _log.info("%s: %s isn't quantized, so it is left alone", name, self._site.name)
            return
        reason = self._cannot_scale()
        if reason:
            self._left_alone(name, "largest activation times largest weight", reason)
            return
        tie = self._tie()
        magnitude = torch.stack([self._per_channel(layer) for layer in layers]).amax(0)
        activation = self._channel_amax()
        if step.alpha != "auto":
            scale = tie(smoothquant_scale(activation, magnitude, float(step.alpha)))
            before = float(activation.amax() * magnitude.amax())
            after = float((activation / scale).amax() * (magnitude * scale).amax())
            decided = {"alpha": step.alpha}
            for layer in self.layers:
                layer.note(Outcome(name, "largest activation times largest weight", before, after, decided=decided))
            self._scale(scale)
            return
        if any(layer.width != layer.channels for layer in layers):
            raise DetentError(
                f"{layers[0].name}: smoothquant searches alpha for linear layers; give a number for others"
            )
        choice = smoothquant_search(
            self._site.statistics,
            [layer.matrix() for layer in layers],
            [layer.format for layer in layers],
            on[0].format,
            tie=tie,
        )
        self._take(name, "squared error of the outputs on a sample of tokens", choice)

    def _awq(self, step: AWQLiteCalibConfig, clip: Clipping | None = None, name: str = "") -> None:
        name = name or str(step.method)
        reason = self._cannot_scale()
        if not reason and any(layer.width != layer.channels for layer in self._site.layers):
            reason = "channel scales are searched for linear layers"
        if reason:
            self._left_alone(name, "tr(D G D^T)", reason)
            return
        tie = self._tie()
        choice = awq_scale(
            self._site.statistics,
            [layer.matrix() for layer in self.layers],
            [layer.format for layer in self.layers],
            alpha_step=step.alpha_step,
            refine=step.refine,
            clip=clip,
            tie=tie,
        )
        of = self._site.statistics.sampled
        objective = "tr(D G D^T)" + (" after clipping" if clip else "") + (f", G from {of}" if of else "")
        self._take(name, objective, choice, error_measure(self._site.statistics))

    def _take(
        self, name: str, objective: str, choice: ScaleChoice, measure: Callable[[Tensor], float] | None = None
    ) -> None:
        """Use a scale that a search found, or say that none is better than plain rounding. `measure`: of an error."""
        helps = choice.after < choice.before
        share = len(self.layers)
        for layer in self.layers:
            energy = None
            if share == 1 and measure is not None:  # else the objective isn't this layer's
                energy = energy_of(layer.matrix(), measure)
            layer.note(
                Outcome(
                    name,
                    objective + (f", {share} layers together" if share > 1 else ""),
                    choice.before,
                    choice.after,
                    energy,
                    {"alpha": choice.alpha, "beta": choice.beta} if helps else {},
                    "" if helps else "no channel scale is better than none, so plain rounding is kept",
                )
            )
        if helps:
            self._scale(choice.scale)

    def _left_alone(self, name: str, objective: str, why: str) -> None:
        for layer in self.layers:
            error = self._output_error(layer)
            layer.note(Outcome(name, objective, error, error, notice=f"plain rounding is kept: {why}"))

    def _cannot_scale(self) -> str:
        """Why the site takes no channel scale; "" if it does."""
        for layer in self._site.layers:
            if layer.input_quantizer is not None and layer.input_quantizer.rotation is not None:
                return "its input is rotated"
            refuse_scale_after_branch(layer, "a channel scale")
        if self._solver.folding is not None:
            return self._solver.folding.reason(self._names)
        if any(layer.input_quantizer is None for layer in self._site.layers):
            return "there is no input quantizer to hold a scale"
        return ""

    def _tie(self) -> Tie:
        folding = self._solver.folding
        return (lambda scale: scale) if folding is None else folding.tie(self._names)

    @property
    def _names(self) -> list[str]:
        return [layer.name for layer in self._site.layers]

    def _channel_amax(self) -> Tensor:
        layer = self._site.layers[0]
        return self._site.statistics.amax.reshape(layer.channels, -1).amax(1)

    @staticmethod
    def _per_channel(layer: Layer) -> Tensor:
        return layer.matrix().abs().amax(0).reshape(layer.channels, -1).amax(1)

    def _scale(self, scale: Tensor) -> None:
        """Multiply the layers' columns with `scale` [channels], and divide the activation by it."""
        folding = self._solver.folding
        if folding is None:
            scale = self._hold(scale)
        else:
            self._changed += folding.apply(self._names, scale)
        for layer in self._site.layers:
            layer.set_matrix(layer.matrix() * layer.columns(scale))
            self._solver.scaled.add(layer.name)
            self._solver.forget(layer.name)
        self._site.divide(scale)

    def _hold(self, scale: Tensor) -> Tensor:
        """Have the input quantizers multiply by 1 / scale; the inverse of what they really multiply by."""
        weight = self._site.layers[0].module.weight
        reciprocal = (1 / scale).to(weight.dtype)
        now = reciprocal.reshape(-1, *[1] * (weight.dim() - 2))
        for layer in self._site.layers:
            quantizer = layer.input_quantizer
            assert quantizer is not None
            before = quantizer.pre_quant_scale
            quantizer.pre_quant_scale = now if before is None else (before * now).to(weight.dtype)
        return 1 / reciprocal.float()

    def _follow_inputs(self) -> None:
        """Static per-tensor input ranges under a new channel scale follow from the channels' ranges."""
        statistics = self._site.statistics
        for layer in self._site.layers:
            quantizer = layer.input_quantizer
            if layer.name in self._solver.scaled and quantizer is not None and follows_channels(layer):
                quantizer.set_range(statistics.low.amin().reshape(()), statistics.high.amax().reshape(()))
                self._solver.scaled.discard(layer.name)

    # ---- ranges -----------------------------------------------------------------------------------------------------

    def _range(self, layer: Layer, step: QuantizeAlgorithmConfig | None) -> None:
        """Ranges from the weight alone."""
        layer.quantizer.reset_amax()
        calibrate_weight(layer.name, layer.module.weight_quantizer, layer.module.weight.detach(), step)
        self._share_outer(layer)
        layer.module.refresh_weight()
        self._solver.ranged.add(layer.name)
        if step is not None and step.method not in (None, "max"):
            self._solver.searched.add(layer.name)

    def _share_outer(self, layer: Layer) -> None:
        """Engines fuse the layers of a site into one matrix, so a scale of scales has to be the same in all of them."""
        rule = layer.format.scale
        if isinstance(rule, FloatScale) and rule.outer:
            layer.quantizer.global_amax = self._outer_amax()

    def _outer_amax(self) -> Tensor:
        return torch.stack([other.module.weight.detach().abs().amax().float() for other in self.layers]).amax()

    def _set_range(self, layer: Layer, low: Tensor, high: Tensor) -> None:
        quantizer, fmt = layer.quantizer, layer.format
        grid = fmt.granularity.grid(tuple(layer.module.weight.shape))
        if isinstance(fmt.scale, FloatScale) and not fmt.dynamic:
            quantizer.set_range(low.reshape(grid), high.reshape(grid))
        else:
            layer.set_scales(scales_from_range(fmt, low, high, amax_tensor=self._amax_behind(fmt)))
        layer.module.refresh_weight()
        self._found(layer)

    def _found(self, layer: Layer) -> None:
        """Note that a search found the layer's scales."""
        self._solver.ranged.add(layer.name)
        self._solver.searched.add(layer.name)

    def _amax_behind(self, fmt: Format) -> Tensor | None:
        return self._outer_amax() if isinstance(fmt.scale, FloatScale) and fmt.scale.outer else None

    def _clip(self, clip: Clipping, name: str) -> None:
        """How much of each tile's range to give up."""
        weighings = self._weighings(name)
        for layer in self.layers:
            choice = clip.search(layer.matrix(), layer.format, weighings[layer.format], self._amax_behind(layer.format))
            self._use(layer, name, weighings[layer.format], choice)

    def _search(self, name: str, factors: Sequence[float], *, block: bool, sweep: bool) -> None:
        """The ranges of least error."""
        weighings = self._weighings(name, block=block)
        for layer in self.layers:
            rule = layer.format.scale
            by_scale = sweep and isinstance(rule, FloatScale) and rule.outer and rule.dtype == "e4m3"
            choice = weighted_range(
                layer.matrix(),
                layer.format,
                weighings[layer.format],
                factors,
                fp8_scale_sweep=by_scale,
                global_amax=self._amax_behind(layer.format),
            )
            self._use(layer, name, weighings[layer.format], choice)

    def _weighings(self, name: str, *, block: bool = True) -> dict[Format, Tensor]:
        """What errors are weighed with, by the format of layers, all of which `name` has to be able to serve."""
        for layer in self.layers:
            self._check(layer, name)
        formats = {layer.format for layer in self.layers}
        return {fmt: weighing_of(self._site.statistics, fmt, block=block) for fmt in formats}

    def _use(self, layer: Layer, name: str, weighing: Tensor, choice: RangeChoice) -> None:
        """Take the ranges that a search found."""
        objective = "error weighed by G's " + ("blocks" if weighing.dim() == 3 else "diagonal")
        layer.note(Outcome(name, objective, choice.before, choice.after))
        if choice.turned is None:
            self._set_range(layer, choice.low, choice.high)
        else:
            layer.set_scales(choice.scales(layer.format))
            self._found(layer)

    # ---- a low-rank branch ------------------------------------------------------------------------------------------

    def _split(self, step: SVDQuantConfig) -> None:
        if not self._cannot_scale() and all(layer.width == layer.channels for layer in self._site.layers):
            if step.alpha is None:
                self._awq(AWQLiteCalibConfig(), name="svdquant (channel scale)")
            else:
                magnitude = torch.stack([self._per_channel(layer) for layer in self._site.layers]).amax(0)
                self._scale(self._tie()(smoothquant_scale(self._channel_amax(), magnitude, step.alpha)))
        for layer in self.layers:
            statistics = self._site.statistics
            moment = None if statistics.second_moment is None else statistics.moment()
            layer.note(split_layer(layer, moment, step))
            self._solver.forget(layer.name)

    # ---- rounding ---------------------------------------------------------------------------------------------------

    def _round(self, step: GPTQCalibConfig) -> None:
        jobs = [self._job(layer, step) for layer in self.layers]
        try:
            factor = factorise(self._site.statistics.moment(), damping=step.perc_damp, act_order=step.act_order)
            results = gptq(jobs, factor)
        except DetentError as error:
            raise DetentError(f"{self._site.layers[0].name}: {error}") from None
        damped = (
            "" if factor.damping <= step.perc_damp else f"needed damping {factor.damping:g}, not {step.perc_damp:g}"
        )
        for layer, job, result in zip(self.layers, jobs, results, strict=True):
            if self._solver.keeps_latents:
                self._solver.latents[layer.name] = job.wish
            layer.set_scales(job.scales)
            layer.set_matrix(result.weight)
            self._solver.rounded.add(layer.name)
            kept = f"{result.kept_rows} of {len(result.weight)} rows keep plain rounding" if result.kept_rows else ""
            layer.note(
                Outcome(
                    "gptq",
                    "tr(D G D^T)" + (" against the float model's outputs" if job.target is not None else ""),
                    result.before,
                    result.after,
                    result.energy,
                    {"damping": factor.damping, "act_order": step.act_order},
                    "; ".join(filter(None, (damped, kept))),
                )
            )

    def _job(self, layer: Layer, step: GPTQCalibConfig) -> Job:
        """What a layer is rounded to, and under which scales."""
        self._check(layer, "gptq")
        weight, statistics, target = layer.matrix(), self._site.statistics, None
        if step.retarget and statistics.cross_moment is not None:
            target = retarget(weight, statistics.moment(), statistics.cross_moment, damping=step.retarget_damping)
        if step.scale_search and layer.name not in self._solver.searched:
            scales = self._searched_scales(layer, step.search_steps, step.signed_scales, target)
            return Job(weight, layer.format, scales, target)
        if layer.name not in self._solver.ranged:
            self._range(layer, None)
        return Job(weight, layer.format, layer.scales(), target)

    def _searched_scales(self, layer: Layer, steps: int, signed: bool, wish: Tensor | None = None) -> Scales:
        """The scales of least error under G's diagonal. `wish`: for this in place of the layer's weight."""
        fmt, amax = layer.format, self._amax_behind(layer.format)
        weighing = weighing_of(self._site.statistics, fmt, block=False)
        weight = layer.matrix() if wish is None else wish
        turn = signed and can_turn(fmt)
        choice = weighted_range(weight, fmt, weighing, range_factors(fmt, steps), global_amax=amax, turn=turn)
        self._found(layer)
        return choice.scales(fmt, amax)

    def _check(self, layer: Layer, name: str) -> None:
        layer.check_matrix_format(name)
        try:
            check_elementwise(layer.format, name)
        except DetentError as error:
            raise DetentError(f"{layer.name}: {error}") from None

    def _output_error(self, layer: Layer) -> float:
        statistics = self._site.statistics
        if statistics.second_moment is None and statistics.sample is None:
            return _squares(layer)
        weight = layer.matrix()
        return error_measure(statistics)(fake_quantize(weight, layer.format) - weight)


def follows_channels(layer: Layer) -> bool:
    """Whether the range of the layer's input follows from the ranges of its channels: static, one for the tensor."""
    quantizer = layer.input_quantizer
    if quantizer is None or not quantizer.is_enabled or quantizer.attributes.bias or quantizer.rotation is not None:
        return False
    fmt = quantizer.format
    plain = isinstance(fmt.scale, FloatScale) and not fmt.scale.outer and not fmt.dynamic
    return plain and fmt.granularity.kind == "per_tensor" and quantizer.attributes.calibrator == "max"


def _squares(layer: Layer) -> float:
    weight = layer.matrix()
    return float((layer.quantizer(layer.module.weight.detach()).float().reshape(weight.shape) - weight).square().sum())


def describe(steps: Sequence[Any]) -> str:
    """The names of the steps, for messages."""
    return ", ".join(str(step.method) for step in steps)
