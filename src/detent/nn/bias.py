"""The bias of affine quantization: what is subtracted from a tensor before it is quantized and added back after.

A configuration names the axes that one bias covers, as `block_sizes` names the axes that one scale covers:
``{-2: None, -4: None}`` on keys [batch, heads, seq, dim] gives one bias for each head and channel. Invariant: a bias
has the rank of the tensor, with length 1 along the axes that it covers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from detent.errors import DetentError, NothingObserved


def is_static(bias: Mapping[Any, Any] | None) -> bool:
    """Whether a bias is found once, from data, instead of being recomputed for each tensor."""
    return bool(bias) and bias is not None and bias.get("type", "static") == "static"


class BiasObserver:
    """Gathers the bias, and the range of what remains when it is off, over all batches.

    Per cell (the elements that share one bias) it keeps sum, count, smallest and largest value, so that the range is
    exact however the bias moves from batch to batch.
    """

    def __init__(self, bias: Mapping[Any, Any]) -> None:
        self._axes = [axis for axis in bias if isinstance(axis, int)]
        self._midrange = bias.get("method", "mean") == "max_min"
        self._sum: Tensor | None = None
        self._low = self._high = torch.zeros(())
        self._count = 0

    def observe(self, x: Tensor) -> None:
        """Take in one tensor of finite values; an empty one changes nothing."""
        if x.numel() == 0:
            return
        axes = self._positions(x)
        x = x.detach()
        total = x.double().sum(axes, keepdim=True)
        low, high = x.amin(axes, keepdim=True).float(), x.amax(axes, keepdim=True).float()
        if self._sum is None:
            self._sum, self._low, self._high = total, low, high
        elif self._sum.shape != total.shape:
            raise DetentError(
                f"a static bias needs one shape in every batch, but saw {tuple(self._sum.shape)} and"
                f" {tuple(total.shape)}; let it cover the axis that varies, or use bias type 'dynamic'"
            )
        else:
            self._sum = self._sum + total
            self._low, self._high = torch.minimum(self._low, low), torch.maximum(self._high, high)
        self._count += x.numel() // total.numel()

    def value(self) -> Tensor:
        """The bias, float32: the mean of each cell, or the middle between its smallest and largest value.

        Raises:
            NothingObserved: no data was seen.
        """
        if self._sum is None:
            raise NothingObserved("no data was observed")
        if self._midrange:
            return ((self._low.double() + self._high.double()) / 2).float()
        return (self._sum / self._count).float()

    def centred_range(self) -> tuple[Tensor, Tensor]:
        """(smallest, largest) value of the whole tensor after the bias is subtracted, float32 scalars."""
        bias = self.value()
        return (self._low - bias).amin(), (self._high - bias).amax()

    def _positions(self, x: Tensor) -> list[int]:
        wrong = [axis for axis in self._axes if not -x.dim() <= axis < x.dim()]
        if wrong:
            raise DetentError(f"bias names axis {wrong[0]}, but the tensor has shape {tuple(x.shape)}")
        return sorted({axis % x.dim() for axis in self._axes})


def bias_of(bias: Mapping[Any, Any], x: Tensor) -> Tensor:
    """The bias of a single tensor, float32."""
    observer = BiasObserver(bias)
    observer.observe(x)
    return observer.value()
