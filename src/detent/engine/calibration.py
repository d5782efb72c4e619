"""Calibration: ranges for every quantizer that needs one, from weights and from a user's `forward_loop`."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from detent.algorithms import least_error_range, multipliers
from detent.config import MseCalibConfig, QuantizeAlgorithmConfig, parse_algorithm
from detent.data.padding import current_token_mask, token_mask
from detent.distributed import ParallelState
from detent.engine.conversion import named_members
from detent.engine.rollback import unchanged_on_failure
from detent.errors import DetentError
from detent.formats import FloatScale
from detent.nn import QuantWeightBase, TensorQuantizer, quantizers_of
from detent.nn.sequential import Quantizer, members_of
from detent.progress import track

_log = logging.getLogger(__name__)

ForwardLoop = Callable[[nn.Module], Any]


def calibrate(
    model: nn.Module,
    algorithm: str | dict[str, Any] | list[Any] | None = "max",
    forward_loop: ForwardLoop | None = None,
) -> nn.Module:
    """Find the range of every enabled quantizer that needs one.

    Args:
        model: a model with quantizers. It runs in eval mode, without gradients; every module's train flag is restored.
        algorithm: ``"max"``, ``"mse"``, a dict with ``"method"`` and its options, a list of these (one after the
            other), or None for no calibration.
        forward_loop: a function that calls the model it is given on calibration data, once however many algorithms
            there are. Only needed where activations have static ranges. Where the model is called with an
            `attention_mask` [batch, seq], what it masks stays out of the statistics.

    Returns:
        `model`.

    Raises:
        DetentError: the algorithm is unknown; data is needed and missing; the loop never calls the model or never
            reaches a quantizer that needs data; NaN or infinity is met. Ranges and train flags are then as they were.
    """
    if forward_loop is not None and not callable(forward_loop):
        raise DetentError(
            "forward_loop: a function that calls the model it is given on calibration data, not a"
            f" {type(forward_loop).__name__}; for a data loader write: lambda model: [model(x) for x in loader]"
        )
    steps = [step for step in parse_algorithm(algorithm) if step.method is not None]
    if not steps:
        _warn_uncalibrated(model)
        return model
    with unchanged_on_failure(model), torch.no_grad():
        with _eval_mode(model):
            _calibrate_activations(model, forward_loop)
            for step in steps:
                _calibrate_weights(model, step)
        if any(getattr(step, "distributed_sync", False) for step in steps):
            _synchronize(model)
    return model


def _warn_uncalibrated(model: nn.Module) -> None:
    waiting = [q.name for q in named_members(model) if q.needs_calibration and q.is_static and not q.is_calibrated]
    if waiting:
        _log.info("%d static quantizers, such as %s, take their range from each tensor", len(waiting), waiting[0])


# ---- weights --------------------------------------------------------------------------------------------------------


def _calibrate_weights(model: nn.Module, config: QuantizeAlgorithmConfig) -> None:
    total = sum(1 for _ in _weights(model))
    for name, quantizer, weight in track(_weights(model), "Calibrating weights", total):
        if not bool(torch.isfinite(weight).all()):
            raise DetentError(f"{name}: NaN or infinity in the weight; check the checkpoint")
        for member in members_of(quantizer):
            if member.needs_calibration or member.needs_bias:
                member.calibrate_on(weight)
                _improve(member, member.centred(member.transform(weight)), config)
            if member is not members_of(quantizer)[-1]:
                output = member(weight)  # a sequence quantizes what its earlier members leave
                assert isinstance(output, Tensor)
                weight = output


def _improve(quantizer: TensorQuantizer, weight: Tensor, config: QuantizeAlgorithmConfig) -> None:
    """From the plain range of a weight to the one that the algorithm and the format ask for."""
    rule = quantizer.format.scale
    if quantizer.format.dynamic or not isinstance(rule, FloatScale):
        return
    if rule.outer:
        quantizer.global_amax = weight.abs().amax()
    if isinstance(config, MseCalibConfig) and quantizer.needs_calibration:
        factors = multipliers(config.step_size, config.start_multiplier, config.stop_multiplier)
        sweep = config.fp8_scale_sweep and rule.outer
        quantizer.set_range(*least_error_range(weight, quantizer.format, factors, fp8_scale_sweep=sweep))
    elif rule.four_over_six:  # an amax of 6/4 is what maps the largest magnitude to 4
        quantizer.set_range(*least_error_range(weight, quantizer.format, [1.5]))


def _weights(model: nn.Module) -> Iterator[tuple[str, Quantizer, Tensor]]:
    """(name, quantizer, weight with output channels first) for each enabled ``X_quantizer`` beside a weight ``X``."""
    for module_name, module in model.named_modules():
        for child_name, child in quantizers_of(module):
            attribute = child_name.removesuffix("_quantizer")
            if not child.is_enabled or attribute == child_name:
                continue
            weight = _weight_of(module, attribute)
            if weight is not None:
                yield f"{module_name}.{attribute}".removeprefix("."), child, weight.detach()


def _weight_of(module: nn.Module, attribute: str) -> Tensor | None:
    if isinstance(module, QuantWeightBase) and attribute == "weight":
        return None if module.is_packed else module.to_output_first(module.weight, module)
    return module._parameters.get(attribute)


# ---- activations ----------------------------------------------------------------------------------------------------


def _calibrate_activations(model: nn.Module, forward_loop: ForwardLoop | None) -> None:
    direct = {id(member) for _, quantizer, _ in _weights(model) for member in members_of(quantizer)}
    waiting = [q for q in named_members(model) if id(q) not in direct and (q.needs_calibration or q.needs_bias)]
    if forward_loop is None:
        needing = [q.name for q in waiting if _cannot_do_without_data(q)]
        if needing:
            raise DetentError(
                f"{len(needing)} quantizers need data for their static ranges (for instance {needing[0]}): pass a"
                " forward_loop that runs the model on calibration data, or make them dynamic (type: 'dynamic')"
            )
        return
    if not waiting:
        return
    with _observing(model, waiting):
        calls = _run(forward_loop, model)
        unseen = [q.name for q in waiting if not _take_over(q)]
    if len(unseen) == len(waiting) and not calls:
        raise DetentError("the forward_loop never called the model, so there is nothing to calibrate with")
    if unseen:
        raise DetentError(
            f"the calibration data never reached {len(unseen)} quantizers (for instance {', '.join(unseen[:3])});"
            " exclude them in the configuration, make them dynamic, or feed data that uses them"
        )


def _cannot_do_without_data(quantizer: TensorQuantizer) -> bool:
    """Whether a range or bias is still unknown. Dynamic formats under an outer scale can take that from each tensor."""
    needs_range = quantizer.needs_calibration and quantizer.is_static and not quantizer.is_calibrated
    return needs_range or (quantizer.needs_bias and quantizer._bias_value is None)


def _take_over(quantizer: TensorQuantizer) -> bool:
    """Load what a quantizer observed; False if that is nothing."""
    try:
        quantizer.load_calib_amax()
    except DetentError as error:
        if "no data was observed" not in str(error):
            raise
        return False
    return True


def _run(forward_loop: Callable[..., Any], model: nn.Module) -> int:
    """Run the loop, with the model or without an argument, as it takes it; how often it called the model."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hook = model.register_forward_hook(count)
    try:
        with _mask_from_arguments(model):
            if _takes_an_argument(forward_loop):
                forward_loop(model)
            else:
                forward_loop()
    finally:
        hook.remove()
    return calls


