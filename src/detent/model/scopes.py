"""Context managers that put a model into a state for a while: quantizers off or observing, evaluation, no cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from detent.model.conversion import named_members
from detent.nn import TensorQuantizer


@contextmanager
def quantizers_off(quantizers: Sequence[TensorQuantizer]) -> Iterator[None]:
    """No quantizer of these rounds anything inside the block; their scales and rotations still work."""
    with ExitStack() as stack:
        for quantizer in quantizers:
            if quantizer.is_quantizing:
                quantizer.disable_quant()
                stack.callback(quantizer.enable_quant)
        yield


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Language models keep no keys and values of earlier calls inside the block."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before is None:
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = before


@contextmanager
def observing(model: nn.Module, observers: Sequence[TensorQuantizer]) -> Iterator[None]:
    """Every quantizer passes its tensor through unquantized; `observers` look at it."""
    with quantizers_off(list(named_members(model))):
        try:
            for quantizer in observers:
                quantizer.enable_calib()
            yield
        finally:
            for quantizer in observers:
                quantizer.disable_calib()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; afterwards each of its modules has its train flag back."""
    flags = [(module, module.training) for module in model.modules()]
    if any(training for _, training in flags):
        model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
