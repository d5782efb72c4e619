"""What all quantized modules share: turning a module into its quantized class in place, and the weight they use.

Invariant: a quantized module has the parameters, buffers, hooks and identity of the module it came from; only its class
and its quantizers are new. With every quantizer off its forward computes what the original did.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from detent.distributed import ParallelState
from detent.errors import DetentError
from detent.formats import Format, QTensor, decode
from detent.nn.tensor_quantizer import SequentialQuantizer, TensorQuantizer

Quantizer = TensorQuantizer | SequentialQuantizer


class QuantModule(nn.Module):
    """Base of quantized modules. A subclass creates its quantizers in `_setup` and calls them in `forward`."""

    parallel_state: ParallelState

    def _setup(self) -> None:
        raise DetentError(f"{type(self).__name__} defines no _setup, which has to create its quantizers")


class QuantInputBase(QuantModule):
    """A module whose input and output are quantized (the output only when enabled)."""

    def _setup(self) -> None:
        self.input_quantizer = TensorQuantizer()
        self.output_quantizer = TensorQuantizer()
        self.output_quantizer.disable()

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.output_quantizer(super().forward(self.input_quantizer(input), *args, **kwargs))


class QuantWeightBase(QuantModule):
    """A module with a quantized weight.

    The weight lives in one of two forms: the float parameter, or, after `pack_weight`, buffers with the codes and
    scales,
    from which ``module.weight`` is dequantized each time it is asked for. While it is a parameter that cannot change
    (eval mode and no gradient wanted) its quantized value is kept and used again until the parameter or the quantizer
    changes. An edit through ``weight.data[...] = ...`` is the one change that PyTorch does not count; `refresh_weight`
    forgets the kept value.
    """

    weight_quantizer: Quantizer
    #: Buffers of a packed weight, by the field of `QTensor` that they hold.
    _PACKED = "_packed_"

    @staticmethod
    def to_output_first(weight: Tensor, module: Any) -> Tensor:
        """The weight with its output channels along axis 0, which per-channel scales rely on."""
        return weight

    @staticmethod
    def from_output_first(weight: Tensor, module: Any) -> Tensor:
        """The inverse of `to_output_first`."""
        return weight

    @property
    def weight(self) -> Tensor:
        """The float weight: the parameter, or the values of the packed codes."""
        parameter = self._parameters.get("weight")
        if parameter is not None:
            return parameter
        packed = self.packed_weight
        if packed is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute 'weight'")
        return self.from_output_first(decode(packed, self._packed_dtype), self)

    @property
    def packed_weight(self) -> QTensor | None:
        """The codes that hold the weight (output channels first), or None while it is a float parameter."""
        fmt: Format | None = self.__dict__.get("_packed_format")
        if fmt is None:
            return None
        fields = {n.removeprefix(self._PACKED): t for n, t in self._buffers.items() if n.startswith(self._PACKED)}
        return QTensor(fmt, self._packed_shape, **fields)  # type: ignore[arg-type]

    def pack_weight(self, packed: QTensor, dtype: torch.dtype) -> None:
        """Hold the weight as codes from now on; its parameter is dropped and its weight quantizer switched off."""
        self._drop_float_weight()
        self._packed_format, self._packed_shape, self._packed_dtype = packed.format, tuple(packed.shape), dtype
        for name, tensor in packed.tensors().items():
            self.register_buffer(self._PACKED + name, tensor)
        self.weight_quantizer.disable()

    def _drop_float_weight(self) -> None:
        self.refresh_weight()
        if "weight" in self._parameters:
            del self._parameters["weight"]

    def refresh_weight(self) -> None:
        """Forget the kept quantized weight."""
        self.__dict__.pop("_kept_weight", None)

    def quantized_weight(self) -> Tensor:
        """The weight as the forward pass uses it."""
        parameter = self._parameters.get("weight")
        if parameter is None:
            return self.weight
        quantizer = self.weight_quantizer
        if not _acts(quantizer):
            return parameter
        if self.training or (torch.is_grad_enabled() and parameter.requires_grad) or torch.compiler.is_compiling():
            return self.quantize_weight(parameter)
        key = (parameter.data_ptr(), parameter._version, parameter.dtype, parameter.device, quantizer.state_key())
        kept = self.__dict__.get("_kept_weight")
        if kept is None or kept[0] != key:
            with torch.no_grad():
                kept = (key, self.quantize_weight(parameter))
            self.__dict__["_kept_weight"] = kept
        return kept[1]

    def quantize_weight(self, weight: Tensor) -> Tensor:
        """`weight` through the weight quantizer, output channels first on the way."""
        return self.from_output_first(self.weight_quantizer(self.to_output_first(weight, self)), self)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_kept_weight"}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        from copy import deepcopy

        copy = self.__class__.__new__(self.__class__)
        memo[id(self)] = copy
        copy.__dict__ = {k: deepcopy(v, memo) for k, v in self.__getstate__().items()}
        return copy


def _acts(quantizer: Quantizer) -> bool:
    """Whether calling the quantizer does anything."""
    members = list(quantizer) if isinstance(quantizer, SequentialQuantizer) else [quantizer]
    return any(isinstance(q, TensorQuantizer) and q.transforms for q in members)


class QuantLinearConvBase(QuantWeightBase):
    """Input, weight and output quantizers around a linear or convolution."""

    def _setup(self) -> None:
        self.input_quantizer = TensorQuantizer()
        self.weight_quantizer = TensorQuantizer()
        self.output_quantizer = TensorQuantizer()
        self.output_quantizer.disable()


def quantizers_of(module: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """(attribute name, quantizer) of the quantizers that belong to `module` itself, sequences as one."""
    for name, child in module.named_children():
        if isinstance(child, (TensorQuantizer, SequentialQuantizer)):
            yield name, child
