"""The whole configuration ``{"quant_cfg": ..., "algorithm": ...}``, and two questions about it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Self

from pydantic import field_validator

from detent.config.algorithm import parse_algorithm
from detent.config.attributes import QuantizerAttributeConfig, SequentialConfig
from detent.config.base import ConfigField, ConfigModel, as_keywords, shown
from detent.config.quant_cfg import QuantCfg, Rule, normalize
from detent.errors import DetentError


class PresetConfig(dict[str, Any]):
    """A configuration as a dictionary, whose `copy` is deep: changing a copy never changes a preset."""

    def copy(self) -> Self:
        """A deep copy."""
        return copy.deepcopy(self)


class QuantizeConfig(ConfigModel):
    """A configuration, checked.

    Attributes:
        quant_cfg: a dictionary of patterns or a list of entries (see `detent.config.normalize`).
        algorithm: given as None, a name, a dictionary with ``"method"`` and arguments, or a list of these; kept as the
            list of their configurations (see `parse_algorithm`).

    Raises:
        DetentError: a key that is neither of the two, or a value that isn't valid.


    Example:
        >>> from detent import QuantizeConfig
        >>> config = QuantizeConfig(quant_cfg={"*weight_quantizer": {"num_bits": 4, "axis": 0}})
        >>> config.algorithm[0].method, [rule.pattern for rule in config.rules]
        ('max', ['*weight_quantizer'])
    """

    quant_cfg: Any = ConfigField()
    algorithm: Any = ConfigField("max", validate_default=True)

    @field_validator("quant_cfg")
    @classmethod
    def _quant_cfg(cls, value: Any) -> Any:
        normalize(value)
        return value if isinstance(value, QuantCfg) else QuantCfg(value)

    @field_validator("algorithm")
    @classmethod
    def _algorithm(cls, value: Any) -> Any:
        return parse_algorithm(value)

    @property
    def rules(self) -> list[Rule]:
        """The entries of `quant_cfg`, checked and in the order in which they apply."""
        return normalize(self.quant_cfg)

    @classmethod
    def of(cls, config: Any) -> QuantizeConfig:
        """`config` if it is one already, else the one that a mapping describes. Raises DetentError."""
        if isinstance(config, QuantizeConfig):
            return config
        if not isinstance(config, Mapping):
            raise DetentError(
                "config: a dictionary with 'quant_cfg' and 'algorithm', such as detent.INT8_DEFAULT_CFG, not "
                + shown(config)
            )
        return cls(**as_keywords(config))


def need_calibration(config: Any) -> bool:
    """Whether data must be shown to the model: some activation has static scales, or the algorithm learns from data.

    Weights are calibrated from themselves; dynamic formats, and OCP MX, need nothing.


    Example:
        >>> import detent
        >>> detent.need_calibration(detent.INT8_DEFAULT_CFG), detent.need_calibration(detent.MXFP4_DEFAULT_CFG)
        (True, False)
    """
    checked = QuantizeConfig.of(config)
    return any(step.needs_data for step in checked.algorithm) or any(_needs_ranges(rule) for rule in checked.rules)


def _needs_ranges(rule: Rule) -> bool:
    """Whether a rule gives an activation static scales."""
    if not rule.enables or (isinstance(rule.pattern, str) and "weight_quantizer" in rule.pattern):
        return False
    if rule.attributes is None:
        return False
    steps = rule.attributes if isinstance(rule.attributes, SequentialConfig) else [rule.attributes]
    return any(_is_static(step) for step in steps)


def _is_static(attributes: QuantizerAttributeConfig) -> bool:
    pinned = attributes.use_constant_amax or attributes.constant_amax is not None
    return attributes.enable and not attributes.is_dynamic and not pinned
