"""`quantize`: from a float model in memory to a calibrated quantized one."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from detent.algorithms.modes import ForwardLoop
from detent.config import QuantizeConfig
from detent.engine import calibration
from detent.engine.calibration import Calibrated, Fold
from detent.engine.data_loop import DataLoop
from detent.engine.host import Host
from detent.model.adapters import adapter_names, asked_for
from detent.model.conversion import (
    check_something_enabled,
    named_quantizers,
    replace_quant_module,
    set_quantizer_by_cfg,
)
from detent.model.rollback import unchanged_on_failure
from detent.model.scopes import evaluating
from detent.model.usage import quantizer_usage
from detent.model.weights import check_packable, pack_module
from detent.nn import QuantWeightBase
from detent.nn.sequential import members_of
from detent.structure.site import Structure

_log = logging.getLogger(__name__)


def quantize(
    model: nn.Module,
    config: QuantizeConfig | dict[str, Any],
    forward_loop: ForwardLoop | None = None,
    *,
    strict: bool = True,
    structure: Structure | None = None,
    fold: Fold = "never",
) -> nn.Module:
    """Put quantizers into a model, set them by a configuration and calibrate them.

    Args:
        model: any `torch.nn.Module`; it is changed in place. If it is quantized already, its quantizers are set again.
        config: a preset such as ``detent.INT8_DEFAULT_CFG``, or a dict with ``"quant_cfg"`` (wildcards, or an ordered
            list) and ``"algorithm"``.
        forward_loop: a function that calls the model it is given on calibration data; needed where activations have
            static ranges.
        strict: whether a rule that matches nothing, or a configuration that quantizes nothing, is an error.
        structure, fold: see `calibrate`.

    Returns:
        `model`.

    Raises:
        DetentError: the configuration is not valid, matches nothing or quantizes nothing; an algorithm can't serve a
            layer (said before the loop runs); calibration fails. The model is then as it was.

    Example:
        >>> import torch, detent
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> data = torch.randn(64, 16)
        >>> model = detent.quantize(model, detent.INT8_DEFAULT_CFG, lambda m: m(data))
        >>> model[0].weight_quantizer.num_bits
        8
    """
    checked = QuantizeConfig.of(config)  # before anything changes
    with unchanged_on_failure(model):
        run(model, checked, forward_loop, strict=strict, structure=structure, fold=fold)
    on = sum(quantizer.is_enabled for _, quantizer in named_quantizers(model))
    _log.info("%d quantizers are on", on)
    return model


def run(
    model: nn.Module,
    config: QuantizeConfig,
    forward_loop: ForwardLoop | DataLoop | None = None,
    *,
    strict: bool = True,
    structure: Structure | None = None,
    fold: Fold = "never",
    host: Host | None = None,
) -> Calibrated:
    """`quantize` for callers that discard the model after a failure: the float weights aren't kept to restore it from.

    Args:
        model, config, forward_loop, strict, structure, fold: see `quantize`.
        host: where the model's blocks are; by default in memory.

    Returns:
        What algorithms did to the weights.

    Raises:
        DetentError: as `quantize` does; the model can't be used afterwards.
    """
    loop = forward_loop if isinstance(forward_loop, DataLoop) else DataLoop(forward_loop)
    replace_quant_module(model, adapters=asked_for(model, config.rules, adapter_names(model)))
    set_quantizer_by_cfg(model, config.quant_cfg, strict=strict)
    check_something_enabled(model, config.quant_cfg, strict=strict)
    done = calibration.run(model, config.algorithm, loop, structure=structure, fold=fold, host=host)
    if loop and not (host is not None and host.streams):
        _check_used(model, loop)
    _hold_codes(model)
    return done


def _check_used(model: nn.Module, loop: DataLoop) -> None:
    """The model has to compute with every quantizer that is on: seen on one call of the user's data."""
    with evaluating(model), torch.no_grad(), quantizer_usage(model) as usage:
        loop.first(model)
    usage.check()


def _hold_codes(model: nn.Module) -> None:
    """Pack the weights whose quantizers were asked for codes (fake_quant=False)."""
    real = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, QuantWeightBase)
        and any(q.is_enabled and not q.fake_quant for q in members_of(module.weight_quantizer))
    ]
    for name, module in real:
        check_packable(name, module)
    for _, module in real:
        pack_module(module)
