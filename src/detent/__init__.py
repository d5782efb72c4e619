# ruff: noqa: F401  the names below TYPE_CHECKING are for type checkers; at run time __getattr__ finds them
"""Detent: low-bit models, accurate, made in little memory, loadable by the engines people deploy on.

Everything public is reachable from here and imported when first used, so that ``import detent`` costs what ``import
torch`` costs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from detent._version import __version__
from detent.external.on_import import once_imported

#: Public name -> the module that defines it. Presets (``*_CFG``, ``*_CONFIG``) come from `detent.config.presets`.
_HOMES = {
    "DetentError": "detent.errors",
    "Format": "detent.formats",
    "QTensor": "detent.formats",
    "encode": "detent.formats",
    "decode": "detent.formats",
    "fake_quantize": "detent.formats",
    "QuantizerAttributeConfig": "detent.config",
    "QuantizeConfig": "detent.config",
    "QuantizeAlgorithmConfig": "detent.config",
    "RotateConfig": "detent.config",
    "choices": "detent.config.presets",
    "need_calibration": "detent.config",
    "update_quant_cfg_with_kv_cache_quant": "detent.config.presets",
    "_default_disabled_quantizer_cfg": "detent.config.presets",
    "parse_scheme": "detent.config",
    "TensorQuantizer": "detent.nn",
    "SequentialQuantizer": "detent.nn",
    "QuantModule": "detent.nn",
    "QuantModuleRegistry": "detent.nn",
    "register": "detent.nn",
    "unregister": "detent.nn",
    "register_quant_backend": "detent.nn",
    "unregister_quant_backend": "detent.nn",
    "ParallelState": "detent.distributed",
    "ModeloptField": "detent.config.base",
    "ConfigField": "detent.config.base",
    "CalibrateModeRegistry": "detent.algorithms.modes",
    "BaseCalibrateModeDescriptor": "detent.algorithms.modes",
    "ConvertEntrypoint": "detent.algorithms.modes",
    "find_structure": "detent.structure",
    "quantize": "detent.engine.quantization",
    "calibrate": "detent.engine.calibration",
    "auto_quantize": "detent.search",
    "get_auto_quantize_config": "detent.search",
    "auto_quantize_table": "detent.search",
    "auto_quantize_curve": "detent.search",
    "plot_auto_quantize_curve": "detent.search",
    "replace_quant_module": "detent.model.conversion",
    "set_quantizer_by_cfg": "detent.model.conversion",
    "set_quantizer_by_cfg_context": "detent.model.conversion",
    "set_quantizer_attribute": "detent.model.attributes",
    "set_quantizer_attributes_full": "detent.model.attributes",
    "set_quantizer_attributes_partial": "detent.model.attributes",
    "enable_quantizer": "detent.model.attributes",
    "disable_quantizer": "detent.model.attributes",
    "print_quant_summary": "detent.model.weights",
    "fold_weight": "detent.model.weights",
    "compress": "detent.model.weights",
    "save": "detent.model.state",
    "restore": "detent.model.state",
    "detent_state": "detent.model.state",
    "modelopt_state": "detent.model.state",
    "restore_from_detent_state": "detent.model.state",
    "restore_from_modelopt_state": "detent.model.state",
    "export_onnx": "detent.onnx",
    "use_reporter": "detent.progress",
    "enable_huggingface_checkpointing": "detent.runs.hf_quantizer",
    "plan_checkpoint": "detent.runs.plan",
    "quantize_checkpoint": "detent.runs.quantize",
    "evaluate_checkpoint": "detent.runs.evaluate",
    "convert_checkpoint": "detent.runs.convert",
    "AlgorithmOptions": "detent.runs.options",
    "AutoOptions": "detent.runs.options",
    "CalibrationOptions": "detent.runs.options",
    "EvaluationOptions": "detent.runs.options",
    "ExportOptions": "detent.runs.options",
    "ModelOptions": "detent.runs.options",
    "SchemeOptions": "detent.runs.options",
}
_SUBMODULES = {
    "algorithms",
    "checkpoints",
    "config",
    "data",
    "distributed",
    "engine",
    "evaluation",
    "formats",
    "model",
    "nn",
    "onnx",
    "plan",
    "pretrained",
    "report",
    "runs",
    "search",
    "statistics",
    "structure",
    "transforms",
}

if TYPE_CHECKING:
    from detent.algorithms.modes import BaseCalibrateModeDescriptor, CalibrateModeRegistry, ConvertEntrypoint
    from detent.config import (
        QuantizeAlgorithmConfig,
        QuantizeConfig,
        QuantizerAttributeConfig,
        RotateConfig,
        need_calibration,
        parse_scheme,
    )
    from detent.config.base import ConfigField, ModeloptField
    from detent.config.presets import *  # noqa: F403
    from detent.config.presets import choices, update_quant_cfg_with_kv_cache_quant
    from detent.distributed import ParallelState
    from detent.engine.calibration import calibrate
    from detent.engine.quantization import quantize
    from detent.errors import DetentError
    from detent.formats import Format, QTensor, decode, encode, fake_quantize
    from detent.model.attributes import (
        disable_quantizer,
        enable_quantizer,
        set_quantizer_attribute,
        set_quantizer_attributes_full,
        set_quantizer_attributes_partial,
    )
    from detent.model.conversion import (
        replace_quant_module,
        set_quantizer_by_cfg,
        set_quantizer_by_cfg_context,
    )
    from detent.model.state import (
        detent_state,
        modelopt_state,
        restore,
        restore_from_detent_state,
        restore_from_modelopt_state,
        save,
    )
    from detent.model.weights import compress, fold_weight, print_quant_summary
    from detent.nn import (
        QuantModule,
        QuantModuleRegistry,
        SequentialQuantizer,
        TensorQuantizer,
        register,
        register_quant_backend,
        unregister,
        unregister_quant_backend,
    )
    from detent.onnx import export_onnx
    from detent.progress import use_reporter
    from detent.runs.convert import convert_checkpoint
    from detent.runs.evaluate import evaluate_checkpoint
    from detent.runs.hf_quantizer import enable_huggingface_checkpointing
    from detent.runs.options import (
        AlgorithmOptions,
        AutoOptions,
        CalibrationOptions,
        EvaluationOptions,
        ExportOptions,
        ModelOptions,
        SchemeOptions,
    )
    from detent.runs.plan import plan_checkpoint
    from detent.runs.quantize import quantize_checkpoint
    from detent.search import (
        auto_quantize,
        auto_quantize_curve,
        auto_quantize_table,
        get_auto_quantize_config,
        plot_auto_quantize_curve,
    )
    from detent.structure import find_structure


once_imported("transformers.quantizers.auto", "detent.runs.hf_quantizer")


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"detent.{name}")
    home = "detent.config.presets" if name.endswith(("_CFG", "_CONFIG")) else _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'detent' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(home), name)
    except AttributeError:
        raise AttributeError(f"module 'detent' has no attribute {name!r}") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from detent.config import presets

    return sorted(
        {"__version__", *_HOMES, *_SUBMODULES, *(n for n in vars(presets) if n.endswith(("_CFG", "_CONFIG")))}
    )


__all__ = [name for name in _HOMES if not name.startswith("_")]
