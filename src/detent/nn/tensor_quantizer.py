"""`TensorQuantizer`: a module that applies one format to one tensor of a model.

Invariants: a quantizer is off, observing, or quantizing (or observing and quantizing at once); its whole state is plain
tensors (buffers in `state_dict`) and the JSON of its attributes; loading a `state_dict` restores what was calibrated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from detent.config.attributes import QuantizerAttributeConfig, RotateConfig, merged
from detent.errors import DetentError
from detent.formats import FloatScale, Format, QTensor, all_finite, encode, fake_quantize, per_tensor
from detent.formats.exporting import exporting
from detent.nn import onnx_constants, onnx_nodes
from detent.nn.backends import run_backend
from detent.nn.bias import BiasObserver, bias_of, is_static
from detent.nn.calibrated_state import CalibratedState, is_plain, kind_of
from detent.nn.hadamard import hadamard_transform
from detent.nn.observers import NOT_FINITE, MinMaxObserver, Observer, make_observer
from detent.padding import drop_padding

#: Copied, never handed out: a copy costs a tenth of a new one.
_DEFAULT = QuantizerAttributeConfig()


class TensorQuantizer(CalibratedState):
    """Applies one number format to the tensor it is called with.

    Args:
        quant_attribute_cfg: a `QuantizerAttributeConfig` or its dict; None gives the defaults (8 bits, per tensor).
        if_quant: quantize when called.
        if_calib: observe when called.
        amax: the range to start with.

    Calling it with ``x`` [...] returns a tensor of the same shape and dtype: ``x * pre_quant_scale``, rotated where
    asked for, then ``decode(encode(.))``, or a `QTensor` of codes where `fake_quant` is False. Without a calibrated
    range a static quantizer takes the range of the tensor at hand.

    Raises:
        DetentError: NaN or infinity in the tensor; a range whose shape doesn't fit the tensor.

    Example:
        >>> import torch
        >>> from detent import TensorQuantizer
        >>> quantizer = TensorQuantizer({"num_bits": 4}, amax=7.0)
        >>> quantizer(torch.tensor([0.4, 2.6, 9.0]))
        tensor([0., 3., 7.])
    """

    #: The axis of tokens, where it isn't axis 1: observers then leave padding out along it.
    token_axis: int | None = None

    _if_quant: bool
    _if_calib: bool
    _observer: Observer | None
    _bias_observer: BiasObserver | None

    def __init__(
        self,
        quant_attribute_cfg: QuantizerAttributeConfig | dict[str, Any] | None = None,
        if_quant: bool = True,
        if_calib: bool = False,
        amax: Tensor | float | None = None,
    ) -> None:
        super().__init__()
        self._put(name="tensor", _if_quant=if_quant, _if_calib=if_calib, _observer=None, _bias_observer=None)
        self.set_from_attribute_config(_DEFAULT.model_copy() if quant_attribute_cfg is None else quant_attribute_cfg)
        if amax is not None:
            self.amax = amax

    # ---- attributes -------------------------------------------------------------------------------------------------

    def set_from_attribute_config(self, attributes: QuantizerAttributeConfig | Mapping[str, Any]) -> None:
        """Set attributes. A calibrated range stays only if the format, and so the range's shape, stays.

        Args:
            attributes: a dictionary sets what it names and leaves the other attributes as they are; a
                `QuantizerAttributeConfig` replaces all of them.

        Raises:
            DetentError: attributes that aren't valid; the quantizer is then as it was.

        Example:
            >>> from detent import TensorQuantizer
            >>> quantizer = TensorQuantizer({"num_bits": 8, "axis": 0})
            >>> quantizer.set_from_attribute_config({"num_bits": 4})
            >>> quantizer.num_bits, quantizer.axis
            (4, 0)
        """
        before = (self._format, self.attributes.bias) if hasattr(self, "_format") else None
        attributes = merged(self.attributes if before else _DEFAULT, attributes)
        fmt = attributes.to_format()
        self._put(attributes=attributes, _format=fmt.as_dynamic() if attributes.dynamic_blocks else fmt)
        if before is not None and before != (self._format, attributes.bias):
            self.reset_amax()
        self._changed()

    @property
    def format(self) -> Format:
        """The number format in use."""
        return self._format

    @format.setter
    def format(self, fmt: Format) -> None:
        keep = ("fake_quant", "calibrator", "rotate", "pass_through_bwd", "backend", "backend_extra_args", "bias")
        portable = {name: getattr(self.attributes, name) for name in keep}
        self.set_from_attribute_config(QuantizerAttributeConfig(**portable, format=fmt, enable=self.is_enabled))

    @property
    def num_bits(self) -> int | tuple[int, int] | str:
        return self.attributes.num_bits

    @property
    def axis(self) -> Any:
        return self.attributes.axis

    @property
    def block_sizes(self) -> Any:
        return self.attributes.block_sizes

    @property
    def fake_quant(self) -> bool:
        return self.attributes.fake_quant

    @property
    def backend(self) -> str | None:
        return self.attributes.backend

    @property
    def backend_extra_args(self) -> dict[str, Any]:
        """The user's arguments for the backend; {} for none."""
        return self.attributes.backend_extra_args or {}

    @property
    def is_static(self) -> bool:
        return not self._format.dynamic

    @property
    def rotation(self) -> RotateConfig | None:
        """How a tensor is rotated before it is rounded, on or off; None if it isn't."""
        fused = self.fused_rotation
        if fused is not None:
            return RotateConfig(block_size=fused or None)
        rotate = self.attributes.rotate
        if isinstance(rotate, RotateConfig):
            return rotate if rotate.enable else None
        return RotateConfig() if rotate else None

    @property
    def transforms(self) -> bool:
        """Whether calling this quantizer can change a tensor: also off, it scales and rotates."""
        at_work = self.is_enabled and (self._if_quant or self._if_calib)
        return at_work or self._pre_quant_scale is not None or self.rotation is not None

    def enable(self) -> None:
        """Switch on."""
        self._switch(True)

    def disable(self) -> None:
        """Switch off: tensors pass through, scaled and rotated where that is set."""
        self._switch(False)

    def _switch(self, on: bool) -> None:
        if self.attributes.enable != on:
            self._put(attributes=self.attributes.model_copy(update={"enable": on}))
        self._changed()

    @property
    def is_enabled(self) -> bool:
        return self.attributes.enable

    @property
    def is_quantizing(self) -> bool:
        """Whether tensors are rounded when it is on: what `enable_quant` and `disable_quant` switch."""
        return self._if_quant

    @property
    def is_observing(self) -> bool:
        """Whether tensors are observed when it is on: what `enable_calib` and `disable_calib` switch."""
        return self._if_calib

    def enable_quant(self) -> None:
        self._if_quant = True
        self._changed()

    def disable_quant(self) -> None:
        self._if_quant = False
        self._changed()

    # ---- calibration ------------------------------------------------------------------------------------------------

    @property
    def needs_calibration(self) -> bool:
        """Whether a range must be found from data before this quantizer is complete."""
        if not self.is_enabled or self._format.base is not None or self._constant_amax() is not None:
            return False
        if self.attributes.backend is not None or not isinstance(self._format.scale, FloatScale):
            return False
        if not self._format.dynamic:
            return True
        return self._format.scale.outer and self.attributes.type != "dynamic"

    @property
    def needs_bias(self) -> bool:
        """Whether a bias must be found from data."""
        return self.is_enabled and is_static(self.attributes.bias)

    def enable_calib(self) -> None:
        """Start observing, from nothing.

        Raises:
            DetentError: the calibrator doesn't fit the format.
        """
        self._observer = self._new_observer() if self.needs_calibration else None
        self._bias_observer = self._new_bias_observer()
        self._if_calib = True

    def disable_calib(self) -> None:
        """Stop observing; what was observed and not taken over by `load_calib_amax` is lost."""
        self._if_calib = False
        self._observer = self._bias_observer = None

    def load_calib_amax(self) -> None:
        """Take over the range that the observer found, and the bias.

        Raises:
            NothingObserved: no data has reached it.
            DetentError: what was observed isn't finite.
        """
        try:
            if self._bias_observer is not None:
                self._set_buffer("_bias_value", self._bias_observer.value())
            if self._observer is None:
                return
            if self._bias_observer is not None and self._range_follows_bias:
                low, high = self._bias_observer.centred_range()
            else:
                low, high = self._observer.range(self._format)
        except DetentError as error:
            raise type(error)(f"{self.name}: {error}") from None
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            raise DetentError(f"{self.name}: NaN or infinity in the data seen during calibration")
        if self._format.dynamic:
            self.global_amax = torch.maximum(-low, high)
        else:
            self.set_range(low, high)

    def calibrate_on(self, x: Tensor) -> None:
        """Take range and bias from one tensor, a weight, that is all there is to see.

        Raises:
            DetentError: NaN or infinity in it.
        """
        self._check_tensor(x)
        self.enable_calib()
        try:
            self._observe(self.transform(x))
            self.load_calib_amax()
        finally:
            self.disable_calib()

    def _new_observer(self) -> Observer:
        if self._format.dynamic:  # only the outer scale is calibrated; the rest is found at each call
            return MinMaxObserver(self._format.with_granularity(per_tensor()))
        try:
            return make_observer(self.attributes.calibrator, self._format)
        except DetentError as error:
            raise DetentError(f"{self.name}: {error}") from None

    def _new_bias_observer(self) -> BiasObserver | None:
        return BiasObserver(self.attributes.bias or {}) if self.needs_bias else None

    @property
    def _range_follows_bias(self) -> bool:
        """Whether the bias observer knows the range exactly, for any bias."""
        one = self._format.dynamic or self._format.granularity.kind == "per_tensor"
        return one and isinstance(self._observer, MinMaxObserver)

    def _observe(self, x: Tensor) -> None:
        if self._observer is None and self.needs_calibration:
            self._observer = self._new_observer()
        if self._bias_observer is None:
            self._bias_observer = self._new_bias_observer()
        seen = self._without_padding(x.detach())
        if seen.is_meta:
            raise DetentError(
                f"{self.name}: the tensor has no values (meta device), so there is nothing to calibrate on; load the"
                " model, without offloading, before quantizing it"
            )
        if seen.numel() == 0 or (self._observer is None and self._bias_observer is None):
            return
        if (self._bias_observer or type(self._observer) is not MinMaxObserver) and not all_finite(seen):
            raise DetentError(f"{self.name}: {NOT_FINITE}")
        try:
            if self._bias_observer is not None:
                self._bias_observer.observe(seen)
            if self.attributes.bias:  # the range is that of what remains when the bias is off
                seen = seen.float() - bias_of(self.attributes.bias, seen)
            if self._observer is not None:
                self._observer.observe(seen)
        except DetentError as error:
            raise DetentError(f"{self.name}: {error}") from None

    def _without_padding(self, x: Tensor) -> Tensor:
        if self.token_axis is None or x.dim() <= self.token_axis:
            return drop_padding(x)
        return drop_padding(x.transpose(1, self.token_axis)).transpose(1, self.token_axis)

    # ---- work -------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor | QTensor:
        if not self.transforms:
            return x
        self._check_tensor(x)
        if x.numel() == 0:
            return x
        x = self.transform(x)
        if not self.is_enabled:
            return x
        if self._if_calib and not exporting():
            self._observe(x)
        y = self._quantize(x) if self._if_quant else x
        rotation = self.rotation
        if rotation is not None and rotation.mode == "rotate_back" and isinstance(y, Tensor):
            return self._rotate(y, rotation, inverse=True)
        return y

    def _check_tensor(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point() or not is_plain(x):
            raise DetentError(
                f"{self.name}: quantizers take dense floating-point tensors, not {kind_of(x)}; switch it off for"
                " this layer"
            )

    def transform(self, x: Tensor) -> Tensor:
        """What comes before quantization: ``x * pre_quant_scale``, then the rotation."""
        scale = self._pre_quant_scale
        if scale is not None:
            fits = all(s in (1, n) for s, n in zip(reversed(scale.shape), reversed(x.shape), strict=False))
            if scale.dim() > x.dim() or not fits:
                raise DetentError(
                    f"{self.name}: a pre_quant_scale of shape {tuple(scale.shape)} doesn't fit a tensor of shape"
                    f" {tuple(x.shape)}"
                )
            x = x * scale.to(x.device, x.dtype)
        rotation = self.rotation
        if rotation is not None:
            x = self._rotate(x, rotation)
        return x

    def _rotate(self, x: Tensor, rotation: RotateConfig, inverse: bool = False) -> Tensor:
        try:
            return hadamard_transform(x, rotation.block_size, inverse=inverse)
        except DetentError as error:
            raise DetentError(f"{self.name}: {error}") from None

    def centred(self, x: Tensor) -> Tensor:
        """A transformed tensor without its bias: what is quantized in the end. float32 where there is a bias."""
        bias = self._bias(x)
        return x if bias is None else x.float() - bias

    def _quantize(self, x: Tensor) -> Tensor | QTensor:
        attributes = self.attributes
        if attributes.backend is not None:
            return run_backend(attributes.backend, x, self)
        if not attributes.fake_quant:
            if attributes.bias:
                raise DetentError(f"{self.name}: codes cannot hold a bias; use fake_quant=True")
            return self.quantize_to_codes(x.detach())
        bias = self._bias(x)
        if bias is None:
            return self._fake_quantize(x)
        return (self._fake_quantize(x.float() - bias) + bias).to(x.dtype)

    def _fake_quantize(self, x: Tensor) -> Tensor:
        if onnx_nodes.in_graph():
            return onnx_nodes.simulated(self, x)
        scales = self.scales_for(x)
        clip = None if self.attributes.pass_through_bwd else self._clip(scales)
        return fake_quantize(x, self._format, scales, outer_scale=self._outer_on(x), clip=clip, name=self.name)

    def quantize_to_codes(self, x: Tensor) -> QTensor:
        """`x` as codes: what `forward` simulates, without pre-quantization scale, rotation or bias."""
        return encode(x, self._format, self.scales_for(x), outer_scale=self._outer_on(x), name=self.name)

    def _outer_on(self, x: Tensor) -> Tensor | None:
        outer = self.outer_scale()
        return None if outer is None else outer.to(x.device)

    def _bias(self, x: Tensor) -> Tensor | None:
        if not self.attributes.bias:
            return None
        if self._bias_value is not None:
            return self._bias_value.to(x.device)
        return bias_of(self.attributes.bias, x.detach())

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module. That of an ONNX exporter is where scales are made ready for its graph."""
        if not torch.onnx.is_in_onnx_export():
            onnx_constants.keep(self, None)
        elif onnx_constants.preparing() and ((ready := onnx_constants.prepared(self)) is None or ready.codes is None):
            onnx_constants.prepare_scales(self)
        return super().named_modules(*args, **kwargs)

    # ---- show -------------------------------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        if not self.is_enabled:
            return "disabled"
        parts = [str(self._format), f"amax={self._range_text()}"]
        if self._pre_quant_scale is not None:
            low, high = torch.aminmax(self._pre_quant_scale.float())
            parts.append(f"pre_quant_scale=[{low:.2e}, {high:.2e}]({self._pre_quant_scale.numel()})")
        if self.rotation is not None:
            parts.append("rotated")
        if self.attributes.bias:
            parts.append("bias")
        if not isinstance(self.attributes.calibrator, str) or self.attributes.calibrator != "max":
            parts.append(f"calibrator={self.attributes.calibrator}")
        parts.append("fake" if self.fake_quant else "real")
        parts += ["quant"] * self._if_quant + ["calib"] * self._if_calib
        return " ".join(parts)

    def _range_text(self) -> str:
        amax = self.amax if self.amax is not None else self._global_amax
        constant = self._constant_amax()
        if constant is not None:
            return f"{constant} (constant)"
        if amax is None:
            return "dynamic" if self._scale is None else "from stored scales"
        if amax.numel() == 1:
            return f"{float(amax):.2e}"
        if amax.numel() == 0:
            return "empty"
        return f"[{float(amax.amin()):.2e}, {float(amax.amax()):.2e}]({amax.numel()})"
