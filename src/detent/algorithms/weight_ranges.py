"""Ranges of weight quantizers from the weights alone."""

from __future__ import annotations

from collections.abc import Container, Iterator

from torch import Tensor, nn

from detent.algorithms.mse import least_error_range
from detent.algorithms.registry import handler_of
from detent.config import QuantizeAlgorithmConfig
from detent.errors import DetentError
from detent.formats import FloatScale, PowerOfTwoScale, SearchedScale
from detent.formats.checks import all_finite
from detent.nn import QuantWeightBase, TensorQuantizer, quantizers_of
from detent.nn.sequential import Quantizer, members_of
from detent.notices import notify


def calibrate_weight(
    name: str,
    quantizer: Quantizer,
    weight: Tensor,
    config: QuantizeAlgorithmConfig | None,
    *,
    skip_first: bool = False,
) -> None:
    """Give a weight's quantizer its range, each member of a sequence on what the ones before it leave.

    Args:
        name: of the weight, for messages.
        quantizer: its quantizer.
        weight: output channels first.
        config: of an algorithm that searches ranges from weights alone; anything else takes the largest magnitude.
        skip_first: leave the first member as it is.

    Raises:
        DetentError: NaN or infinity in the weight.
    """
    if not all_finite(weight):
        raise DetentError(f"{name}: NaN or infinity in the weight; check the checkpoint")
    members = members_of(quantizer)
    for index, member in enumerate(members):
        if not (skip_first and index == 0) and (member.needs_calibration or member.needs_bias):
            member.calibrate_on(weight)
            _improve(member, member.centred(member.transform(weight)), config)
        if index + 1 < len(members):
            output = member(weight)
            assert isinstance(output, Tensor)
            weight = output


def _improve(quantizer: TensorQuantizer, weight: Tensor, config: QuantizeAlgorithmConfig | None) -> None:
    """From the range of round-to-nearest to the one that the algorithm and the format ask for."""
    handler, fmt = None if config is None else handler_of(config), quantizer.format
    rule = fmt.scale
    if fmt.dynamic or not isinstance(rule, FloatScale):
        if handler is not None and handler.searches_weights:
            assert config is not None
            reason = "dynamic scales follow from the largest magnitude"
            if isinstance(rule, PowerOfTwoScale):
                reason = "scales that are powers of two follow from the largest magnitude"
            elif isinstance(rule, SearchedScale):
                reason = "its scales are those of least squared error anyway"
            notify(f"{config.method} changed nothing for {fmt}: {reason}")
        return
    if rule.outer:
        quantizer.global_amax = weight.abs().amax()
    found = handler.range_of(config, weight, fmt) if handler is not None and quantizer.needs_calibration else None
    if found is not None:
        quantizer.set_range(*found)
    elif rule.four_over_six:  # an amax of 6/4 is what maps the largest magnitude to 4
        quantizer.set_range(*least_error_range(weight, fmt, [1.5]))


def weight_quantizers(model: nn.Module, but: Container[int] = ()) -> Iterator[tuple[str, Quantizer, Tensor]]:
    """(name, quantizer, weight with output channels first) for each enabled ``X_quantizer`` of a weight ``X``.

    Args:
        model: with quantizers.
        but: ids of modules whose own weights are left out.
    """
    for module_name, module in model.named_modules():
        for child_name, child in quantizers_of(module) if id(module) not in but else ():
            attribute = child_name.removesuffix("_quantizer")
            if child.is_enabled and attribute != child_name and (weight := _weight_of(module, attribute)) is not None:
                yield f"{module_name}.{attribute}".removeprefix("."), child, weight.detach()


def quantized_weights(model: nn.Module, but: Container[int] = ()) -> Iterator[tuple[str, Quantizer, Tensor]]:
    """`weight_quantizers`, for use of the weights' values.

    Raises:
        DetentError: a weight without values (meta device, offloaded).
    """
    for name, quantizer, weight in weight_quantizers(model, but):
        if weight.is_meta:
            raise DetentError(
                f"{name}: the weight has no values (meta device), so there is nothing to calibrate on; load the"
                " model, without offloading, before quantizing it"
            )
        yield name, quantizer, weight


def _weight_of(module: nn.Module, attribute: str) -> Tensor | None:
    if isinstance(module, QuantWeightBase) and attribute == "weight":
        return None if module.is_packed else module.to_output_first(module.weight, module)
    return module._parameters.get(attribute)
