"""The quantized forms of PyTorch's own modules."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detent.nn.low_rank import add_low_rank
from detent.nn.quant_module import QuantInputBase, QuantLinearConvBase, QuantWeightBase
from detent.nn.registry import QuantModuleRegistry
from detent.nn.tensor_quantizer import TensorQuantizer


@QuantModuleRegistry.register({nn.Linear: "nn.Linear"})
class QuantLinear(QuantLinearConvBase, nn.Linear):
    """`nn.Linear` with quantized input, weight and output."""

    def forward(self, input: Tensor) -> Tensor:
        y = F.linear(self.input_quantizer(input), self.quantized_weight(), self.bias)
        out: Tensor = self.output_quantizer(add_low_rank(self, input, y))
        return out


class _QuantConv(QuantLinearConvBase):
    _conv_forward: Any
    bias: Any

    def forward(self, input: Tensor) -> Tensor:
        x = self.input_quantizer(input)
        out: Tensor = self.output_quantizer(self._conv_forward(x, self.quantized_weight(), self.bias))
        return out


@QuantModuleRegistry.register({nn.Conv1d: "nn.Conv1d"})
class QuantConv1d(_QuantConv, nn.Conv1d):
    """`nn.Conv1d` with quantized input, weight and output."""


@QuantModuleRegistry.register({nn.Conv2d: "nn.Conv2d"})
class QuantConv2d(_QuantConv, nn.Conv2d):
    """`nn.Conv2d` with quantized input, weight and output."""


@QuantModuleRegistry.register({nn.Conv3d: "nn.Conv3d"})
class QuantConv3d(_QuantConv, nn.Conv3d):
    """`nn.Conv3d` with quantized input, weight and output."""


class _QuantConvTranspose(QuantLinearConvBase):
    """Transposed convolutions store ``[in, out / groups, ...]``; scales per channel still belong to outputs."""

    _functional: Any
    _output_padding: Any
    _spatial: int
    stride: Any
    padding: Any
    kernel_size: Any
    dilation: Any
    groups: Any
    bias: Any

    @staticmethod
    def to_output_first(weight: Tensor, module: Any) -> Tensor:
        groups = module.groups
        inputs, outputs, *kernel = weight.shape
        split = weight.reshape(groups, inputs // groups, outputs, *kernel).transpose(1, 2)
        return split.reshape(groups * outputs, inputs // groups, *kernel)

    @staticmethod
    def from_output_first(weight: Tensor, module: Any) -> Tensor:
        groups = module.groups
        outputs, inputs, *kernel = weight.shape
        split = weight.reshape(groups, outputs // groups, inputs, *kernel).transpose(1, 2)
        return split.reshape(groups * inputs, outputs // groups, *kernel)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        x = self.input_quantizer(input)
        padding = self._output_padding(
            x, output_size, self.stride, self.padding, self.kernel_size, self._spatial, self.dilation
        )
        y = type(self)._functional(
            x, self.quantized_weight(), self.bias, self.stride, self.padding, padding, self.groups, self.dilation
        )
        out: Tensor = self.output_quantizer(y)
        return out


@QuantModuleRegistry.register({nn.ConvTranspose1d: "nn.ConvTranspose1d"})
class QuantConvTranspose1d(_QuantConvTranspose, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` with quantized input, weight and output."""

    _functional = staticmethod(F.conv_transpose1d)
    _spatial = 1


@QuantModuleRegistry.register({nn.ConvTranspose2d: "nn.ConvTranspose2d"})
class QuantConvTranspose2d(_QuantConvTranspose, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with quantized input, weight and output."""

    _functional = staticmethod(F.conv_transpose2d)
    _spatial = 2


@QuantModuleRegistry.register({nn.ConvTranspose3d: "nn.ConvTranspose3d"})
class QuantConvTranspose3d(_QuantConvTranspose, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` with quantized input, weight and output."""

    _functional = staticmethod(F.conv_transpose3d)
    _spatial = 3


@QuantModuleRegistry.register({nn.Embedding: "nn.Embedding"})
class QuantEmbedding(QuantWeightBase, nn.Embedding):
    """`nn.Embedding` with quantized weight and output; its input is indices and has no quantizer."""

    def _setup(self) -> None:
        self.weight_quantizer = TensorQuantizer()
        self.output_quantizer = TensorQuantizer()
        self.output_quantizer.disable()

    def forward(self, input: Tensor) -> Tensor:
        weight = self.quantized_weight()
        # PyTorch shortens rows of the table it is given in place. That is for the parameter; rows of a quantized table
        # are shortened as they are read.
        own = weight is self.weight_parameter
        max_norm = self.max_norm if own else None
        rows = F.embedding(
            input, weight, self.padding_idx, max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )
        if self.max_norm is not None and not own:
            norm = rows.detach().norm(self.norm_type, dim=-1, keepdim=True)
            rows = torch.where(norm > self.max_norm, rows * (self.max_norm / (norm + 1e-7)), rows)
        out: Tensor = self.output_quantizer(rows)
        return out


def _register_input_modules() -> None:
    """Modules without a weight matrix whose input can be quantized: pools, batch and instance norms, LeakyReLU."""
    kinds: list[type[nn.Module]] = [nn.LeakyReLU]
    for stem in ("BatchNorm", "InstanceNorm", "MaxPool", "AvgPool", "AdaptiveAvgPool"):
        kinds += [getattr(nn, f"{stem}{n}d") for n in (1, 2, 3)]
    for kind in kinds:
        quantized = type(f"Quant{kind.__name__}", (QuantInputBase, kind), {"__module__": __name__})
        quantized.__doc__ = f"`nn.{kind.__name__}` with quantized input, and output where enabled."
        globals()[quantized.__name__] = quantized  # importable by name, so that pickling and deepcopy find it
        QuantModuleRegistry.register({kind: f"nn.{kind.__name__}"})(quantized)


_register_input_modules()
