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
from detent.formats.exporting import exporting
from detent.nn import onnx_constants, onnx_nodes
from detent.nn.kept_weight import KeptWeight
from detent.nn.packed_weight import pack_codes, packed_layout, unpack_codes
from detent.nn.sequential import Quantizer, SequentialQuantizer, members_of
from detent.nn.tensor_quantizer import TensorQuantizer


class QuantModule(nn.Module):
    """Base of quantized modules. A subclass creates its quantizers in `_setup` and calls them in `forward`.

    `detent.register` has an example.

    Example:
        >>> import torch, detent
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> detent.replace_quant_module(model)
        >>> isinstance(model[0], detent.QuantModule)
        True
    """

    parallel_state: ParallelState

    def _setup(self) -> None:
        raise DetentError(
            f"{type(self).__name__} has no _setup method; it must create the quantizers that forward calls"
        )

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module. That of an ONNX exporter is where weights are made ready for its graph, as codes."""
        if onnx_constants.preparing():
            self._prepare_for_onnx()
        return super().named_modules(*args, **kwargs)

    @torch.no_grad()
    def _prepare_for_onnx(self) -> None:
        for name, quantizer in quantizers_of(self):
            parameter = self._parameters.get(name.removesuffix("_quantizer"))
            member = next((member for member in members_of(quantizer) if member.is_enabled), None)
            if parameter is None or member is None or not member.is_quantizing or parameter.is_meta:
                continue
            kept: KeptWeight | None = self.__dict__.get(f"_kept_{name}")
            ready = onnx_constants.prepared(member)
            if ready is None or kept is None or not kept.is_current(parameter, quantizer, handed_out=True):
                self.__dict__[f"_kept_{name}"] = KeptWeight(parameter, quantizer, parameter)
                onnx_constants.prepare_weight(member, self._codes_of(parameter, quantizer, member))

    def _codes_of(self, parameter: Tensor, quantizer: Quantizer, member: TensorQuantizer) -> QTensor:
        """The codes that `member`, the first of a quantizer's that is on, makes of a parameter."""
        weight = self.to_output_first(parameter, self) if isinstance(self, QuantWeightBase) else parameter
        for before in members_of(quantizer):
            if before is member:
                break
            weight = before(weight)
        return member.quantize_to_codes(member.centred(member.transform(weight)))


class QuantInputBase(QuantModule):
    """A module whose input and output are quantized (the output only when enabled)."""

    def _setup(self) -> None:
        self.input_quantizer = TensorQuantizer()
        self.output_quantizer = TensorQuantizer()
        self.output_quantizer.disable()

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = super().forward(self.input_quantizer(input), *args, **kwargs)
        if isinstance(y, tuple):  # a pool that returns indices as well
            return (self.output_quantizer(y[0]), *y[1:])
        return self.output_quantizer(y)


