"""What the user specifies, as data: quantizer attributes, presets, scheme names; and their translation into formats."""

from __future__ import annotations

from detent.config import presets
from detent.config.algorithm import (
    ALGORITHMS,
    MaxCalibConfig,
    MseCalibConfig,
    NoCalibConfig,
    QuantizeAlgorithmConfig,
    parse_algorithm,
)
from detent.config.attributes import (
    Attributes,
    QuantizerAttributeConfig,
    RotateConfig,
    SequentialConfig,
    parse_attributes,
)
from detent.config.base import ConfigField, ConfigModel, ModeloptField
from detent.config.format_names import parse_format
from detent.config.matching import check_matches, match, matches
from detent.config.presets import choices, update_quant_cfg_with_kv_cache_quant
from detent.config.quant_cfg import PresetPattern, QuantCfg, Rule, class_name, is_enabled, normalize, switched
from detent.config.quantize_config import PresetConfig, QuantizeConfig, need_calibration
from detent.config.schemes import (
    Scheme,
    all_schemes,
    canonical_name,
    kv_cache_format,
    kv_cache_types,
    parse_scheme,
    quant_cfg_for,
    scheme_aliases,
)
from detent.config.transforms import HQQConfig, RotationConfig, SVDQuantConfig

__all__ = [
    "ALGORITHMS",
    "Attributes",
    "ConfigField",
    "ConfigModel",
    "HQQConfig",
    "MaxCalibConfig",
    "ModeloptField",
    "MseCalibConfig",
    "NoCalibConfig",
    "PresetConfig",
    "PresetPattern",
    "QuantCfg",
    "QuantizeAlgorithmConfig",
    "QuantizeConfig",
    "QuantizerAttributeConfig",
    "RotateConfig",
    "RotationConfig",
    "Rule",
    "SVDQuantConfig",
    "Scheme",
    "SequentialConfig",
    "all_schemes",
    "canonical_name",
    "check_matches",
    "choices",
    "class_name",
    "is_enabled",
    "kv_cache_format",
    "kv_cache_types",
    "match",
    "matches",
    "need_calibration",
    "normalize",
    "parse_algorithm",
    "parse_attributes",
    "parse_format",
    "parse_scheme",
    "presets",
    "quant_cfg_for",
    "scheme_aliases",
    "switched",
    "update_quant_cfg_with_kv_cache_quant",
]