def _takes_an_argument(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a function of C without a signature
        return True
    return any(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)


@contextmanager
def _observing(model: nn.Module, observers: list[TensorQuantizer]) -> Iterator[None]:
    """Every quantizer passes its tensor through unquantized; `observers` look at it."""
    quantizing = [q for q in named_members(model) if q._if_quant]
    try:
        for quantizer in quantizing:
            quantizer.disable_quant()
        for quantizer in observers:
            quantizer.enable_calib()
        yield
    finally:
        for quantizer in observers:
            quantizer.disable_calib()
        for quantizer in quantizing:
            quantizer.enable_quant()


@contextmanager
def _mask_from_arguments(model: nn.Module) -> Iterator[None]:
    """Padding never enters statistics: where a call passes an `attention_mask` [batch, seq], its zeros are left out."""
    active: list[ExitStack] = []
    try:
        signature = inspect.signature(model.forward)
    except ValueError:
        signature = inspect.Signature()

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = _mask_argument(signature, args, kwargs) if current_token_mask() is None else None
        stack = ExitStack()
        if mask is not None:
            stack.enter_context(token_mask(mask))
        active.append(stack)

    def after(*_: Any) -> None:
        active.pop().close()

    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        while active:
            active.pop().close()


def _mask_argument(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The `attention_mask` of a call: by keyword, by position, or inside a batch that is passed as a mapping."""
    mask = kwargs.get("attention_mask")
    if mask is None and "attention_mask" in signature.parameters:
        try:
            mask = signature.bind_partial(*args, **kwargs).arguments.get("attention_mask")
        except TypeError:  # the call itself will fail, with a better message
            return None
    if mask is None and args and isinstance(args[0], Mapping):
        mask = args[0].get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


# ---- several processes ----------------------------------------------------------------------------------------------


def _synchronize(model: nn.Module) -> None:
    """Give ranks that see different data, or hold parts of one matrix, the widest range that any of them found."""
    for module in model.modules():
        state = getattr(module, "parallel_state", None) or ParallelState()
        for _, quantizer in quantizers_of(module):
            for member in members_of(quantizer):
                if not (member.is_enabled and member.is_calibrated):
                    continue
                member.sync_amax_across_distributed_group(state.data_parallel_group)
                if member.amax is not None and member.amax.numel() == 1:
                    member.sync_amax_across_distributed_group(state.tensor_parallel_group)
