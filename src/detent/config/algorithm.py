"""Calibration algorithms as the user names them: a name, a dictionary with arguments, or several one after the other.

Here is what they are told, not what they do. An algorithm of one's own is a subclass of `QuantizeAlgorithmConfig`
with a `method`, handed to `parse_algorithm` by whoever keeps the list of algorithms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from detent.config.base import ConfigField, ConfigModel, nearest
from detent.errors import DetentError

#: An algorithm as users write it.
AlgorithmSpec = str | Mapping[str, Any] | None | list[Any]


class QuantizeAlgorithmConfig(ConfigModel):
    """The base of algorithm configurations.

    Attributes:
        method: the name that selects the algorithm; None calibrates nothing.
    """

    method: str | None = ConfigField(None)

    @property
    def needs_data(self) -> bool:
        """Whether the algorithm needs data beyond what static activation ranges need anyway."""
        return True


class NoCalibConfig(QuantizeAlgorithmConfig):
    """No calibration: for formats whose scales come from each tensor anew."""

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
                f"mse: start_multiplier {self.start_multiplier} lies above stop_multiplier {self.stop_multiplier}"
            )

    @property
    def needs_data(self) -> bool:
        return False


#: The algorithms that are there, by method.
ALGORITHMS: dict[str | None, type[QuantizeAlgorithmConfig]] = {
    None: NoCalibConfig,
    "max": MaxCalibConfig,
    "mse": MseCalibConfig,
}
#: Known by name, but not there yet.
PLANNED_ALGORITHMS = (
    "smoothquant",
    "awq_lite",
    "awq_clip",
    "awq_full",
    "svdquant",
    "local_hessian",
    "gptq",
)


def algorithm_steps(spec: Any) -> list[dict[str, Any]]:
    """Any spelling as a list of ``{"method": name, ...arguments}``. Raises DetentError for what isn't an algorithm."""
    if isinstance(spec, list | tuple):
        return [step for one in spec for step in algorithm_steps(one)]
    if spec is None or isinstance(spec, str):
        return [{"method": spec}]
    if isinstance(spec, Mapping) and "method" in spec and isinstance(spec["method"], str | None):
        return [dict(spec)]
    raise DetentError(
        "algorithm: None, a name, a dictionary with 'method' and arguments, or a list of these, not " + repr(spec)
    )


def parse_algorithm(
    spec: Any, known: Mapping[str | None, type[QuantizeAlgorithmConfig]] = ALGORITHMS
) -> list[QuantizeAlgorithmConfig]:
    """The configurations of the algorithms that `spec` names, in order.

    Args:
        spec: see `algorithm_steps`.
        known: configuration classes by method.

    Raises:
        DetentError: a method that isn't there (with the nearest that is), or arguments that it doesn't take.
    """
    if isinstance(spec, QuantizeAlgorithmConfig) and type(spec) in known.values():
        return [spec]
    return [_config_class(step["method"], known)(**step) for step in algorithm_steps(spec)]


def _config_class(
    method: str | None, known: Mapping[str | None, type[QuantizeAlgorithmConfig]]
) -> type[QuantizeAlgorithmConfig]:
    if method in known:
        return known[method]
    there = ", ".join(str(name) for name in known)
    if method in PLANNED_ALGORITHMS:
        raise DetentError(f"algorithm {method!r} is not there yet; it comes in a later version. There are: {there}")
    close = nearest(str(method), [str(name) for name in known])
    raise DetentError(
        f"unknown algorithm {method!r}" + (f"; did you mean {close[0]!r}?" if close else f"; known: {there}")
    )