class QuantWeightBase(QuantModule):
    """A module with a quantized weight.

    The weight lives in one of three forms: the float parameter; after `pack_weight`, buffers with packed codes and
    scales, from which ``module.weight`` is dequantized each time it is asked for; or a tensor that PyTorch computes
    from other parameters (`torch.nn.utils.parametrize`, weight norm). While it is a parameter that cannot change (eval
    mode and no gradient needed) its quantized value is kept and used again until the parameter or the quantizer
    changes.
    """

    weight_quantizer: Quantizer
    #: Whether the float parameter was asked for from outside since its quantized value was last made or used.
    weight_handed_out = False
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

    # ---- where the weight lives -------------------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """The float weight: the parameter, or the values of the packed codes, or what PyTorch computes. During the call
        of a forward that reads it there: the quantized one."""
        if (in_use := self.__dict__.get("weight_in_use")) is not None:
            return in_use  # type: ignore[no-any-return]
        parameter = self._parameters.get("weight")
        if parameter is not None:
            self.__dict__["weight_handed_out"] = True
            return parameter
        packed = self.packed_weight
        if packed is not None:
            return self.from_output_first(decode(packed, self._packed_dtype), self)
        inherited: Tensor | None = self.__dict__.get("weight")
        if inherited is None:
            inherited = getattr(super(), "weight", None)
        if inherited is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute 'weight'")
        return inherited

    @weight.setter
    def weight(self, value: Tensor) -> None:
        # nn.Module keeps parameters to itself; this is for hooks that compute the weight before each call.
        self.__dict__["weight"] = value

    @property
    def weight_parameter(self) -> nn.Parameter | None:
        """The float parameter, or None where the weight lives in another form."""
        return self._parameters.get("weight")

    @property
    def packed_weight(self) -> QTensor | None:
        """The codes that hold the weight (output channels first), or None while it is a float tensor."""
        fmt: Format | None = self.__dict__.get("_packed_format")
        if fmt is None:
            return None
        fields = {n.removeprefix(self._PACKED): t for n, t in self._buffers.items() if n.startswith(self._PACKED)}
        return unpack_codes(fields, fmt, self._packed_shape)  # type: ignore[arg-type]

    @property
    def is_packed(self) -> bool:
        """Whether the weight is held as codes."""
        return self.__dict__.get("_packed_format") is not None

    def pack_weight(self, packed: QTensor, dtype: torch.dtype) -> None:
        """Hold the weight as codes from now on; its parameter is dropped and its weight quantizer switched off.

        Args:
            packed: the codes, output channels first.
            dtype: what they are dequantized to.
        """
        self.expect_packed(packed.format, tuple(packed.shape), dtype)
        for name, tensor in pack_codes(packed).items():
            self.register_buffer(self._PACKED + name, tensor)
        quantizer = self.weight_quantizer
        quantizer.disable()
        for member in quantizer.modules():
            if isinstance(member, TensorQuantizer):
                member.reset_amax()

    def expect_packed(self, fmt: Format, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Become a module whose weight is packed, its codes still to come with a `state_dict`."""
        self.refresh_weight()
        self._parameters.pop("weight", None)
        self._packed_format, self._packed_shape, self._packed_dtype = fmt, shape, dtype

    def _prepare_for_onnx(self) -> None:
        super()._prepare_for_onnx()
        packed = self.packed_weight
        if packed is not None and not packed.codes.is_meta:
            onnx_constants.prepare_weight(members_of(self.weight_quantizer)[0], packed)

    # ---- the weight in use ------------------------------------------------------------------------------------------

    def refresh_weight(self) -> None:
        """Forget the kept quantized weight."""
        self.__dict__.pop("_kept_weight", None)

    def quantized_weight(self) -> Tensor:
        """The weight as the forward pass uses it."""
        if self.is_packed:
            first = members_of(self.weight_quantizer)[0]
            if onnx_nodes.in_graph() and (ready := onnx_constants.prepared(first)) is not None:
                values = onnx_nodes.weight_in_graph(self._packed_format, ready)
                return self.from_output_first(values.to(self._packed_dtype), self)
            return self.weight
        quantizer = self.weight_quantizer
        parameter = self.weight_parameter
        if parameter is None:
            return self.quantize_weight(self.weight)
        if not quantizer.transforms:
            return parameter
        may_change = self.training or (torch.is_grad_enabled() and parameter.requires_grad)
        if may_change or torch.compiler.is_compiling() or exporting() or _is_observing(quantizer):
            return self.quantize_weight(parameter)
        handed_out, self.__dict__["weight_handed_out"] = self.weight_handed_out, False
        kept: KeptWeight | None = self.__dict__.get("_kept_weight")
        if kept is None or not kept.is_current(parameter, quantizer, handed_out):
            # A tensor made in inference mode could not take part in a later backward pass.
            with torch.inference_mode(False), torch.no_grad():
                kept = KeptWeight(parameter, quantizer, self.quantize_weight(parameter))
            self.__dict__["_kept_weight"] = kept
        return kept.value

    def quantize_weight(self, weight: Tensor) -> Tensor:
        """`weight` through the weight quantizer, output channels first on the way."""
        y = self.weight_quantizer(self.to_output_first(weight, self))
        return self.from_output_first(decode(y, weight.dtype) if isinstance(y, QTensor) else y, self)

    # ---- what modules do --------------------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """A packed weight follows a model to another device; another dtype changes what it is dequantized to."""
        self.refresh_weight()
        before = {name: t for name, t in self._buffers.items() if name.startswith(self._PACKED) and t is not None}
        parent: Any = super()  # torch doesn't annotate its types
        parent._apply(fn, recurse)
        for name, tensor in before.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        if self.is_packed:
            self._packed_dtype = fn(torch.empty(0, dtype=self._packed_dtype)).dtype
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):  # type: ignore[no-untyped-def]
        """Buffers of a packed weight that came with a description but without tensors are created here: those that its
        format asks for, whatever the `state_dict` brings."""
        if self.is_packed:
            for field, (shape, dtype) in packed_layout(self._packed_format, self._packed_shape).items():
                name = self._PACKED + field
                value = state_dict.get(prefix + name)
                if value is not None and value.dtype != dtype:
                    errors.append(f"{prefix}{name} is {value.dtype}, but its format has {dtype}")
                if self._buffers.get(name) is None:
                    device = None if value is None else value.device
                    self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_kept_weight"}


def _is_observing(quantizer: Quantizer) -> bool:
    return any(isinstance(q, TensorQuantizer) and q.is_observing for q in quantizer.modules())


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


def check_module(model: Any) -> nn.Module:
    """`model`, which must be a module. Raises DetentError saying what it is instead."""
    if isinstance(model, nn.Module):
        return model
    what = f"the class {model.__name__}; make an instance of it" if isinstance(model, type) else type(model).__name__
    raise DetentError(f"model: a torch.nn.Module, not {what}")
