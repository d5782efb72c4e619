"""Quantizers switched off for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from detent.nn import TensorQuantizer


@contextmanager
def off(quantizers: Sequence[TensorQuantizer]) -> Iterator[None]:
    """No quantizer of these rounds anything inside the block; their scales and rotations still work."""
    with ExitStack() as stack:
        for quantizer in quantizers:
            if quantizer._if_quant:
                quantizer.disable_quant()
                stack.callback(quantizer.enable_quant)
        yield
