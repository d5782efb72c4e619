"""What is asked for of mixtures of experts in particular."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from detent.config import Scheme
from detent.errors import DetentError
from detent.formats import Format
from detent.nn.experts import QuantExperts
from detent.structure import Structure


def second_step(structure: Structure | None, scheme: Scheme, fmt: Format) -> Iterator[dict[str, Any]]:
    """The rules that encode the codes of the weights of experts once more.

    Args:
        structure: of the model. scheme: that gives the weights of experts their codes. fmt: of the second step.

    Raises:
        DetentError: there are no experts; the codes aren't those of an FP8 format with one scale; `fmt` can't encode
            them.
    """
    where = "moe_experts_second_step_config"
    mixtures = () if structure is None else structure.mixtures
    if not mixtures:
        raise DetentError(f"{where}: the model has no mixture of experts")
    try:
        both = None if scheme.weight is None else replace(fmt, base=scheme.weight)
    except DetentError as error:
        raise DetentError(f"{where}: {error}; it goes with a scheme such as w_fp8_a_fp8") from None
    if both is None:
        raise DetentError(f"{where}: {scheme.name} leaves weights in floating point")
    for mixture in mixtures:
        name = f"{mixture.module}.*weight_quantizer"
        yield {"quantizer_name": name, "parent_class": "nn.Linear", "cfg": {"format": both}}


def check_every_token(model: nn.Module) -> None:
    """Raise DetentError unless every expert can be shown every token: not where a model routes them itself."""
    experts = [module for module in model.modules() if isinstance(module, QuantExperts)]
    if not experts or not all(module.layout.routed for module in experts):
        raise DetentError(
            f"calibrate_all_experts: {type(model).__name__} has no experts that are told which tokens are theirs, as"
            " those of most models are; leave the option out"
        )
