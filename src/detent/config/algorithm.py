"""Calibration algorithms as the user names them: a name, a dictionary with arguments, or several one after the other.

How they are configured is here; what they do is in `detent.algorithms`, one file each, its handler found by the class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import field_validator

from detent.config.base import ConfigField, ConfigModel, as_keywords, nearest, shown
from detent.errors import DetentError


class QuantizeAlgorithmConfig(ConfigModel):
    """The base of algorithm configurations.

    Attributes:
        method: the name that selects the algorithm; None calibrates nothing.

    Example:
        >>> import detent
        >>> detent.QuantizeAlgorithmConfig(method=None).method is None
        True
    """

    method: str | None = ConfigField(None)

    @property
    def needs_data(self) -> bool:
        """Whether the algorithm needs data beyond what static activation ranges need anyway."""
        return True


class NoCalibConfig(QuantizeAlgorithmConfig):
    """No calibration: for formats whose scales are recomputed for every tensor."""

    method: Literal[None] = ConfigField(None)

    @property
    def needs_data(self) -> bool:
        return False


class MaxCalibConfig(QuantizeAlgorithmConfig):
    """The range is the largest magnitude seen.

    Attributes:
        distributed_sync: take the maximum over all processes that share the data or the tensor.
    """

    method: Literal["max"] = ConfigField("max")
    distributed_sync: bool = ConfigField(True)

    @property
    def needs_data(self) -> bool:
        return False


class MseCalibConfig(QuantizeAlgorithmConfig):
    """The range of each weight tile is the multiple of its largest magnitude with the least squared error.

    Attributes:
        step_size, start_multiplier, stop_multiplier: the multiples tried, from start to stop inclusive.
        fp8_scale_sweep: for formats with E4M3 scales: try every scale there is instead.
        distributed_sync: as for `MaxCalibConfig`.
    """

    method: Literal["mse"] = ConfigField("mse")
    step_size: float = ConfigField(0.1, gt=0, allow_inf_nan=False)
    start_multiplier: float = ConfigField(0.25, gt=0, allow_inf_nan=False)
    stop_multiplier: float = ConfigField(4.0, gt=0, allow_inf_nan=False)
    fp8_scale_sweep: bool = ConfigField(False)
    distributed_sync: bool = ConfigField(True)

    def model_post_init(self, context: Any) -> None:
        if self.start_multiplier > self.stop_multiplier:
            raise DetentError(
                f"mse: start_multiplier {self.start_multiplier} is greater than stop_multiplier {self.stop_multiplier}"
            )

    @property
    def needs_data(self) -> bool:
        return False


class DataAlgorithmConfig(QuantizeAlgorithmConfig):
    """The base of algorithms that learn from what calibration data leaves behind at each site.

    The attributes say how data is brought. Algorithms of one list are brought the same data, so where two of them set
    one of these, they have to agree.

    Attributes:
        layerwise: traverse the model block by block; False: all of it in one forward pass; None: as the algorithm does
            best. A dictionary with ``enable`` means that entry.
        inputs: what a block sees when it is observed: what the float blocks before it give (``"float"``) or what the
            quantized ones do (``"quantized"``); None: as the algorithm does best.
        spill: keep the inputs of blocks on disk instead of in memory.
        max_tokens: the largest number of tokens to observe; None for all.
        min_tokens: layers of experts that see fewer tokens get minimum-MSE scales, without data, and are named.
    """

    layerwise: bool | None = ConfigField(None)
    inputs: Literal["float", "quantized"] | None = ConfigField(None)
    spill: bool = ConfigField(False)
    max_tokens: int | None = ConfigField(None, ge=1)
    min_tokens: int = ConfigField(16, ge=0)

    @field_validator("layerwise", mode="before")
    @classmethod
    def _enabled(cls, value: Any) -> Any:
        return value["enable"] if isinstance(value, Mapping) and "enable" in value else value


class SmoothQuantCalibConfig(DataAlgorithmConfig):
    """Move range from activations to weights, channel by channel, where both are quantized.

    Attributes:
        alpha: how much of it: 0 leaves activations as they are, 1 gives every channel of them the same range;
            ``"auto"`` searches it for each site on a sample of tokens.
        sample_size: tokens in that sample.
    """

    method: Literal["smoothquant"] = ConfigField("smoothquant")
    alpha: float | Literal["auto"] = ConfigField(1.0)
    sample_size: int = ConfigField(256, ge=1)

    def model_post_init(self, context: Any) -> None:
        if self.alpha != "auto" and not 0 <= float(self.alpha) <= 1:
            raise DetentError(f"smoothquant: alpha is between 0 and 1, or 'auto', not {self.alpha}")


class AutoSmoothQuantCalibConfig(SmoothQuantCalibConfig):
    """`smoothquant` with alpha searched for each site."""

    method: Literal["autosmoothquant"] = ConfigField("autosmoothquant")  # type: ignore[assignment]
    alpha: float | Literal["auto"] = ConfigField("auto")


class AWQLiteCalibConfig(DataAlgorithmConfig):
    """Search a scale per input channel that protects the salient ones.

    Attributes:
        alpha_step: distance of the exponents tried in [0, 1].
        refine: also try values between the best one and its neighbours.
    """

    method: Literal["awq_lite"] = ConfigField("awq_lite")
    alpha_step: float = ConfigField(0.1, gt=0, le=1)
    refine: bool = ConfigField(True)


class AWQClipCalibConfig(DataAlgorithmConfig):
    """Search how much of each tile's range to clip.

    Attributes:
        min_clip_ratio: the smallest share of the range that is tried.
        shrink_step: distance of the shares tried.
        signed_scales: let the scales of signed integers be negative where that suits a tile better; see
            `GPTQCalibConfig`.
        max_co_batch_size, max_tokens_per_batch: accepted for configurations that set them; clipping is computed from
            second moments here, whose cost doesn't depend on tokens.
    """

    method: Literal["awq_clip"] = ConfigField("awq_clip")
    min_clip_ratio: float = ConfigField(0.5, gt=0, le=1)
    shrink_step: float = ConfigField(0.025, gt=0, lt=1)
    signed_scales: bool = ConfigField(True)
    max_co_batch_size: int | None = ConfigField(None)
    max_tokens_per_batch: int | None = ConfigField(None)


class AWQFullCalibConfig(AWQLiteCalibConfig):
    """`awq_lite`, then `awq_clip`, with the attributes of both."""

    method: Literal["awq_full"] = ConfigField("awq_full")  # type: ignore[assignment]
    min_clip_ratio: float = ConfigField(0.5, gt=0, le=1)
    shrink_step: float = ConfigField(0.025, gt=0, lt=1)
    signed_scales: bool = ConfigField(True)
    max_co_batch_size: int | None = ConfigField(None)
    max_tokens_per_batch: int | None = ConfigField(None)


class LocalHessianCalibConfig(DataAlgorithmConfig):
    """`mse` with the error weighed by the inputs' second moment.

    Attributes:
        step_size, start_multiplier, stop_multiplier: the multiples of the plain range tried.
        fp8_scale_sweep: for formats with E4M3 scales: try every scale there is instead.
        weighting: by each group's own block of the second moment (``"block"``), or by its diagonal alone
            (``"diagonal"``). Formats without groups take the diagonal.
        block_size: accepted for configurations that set it; blocks are the format's groups.
    """

    method: Literal["local_hessian"] = ConfigField("local_hessian")
    step_size: float = ConfigField(0.05, gt=0, allow_inf_nan=False)
    start_multiplier: float = ConfigField(0.5, gt=0, allow_inf_nan=False)
    stop_multiplier: float = ConfigField(1.5, gt=0, allow_inf_nan=False)
    fp8_scale_sweep: bool = ConfigField(False)
    weighting: Literal["block", "diagonal"] = ConfigField("block")
    block_size: int | None = ConfigField(None)
    distributed_sync: bool = ConfigField(True)


class GPTQCalibConfig(DataAlgorithmConfig):
    """Round one input column after the other and let the rest make up for the error.

    Attributes:
        perc_damp: share of the mean diagonal added to the second moment.
        block_size: accepted for configurations that set it; what columns add to later ones is brought along in halves
            here, with the same result.
        act_order: take columns by falling second moment; it needs no extra storage.
        scale_search: begin with the ranges of least error under the second moment's diagonal, unless an algorithm
            before this one chose ranges.
        search_steps: how many ranges are tried.
        signed_scales: let the scales of signed integers be negative where that suits a group better: the code without a
            counterpart then stands for a positive number.
        retarget: come near the outputs of the float model instead of those that the float weights give on the inputs
            at hand, so that errors of earlier blocks are made up for (as GPTAQ does). Needs block by block.
        retarget_damping: share of the mean diagonal added to the second moment where the target is computed.
        sequential: observe each site of a block again, with the sites before it rounded. Takes a forward pass of the
            block for each site.
    """

    method: Literal["gptq"] = ConfigField("gptq")
    perc_damp: float = ConfigField(0.01, ge=0, allow_inf_nan=False)
    block_size: int = ConfigField(128, ge=1)
    act_order: bool = ConfigField(True)
    scale_search: bool = ConfigField(True)
    search_steps: int = ConfigField(5, ge=1)
    signed_scales: bool = ConfigField(True)
    retarget: bool = ConfigField(False)
    retarget_damping: float = ConfigField(0.001, gt=0, allow_inf_nan=False)
    sequential: bool = ConfigField(False)


class AutoRoundCalibConfig(DataAlgorithmConfig):
    """Rounding and clipping ranges learned per block by signed gradient descent (SignRound), for when minutes don't
    matter.

    Attributes:
        iterations: steps for each block.
        lr: the learning rate at first; None: 1 / iterations.
        batch_size: sequences in a step.
        scale_search, search_steps, signed_scales: begin as `GPTQCalibConfig` does.
    """

    method: Literal["autoround"] = ConfigField("autoround")
    iterations: int = ConfigField(200, ge=1)
    lr: float | None = ConfigField(None, gt=0, allow_inf_nan=False)
    batch_size: int = ConfigField(8, ge=1)
    scale_search: bool = ConfigField(True)
    search_steps: int = ConfigField(12, ge=1)
    signed_scales: bool = ConfigField(True)


class BlockAPCalibConfig(DataAlgorithmConfig):
    """All codes and scales of a block trained together to give the float model's outputs (Block-AP of EfficientQAT,
    arXiv 2407.11062), from what the algorithms before it rounded.

    Attributes:
        steps: for each block.
        alone_steps: the same where no `distill` follows, or has too little data; None: as many.
        batch_size: sequences in a step.
        position_rate, scale_rate: learning rates of codes (in steps of the grid) and of scales (relative).
    """

    method: Literal["block_ap"] = ConfigField("block_ap")
    steps: int = ConfigField(80, ge=1)
    alone_steps: int | None = ConfigField(None, ge=1)
    batch_size: int = ConfigField(2, ge=1)
    position_rate: float = ConfigField(0.01, ge=0, allow_inf_nan=False)
    scale_rate: float = ConfigField(0.004, ge=0, allow_inf_nan=False)


class DistillCalibConfig(QuantizeAlgorithmConfig):
    """Codes, scales and norms of a rounded model trained end to end, to give the float model's predictions.

    Attributes:
        steps: how many.
        passes: over the data at most; None: as many as the steps ask for.
        least_steps: where `passes` leaves fewer, there is too little to learn from, and nothing is trained.
        batch_size: sequences in a step.
        held_out: batches that choose the step to keep; a quarter of all at most.
        position_rate, scale_rate, norm_rate: learning rates of codes (in steps of the grid), of scales (relative) and
            of norms.
        train_norms: whether norms are trained.
    """

    method: Literal["distill"] = ConfigField("distill")
    steps: int = ConfigField(80, ge=1)
    passes: int | None = ConfigField(None, ge=1)
    least_steps: int = ConfigField(24, ge=0)
    batch_size: int = ConfigField(2, ge=1)
    held_out: int = ConfigField(4, ge=0)
    position_rate: float = ConfigField(0.005, ge=0, allow_inf_nan=False)
    scale_rate: float = ConfigField(0.003, ge=0, allow_inf_nan=False)
    norm_rate: float = ConfigField(0.001, ge=0, allow_inf_nan=False)
    train_norms: bool = ConfigField(True)


class BestCalibConfig(DataAlgorithmConfig):
    """The lowest perplexity for a number of bits in little time: `gptq`, then `block_ap` on each block, then `distill`
    on the whole model.

    Attributes:
        block_steps: of `block_ap`, and twice as many where the data is too little for `distill`; 0 for none.
        steps: of `distill`, which passes over the data once at most, and leaves out data of fewer than 24 steps; 0 for
            none.
        max_tokens: tokens that `gptq` and `block_ap` see; None for all. `distill` sees all of them.
    """

    method: Literal["best"] = ConfigField("best")
    block_steps: int = ConfigField(40, ge=0)
    steps: int = ConfigField(48, ge=0)
    max_tokens: int | None = ConfigField(16384, ge=1)


#: Configuration classes by method.
ALGORITHMS: dict[str | None, type[QuantizeAlgorithmConfig]] = {
    None: NoCalibConfig,
    "max": MaxCalibConfig,
    "mse": MseCalibConfig,
    "smoothquant": SmoothQuantCalibConfig,
    "autosmoothquant": AutoSmoothQuantCalibConfig,
    "awq_lite": AWQLiteCalibConfig,
    "awq_clip": AWQClipCalibConfig,
    "awq_full": AWQFullCalibConfig,
    "local_hessian": LocalHessianCalibConfig,
    "gptq": GPTQCalibConfig,
    "autoround": AutoRoundCalibConfig,
    "block_ap": BlockAPCalibConfig,
    "distill": DistillCalibConfig,
    "best": BestCalibConfig,
}


def parse_algorithm(
    spec: Any, known: Mapping[str | None, type[QuantizeAlgorithmConfig]] = ALGORITHMS
) -> list[QuantizeAlgorithmConfig]:
    """The configurations of the algorithms that `spec` names, in order.

    Args:
        spec: None, a name, a dictionary with ``"method"`` and arguments, a configuration, or a list of these. What was
            parsed before passes through.
        known: configuration classes by method.

    Raises:
        DetentError: something else; an unknown method (with the nearest known one), or arguments that it doesn't take.

    Example:
        >>> from detent.config import parse_algorithm
        >>> [step.method for step in parse_algorithm(["awq_lite", {"method": "gptq", "act_order": False}])]
        ['awq_lite', 'gptq']
    """
    if isinstance(spec, list | tuple) and not any(isinstance(one, list | tuple) for one in spec):
        return [step for one in spec for step in parse_algorithm(one, known)]
    if isinstance(spec, QuantizeAlgorithmConfig) and type(spec) in known.values():
        return [spec]
    if spec is None or isinstance(spec, str):
        return [_config_class(spec, known)(method=spec)]
    if isinstance(spec, Mapping) and "method" in spec and isinstance(spec["method"], str | None):
        return [_config_class(spec["method"], known)(**as_keywords(spec))]
    raise DetentError(
        "algorithm: None, a name, a dictionary with 'method' and arguments, or a list of these, not " + shown(spec)
    )


def _config_class(
    method: str | None, known: Mapping[str | None, type[QuantizeAlgorithmConfig]]
) -> type[QuantizeAlgorithmConfig]:
    if method in known:
        return known[method]
    there = ", ".join(str(name) for name in known)
    close = nearest(str(method), [str(name) for name in known])
    raise DetentError(
        f"unknown algorithm {shown(method)}" + (f"; did you mean {close[0]!r}?" if close else f"; known: {there}")
    )
