"""Calibration: ranges for every quantizer that needs one, from weights and from a user's `forward_loop`."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from detent.algorithms import least_error_range, weight_range
from detent.algorithms.mse import multipliers
from detent.config import MseCalibConfig, QuantizeAlgorithmConfig, parse_algorithm
from detent.data.padding import current_token_mask, token_mask
from detent.engine.conversion import named_quantizers
from detent.errors import DetentError
from detent.nn import QuantWeightBase, SequentialQuantizer, TensorQuantizer
from detent.nn.observers import make_observer

_log = logging.getLogger(__name__)

ForwardLoop = Callable[[nn.Module], Any]


def calibrate(
    model: nn.Module,
    algorithm: str | dict[str, Any] | list[Any] | None = "max",
    forward_loop: ForwardLoop | None = None,
) -> nn.Module:
    """Find the range of every enabled quantizer that needs one.

    Args:
        model: a model with quantizers. It runs in eval mode; every module's train flag is restored.
        algorithm: ``"max"``, ``"mse"``, a dict with ``"method"`` and its options, a list of these (one after the
            other), or None for no calibration.
        forward_loop: a function that calls the model it is given on calibration data. Only needed where activations
            have static ranges.

    Returns:
        `model`.

    Raises:
        DetentError: the algorithm is unknown; data is needed and missing; the loop never calls the model or never
            reaches a quantizer that needs data; NaN or infinity is met.
    """
    for config in parse_algorithm(algorithm):
        if config.method is None:
            continue
        with _eval_mode(model), torch.no_grad():
            _calibrate_activations(model, forward_loop)
            _calibrate_weights(model, config)
    return model


def _calibrate_weights(model: nn.Module, config: QuantizeAlgorithmConfig) -> None:
    for name, module, quantizer, weight in _weights(model):
        members = list(quantizer) if isinstance(quantizer, SequentialQuantizer) else [quantizer]
        for member in members:
            assert isinstance(member, TensorQuantizer)
            if not torch.isfinite(weight).all():
                raise DetentError(f"{name}: NaN or infinity in the weight; check the checkpoint")
            if member.needs_calibration and not member.format.dynamic:
                low, high = _range_of(weight, member, config)
                member.set_range(low, high)
                if getattr(member.format.scale, "outer", False):
                    member.global_amax = weight.abs().amax()
            if member is not members[-1]:
                weight = member(weight)  # a sequence quantizes what its earlier members leave
        if isinstance(module, QuantWeightBase):
            module.refresh_weight()


def _range_of(weight: torch.Tensor, quantizer: TensorQuantizer, config: QuantizeAlgorithmConfig) -> Any:
    if isinstance(config, MseCalibConfig):
        factors = multipliers(config.step_size, config.start_multiplier, config.stop_multiplier)
        sweep = config.fp8_scale_sweep and getattr(quantizer.format.scale, "outer", False)
        return least_error_range(weight, quantizer.format, factors, fp8_scale_sweep=sweep)
    if quantizer.attributes.calibrator != "max":
        observer = make_observer(quantizer.attributes.calibrator, quantizer.format)
        observer.observe(weight)
        return observer.range(quantizer.format)
    return weight_range(weight, quantizer.format)


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any, torch.Tensor]]:
    """(name, module, quantizer, weight, output channels first) for each ``X_quantizer`` beside a parameter ``X``."""
    for module_name, module in model.named_modules():
        for child_name, child in module.named_children():
            if not isinstance(child, (TensorQuantizer, SequentialQuantizer)) or not child.is_enabled:
                continue
            parameter_name = child_name.removesuffix("_quantizer")
            parameter = module._parameters.get(parameter_name)
            if parameter is not None:
                weight = parameter.detach()
                if isinstance(module, QuantWeightBase) and parameter_name == "weight":
                    weight = module.to_output_first(weight, module)
                yield f"{module_name}.{parameter_name}", module, child, weight


def _calibrate_activations(model: nn.Module, forward_loop: ForwardLoop | None) -> None:
    direct = {id(member) for _, _, q, _ in _weights(model) for member in q.modules()}
    waiting = [q for q in _members(model) if q.needs_calibration and id(q) not in direct]
    with_bias = [q for q in _members(model) if q.is_enabled and q.attributes.bias and q not in waiting]
    # A dynamic format with an outer scale can take that scale from each tensor, so it can do without data.
    if forward_loop is None:
        needing = [q.name for q in waiting if not q.format.dynamic]
        if needing:
            raise DetentError(
                f"{len(needing)} quantizers need data for their static ranges (for instance {needing[0]}): pass a"
                " forward_loop that runs the model on calibration data, or make them dynamic (type: 'dynamic')"
            )
        return
    if not waiting and not with_bias:
        return
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hook = model.register_forward_hook(count)
    try:
        with _observing(model, waiting + with_bias), _mask_from_arguments(model):
            _run(forward_loop, model)
        if not calls:
            raise DetentError("the forward_loop never called the model, so there is nothing to calibrate with")
        unseen = []
        for quantizer in waiting + with_bias:
            try:
                quantizer.load_calib_amax()
            except DetentError as error:
                if "no data was observed" not in str(error):
                    raise
                unseen.append(quantizer.name)
        if unseen:
            raise DetentError(
                f"the calibration data never reached {len(unseen)} quantizers (for instance {', '.join(unseen[:3])});"
                " exclude them in the configuration, make them dynamic, or feed data that uses them"
            )
    finally:
        hook.remove()
        for quantizer in waiting + with_bias:
            quantizer.disable_calib()


def _run(forward_loop: ForwardLoop, model: nn.Module) -> None:
    parameters = inspect.signature(forward_loop).parameters
    if parameters:
        forward_loop(model)
    else:
        forward_loop()  # type: ignore[call-arg]


def _members(model: nn.Module) -> Iterator[TensorQuantizer]:
    for _, quantizer in named_quantizers(model):
        for member in quantizer if isinstance(quantizer, SequentialQuantizer) else [quantizer]:
            assert isinstance(member, TensorQuantizer)
            yield member


@contextmanager
def _observing(model: nn.Module, observers: list[TensorQuantizer]) -> Iterator[None]:
    """Every quantizer passes its tensor through unquantized; `observers` look at it."""
    quantizing = [q for q in _members(model) if q._if_quant]
    for quantizer in quantizing:
        quantizer.disable_quant()
    for quantizer in observers:
        quantizer.enable_calib()
    try:
        yield
    finally:
        for quantizer in quantizing:
            quantizer.enable_quant()


@contextmanager
def _mask_from_arguments(model: nn.Module) -> Iterator[None]:
    """Padding never enters statistics: where a call passes an `attention_mask` [batch, seq], its zeros are left out."""
    active: list[Any] = []

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if mask is None and args and isinstance(args[0], dict):
            mask = args[0].get("attention_mask")
        usable = isinstance(mask, torch.Tensor) and mask.dim() == 2 and current_token_mask() is None
        context = token_mask(mask if usable else current_token_mask())
        context.__enter__()
        active.append(context)

    def after(*_: Any) -> None:
        active.pop().__exit__(None, None, None)

    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
