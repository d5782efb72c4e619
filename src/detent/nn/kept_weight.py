"""A quantized weight that is used again as long as neither the weight nor its quantizer has changed.

PyTorch counts changes of a tensor, so optimizer steps, `load_state_dict` and edits under `no_grad` are seen by that
count. Edits through ``weight.data`` are not counted. Code that makes one either just read the weight
from its module (then all of it is compared once with what it was) or kept a reference (for those edits a sample of the
weight is compared on every call, which sees all but edits of a few single elements).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from detent.nn.calibrated_state import stamp
from detent.nn.sequential import Quantizer

#: About the number of elements along an axis that the sample has; the first two axes are sampled.
_SAMPLE = 16


class KeptWeight:
    """`value`, made from `weight` by `quantizer` as they are now."""

    def __init__(self, weight: Tensor, quantizer: Quantizer, value: Tensor) -> None:
        self.value = value
        self._key = _key(weight, quantizer)
        # Alive, so that no other tensor gets their addresses.
        self._held = [weight.detach(), *quantizer.state_tensors()]
        self._sample = _sample(weight).clone()
        self._sums = _sums(weight)

    def is_current(self, weight: Tensor, quantizer: Quantizer, handed_out: bool) -> bool:
        """Whether `value` still is what quantizing would give.

        Args:
            weight, quantizer: as they are now.
            handed_out: whether code may have changed the weight without PyTorch noticing since the last check.
        """
        if self._key != _key(weight, quantizer) or not torch.equal(_sample(weight), self._sample):
            return False
        return not handed_out or all(torch.equal(a, b) for a, b in zip(_sums(weight), self._sums, strict=True))


def _key(weight: Tensor, quantizer: Quantizer) -> tuple[Any, ...]:
    return (stamp(weight), weight.dtype, weight.device, weight.shape, quantizer.state_key())


def _sample(weight: Tensor) -> Tensor:
    steps = [max(1, size // _SAMPLE) for size in weight.shape[:2]] + [max(1, size) for size in weight.shape[2:]]
    return weight.detach()[tuple(slice(None, None, step) for step in steps)]


def _sums(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the bit patterns along rows and along columns."""
    dtypes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = weight.detach().contiguous().view(dtypes[weight.element_size()])
    rows = bits.reshape(bits.shape[0], -1) if bits.dim() > 1 else bits.reshape(1, -1)
    return rows.sum(0, dtype=torch.int64), rows.sum(1, dtype=torch.int64)
