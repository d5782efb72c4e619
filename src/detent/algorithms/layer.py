"""A quantized layer as algorithms see it: a matrix [out, in], whatever the module, and the rows that it multiplies.

A convolution is the matrix of its flattened kernels, and the rows are the patches of its input.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detent.formats import Format, Scales
from detent.model import edit
from detent.nn import QuantWeightBase, TensorQuantizer
from detent.nn.sequential import members_of

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Layer:
    """One module with a quantized weight, at work.

    Attributes:
        name: in the model. module: itself.
        shared: whether its weight is tied to another module, which keeps it when this one's changes.
    """

    name: str
    module: QuantWeightBase
    shared: bool = False

    @property
    def quantizer(self) -> TensorQuantizer:
        """The weight quantizer, or the first of several in sequence: the one whose codes algorithms choose."""
        return members_of(self.module.weight_quantizer)[0]

    @property
    def input_quantizer(self) -> TensorQuantizer | None:
        """The input quantizer, on or off, or None where the module has none (or several in sequence)."""
        quantizer = getattr(self.module, "input_quantizer", None)
        return quantizer if isinstance(quantizer, TensorQuantizer) else None

    @property
    def format(self) -> Format:
        return self.quantizer.format

    @property
    def has_rows(self) -> bool:
        """Whether its input can be laid out as rows that its matrix multiplies."""
        module: Any = self.module
        if isinstance(module, nn.Linear):
            return True
        return isinstance(module, _CONVOLUTIONS) and module.groups == 1

    @property
    def weight(self) -> Tensor:
        """The module's weight, output channels first."""
        return self.module.to_output_first(self.module.weight, self.module)

    @property
    def width(self) -> int:
        """Columns of the matrix."""
        return math.prod(self.weight.shape[1:])

    @property
    def channels(self) -> int:
        """Channels of the input; each has ``width / channels`` columns, one after the other."""
        return int(self.weight.shape[1])

    def columns(self, per_channel: Tensor) -> Tensor:
        """One value per channel as one per column."""
        return per_channel.repeat_interleave(self.width // self.channels)

    def matrix(self) -> Tensor:
        """The weight, float32 [out, width]."""
        return self.weight.detach().to(torch.float32).reshape(-1, self.width)

    def set_matrix(self, matrix: Tensor) -> None:
        """Replace the weight's values; a module that it is tied to keeps the old ones.

        Raises:
            DetentError: the weight is computed or packed.
        """
        value = self.module.from_output_first(matrix.reshape(self.weight.shape), self.module)
        edit.put(self.module, "weight", value, self.name, untie=self.shared)

    def rows(self, x: Tensor) -> Tensor:
        """The input [..., channels], or of a convolution [batch, channels, ...], as rows [tokens, width]."""
        module: Any = self.module
        if isinstance(module, nn.Linear):
            return x.reshape(-1, x.shape[-1])
        spatial = len(module.kernel_size)
        if x.dim() == spatial + 1:
            x = x.unsqueeze(0)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, _padding(module), mode=mode)
        for axis, (size, stride, dilation) in enumerate(
            zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
        ):
            x = x.unfold(axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
        order = [0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial)]
        return x.permute(order).reshape(-1, self.width)

    # ---- scales, in the grid of the matrix --------------------------------------------------------------------------

    def grid(self) -> tuple[int, ...]:
        """The shape that the format's scales have for the matrix."""
        return self.format.granularity.grid((self.weight.shape[0], self.width))

    def scales(self) -> Scales:
        """The scales in use, in the grid of the matrix: calibrated ones, or those that the weight asks for."""
        scales = self.quantizer.quantize_to_codes(self.quantizer.centred(self.weight.detach())).scales
        return _in_grid(scales, self.grid())

    def set_scales(self, scales: Scales) -> None:
        """Use these scales from now on."""
        grid = self.format.granularity.grid(tuple(self.weight.shape))
        self.quantizer.load_scales(_in_grid(scales, grid))
        self.module.refresh_weight()


def _in_grid(scales: Scales, grid: tuple[int, ...]) -> Scales:
    zero_point = scales.zero_point
    return Scales(
        scales.scale.reshape(grid), None if zero_point is None else zero_point.reshape(grid), scales.outer_scale
    )


def _padding(module: Any) -> list[int]:
    """For `F.pad`: the last axis first, both sides of each."""
    if isinstance(module.padding, str):
        return list(module._reversed_padding_repeated_twice)
    return [n for size in reversed(module.padding) for n in (size, size)]


def layers_of(model: nn.Module) -> list[Layer]:
    """Every layer whose weight is quantized and can be changed."""
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    return [
        Layer(name, module, shared=uses[id(module.weight_parameter)] > 1)
        for name, module in model.named_modules()
        if isinstance(module, QuantWeightBase)
        and module.weight_parameter is not None
        and module.weight_parameter.dim() > 1
        and not isinstance(module, nn.Embedding)
        and module.weight_quantizer.is_enabled
    ]
