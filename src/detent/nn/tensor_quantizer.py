"""`TensorQuantizer`: a module that applies one format to one tensor of a model.

Invariants: a quantizer is off, observing, or quantizing (or observing and quantizing at once); its whole state is plain
tensors (buffers in `state_dict`) and the JSON of its attributes; loading a `state_dict` restores what was calibrated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from detent.config.attributes import QuantizerAttributeConfig, RotateConfig
from detent.data.padding import drop_padding
from detent.errors import DetentError
from detent.formats import FloatScale, Format, QTensor, Scales, encode, fake_quantize, per_tensor, scales_from_range
from detent.nn.hadamard import hadamard
from detent.nn.observers import MinMaxObserver, Observer, make_observer

#: What ModelOpt pins an FP8 range to under ``use_constant_amax``.
_CONSTANT_AMAX = 448.0

_backends: dict[str, Callable[[Tensor, TensorQuantizer], Tensor]] = {}


def register_quant_backend(name: str, function: Callable[[Tensor, TensorQuantizer], Tensor]) -> None:
    """Let quantizers with ``backend=name`` compute ``function(x, quantizer)`` instead of their format."""
    _backends[name] = function


def unregister_quant_backend(name: str) -> None:
    _backends.pop(name, None)


def is_registered_quant_backend(name: str) -> bool:
    return name in _backends


class TensorQuantizer(nn.Module):
    """Applies one number format to the tensor it is called with.

    Args:
        quant_attribute_cfg: a `QuantizerAttributeConfig` or its dict; None gives the defaults (8 bits, per tensor).
        if_quant: quantize when called.
        if_calib: observe when called.
        amax: the range to start with.

    Calling it with ``x`` [...] returns a tensor of the same shape and dtype: ``x * pre_quant_scale``, rotated where
    asked for, then ``decode(encode(.))``. Without a calibrated range a static quantizer takes the range of the tensor
    at hand.

    Raises:
        DetentError: NaN or infinity in the tensor; a range whose shape doesn't fit the tensor.
    """

    _amax: Tensor | None
    _low: Tensor | None
    _high: Tensor | None
    _global_amax: Tensor | None
    _scale: Tensor | None
    _zero_point: Tensor | None
    _outer_scale: Tensor | None
    _pre_quant_scale: Tensor | None
    _bias_value: Tensor | None

    #: Buffers that hold calibrated state; absent (None) until set.
    _STATE = (
        "_amax",
        "_low",
        "_high",
        "_global_amax",
        "_scale",
        "_zero_point",
        "_outer_scale",
        "_pre_quant_scale",
        "_bias_value",
    )
    #: Those of them that say what range or scale is used.
    _RANGE = _STATE[:7]

    def __init__(
        self,
        quant_attribute_cfg: QuantizerAttributeConfig | dict[str, Any] | None = None,
        if_quant: bool = True,
        if_calib: bool = False,
        amax: Tensor | float | None = None,
    ) -> None:
        super().__init__()
        for name in self._STATE:
            self.register_buffer(name, None)
        self.name = "tensor"
        self._if_quant, self._if_calib = if_quant, if_calib
        self._observer: Observer | None = None
        self._bias_observer: _MeanObserver | _MidrangeObserver | None = None
        self._cached_scales: tuple[Any, Scales] | None = None
        self._revision = 0
        self.set_from_attribute_config(quant_attribute_cfg or QuantizerAttributeConfig())
        if amax is not None:
            self.amax = torch.as_tensor(amax, dtype=torch.float32)

    # ---- attributes -------------------------------------------------------------------------------------------------

    def set_from_attribute_config(self, attributes: QuantizerAttributeConfig | dict[str, Any]) -> None:
        """Replace all attributes. A calibrated range stays only if the format, and so the range's shape, stays."""
        if not isinstance(attributes, QuantizerAttributeConfig):
            attributes = QuantizerAttributeConfig(**attributes)
        before = getattr(self, "_format", None)
        self.attributes = attributes
        self._format = attributes.to_format().as_dynamic() if attributes.dynamic_blocks else attributes.to_format()
        self._enabled = attributes.enable
        if before is not None and before != self._format:
            self.reset_amax()
        self._revision += 1

    @property
    def format(self) -> Format:
        """The number format in use."""
        return self._format

    @format.setter
    def format(self, fmt: Format) -> None:
        self.set_from_attribute_config(
            QuantizerAttributeConfig(**{**self._portable_attributes(), "format": fmt, "enable": self._enabled})
        )

    def _portable_attributes(self) -> dict[str, Any]:
        """The attributes that say nothing about numbers."""
        keep = ("fake_quant", "calibrator", "rotate", "pass_through_bwd", "backend", "backend_extra_args", "bias")
        return {name: getattr(self.attributes, name) for name in keep}

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
    def is_static(self) -> bool:
        return not self._format.dynamic

    @property
    def _rotation(self) -> RotateConfig | None:
        rotate = self.attributes.rotate
        if isinstance(rotate, RotateConfig):
            return rotate if rotate.enable else None
        return RotateConfig() if rotate else None

    @property
    def transforms(self) -> bool:
        """Whether calling this quantizer can change a tensor: also off, it scales and rotates."""
        return self._enabled or self._pre_quant_scale is not None or self._rotation is not None

    def enable(self) -> None:
        self._enabled = True
        self._revision += 1

    def disable(self) -> None:
        self._enabled = False
        self._revision += 1

    @property
    def is_enabled(self) -> bool:
        return self._enabled

    def enable_quant(self) -> None:
        self._if_quant = True
        self._revision += 1

    def disable_quant(self) -> None:
        self._if_quant = False
        self._revision += 1

    def enable_calib(self) -> None:
        """Start observing, from nothing."""
        if self.needs_calibration:
            self._observer = self._new_observer()
        if self.attributes.bias and self.attributes.bias.get("type", "static") == "static":
            self._bias_observer = _bias_observer(self.attributes.bias)
        self._if_calib = True

    def disable_calib(self) -> None:
        self._if_calib = False
        self._observer = self._bias_observer = None

    def _new_observer(self) -> Observer:
        if self._format.dynamic:  # only the outer scale is calibrated; the rest is found at each call
            return MinMaxObserver(self._format.with_granularity(per_tensor()))
        return make_observer(self.attributes.calibrator, self._format)

    @property
    def needs_calibration(self) -> bool:
        """Whether a range has to be found from data before this quantizer is complete."""
        if not self._enabled or self._format.base is not None or self._constant_amax() is not None:
            return False
        if self.attributes.backend is not None or not isinstance(self._format.scale, FloatScale):
            return False
        if not self._format.dynamic:
            return True
        return self._format.scale.outer and self.attributes.type != "dynamic"

    @property
    def is_calibrated(self) -> bool:
        return any(getattr(self, name) is not None for name in self._RANGE)

    # ---- range ------------------------------------------------------------------------------------------------------

    @property
    def amax(self) -> Tensor | None:
        """The largest magnitude that stays unclipped, float32 in the shape of the scales; None if not calibrated."""
        if self._low is not None and self._high is not None:
            return torch.maximum(-self._low, self._high)
        return self._amax

    @amax.setter
    def amax(self, value: Tensor | float | None) -> None:
        if value is None:
            raise DetentError(f"{self.name}: amax cannot be set to None; use reset_amax()")
        value = torch.as_tensor(value, dtype=torch.float32).detach().clone()
        if not bool(torch.isfinite(value).all()) or bool((value < 0).any()):
            raise DetentError(f"{self.name}: amax must be finite and not negative")
        before = self.amax
        if before is not None and before.shape != value.shape:
            raise DetentError(
                f"{self.name}: amax has shape {tuple(before.shape)}, not {tuple(value.shape)}; call reset_amax() first"
            )
        if self._format.zero_point in ("int", "float"):
            self.set_range(-value, value)
        else:
            self._set_buffer("_amax", value)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Set the range of each tile, float32 in the shape of the scales."""
        if self._format.zero_point in ("int", "float"):
            self._set_buffer("_low", low.detach().to(torch.float32).clone())
            self._set_buffer("_high", high.detach().to(torch.float32).clone())
        else:
            self._set_buffer("_amax", torch.maximum(-low, high).detach().to(torch.float32).clone())

    def reset_amax(self) -> None:
        """Forget everything calibrated about the range (not the pre-quantization scale)."""
        for name in (*self._RANGE, "_bias_value"):
            setattr(self, name, None)
        self._observer = self._bias_observer = None
        self._revision += 1

    @property
    def global_amax(self) -> Tensor | None:
        """For a format with an outer scale: the tensor-wide largest magnitude behind that scale."""
        return self._global_amax

    @global_amax.setter
    def global_amax(self, value: Tensor) -> None:
        self._set_buffer("_global_amax", value.detach().to(torch.float32).reshape(()).clone())

    @property
    def pre_quant_scale(self) -> Tensor | None:
        """What the tensor is multiplied with first, broadcast along its last axis; None for nothing."""
        return self._pre_quant_scale

    @pre_quant_scale.setter
    def pre_quant_scale(self, value: Tensor | float | None) -> None:
        if value is None:
            self._pre_quant_scale = None
            self._revision += 1
            return
        value = torch.as_tensor(value).detach().clone()
        if not bool(torch.isfinite(value).all()):
            raise DetentError(f"{self.name}: pre_quant_scale must be finite")
        self._set_buffer("_pre_quant_scale", value)

    def _set_buffer(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value)
        self._revision += 1

    def load_calib_amax(self) -> None:
        """Take over the range that the observer found, and the bias.

        Raises:
            DetentError: nothing was observed, or what was observed isn't finite.
        """
        if self._bias_observer is not None:
            self._set_buffer("_bias_value", self._bias_observer.value(self.name))
        if self._observer is None:
            return
        try:
            low, high = self._observer.range(self._format)
        except DetentError as error:
            raise DetentError(f"{self.name}: {error}") from None
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            raise DetentError(f"{self.name}: NaN or infinity in the data seen during calibration")
        if self._format.dynamic:
            self.global_amax = torch.maximum(-low, high)
        else:
            self.set_range(low, high)

    def export_amax(self) -> Tensor | None:
        """`amax` as a checkpoint wants it: a copy, zeros replaced by 1 so that no scale is 0."""
        amax = self.amax if self.amax is not None else self._global_amax
        return None if amax is None else torch.where(amax == 0, 1.0, amax).clone()

    @property
    def step_size(self) -> Tensor:
        """The calibrated scale: the distance of neighbouring codes near zero, for integers.

        Raises:
            DetentError: not calibrated.
        """
        scales = self.scales()
        if scales is None:
            raise DetentError(f"{self.name}: not calibrated, so there is no step size")
        return scales.scale

    def scales(self) -> Scales | None:
        """The calibrated scales, or None where they are found at each call."""
        if self._scale is not None:
            return Scales(self._scale, self._zero_point, self._outer_scale)
        constant = self._constant_amax()
        if constant is None and self._amax is None and self._low is None:
            return None
        key = (self._revision, *((t.data_ptr(), t._version) for t in self._range_tensors()))
        if self._cached_scales is None or self._cached_scales[0] != key:
            if constant is not None:
                high = torch.tensor(constant)
                low = -high
            elif self._low is not None and self._high is not None:
                low, high = self._low, self._high
            else:
                assert self._amax is not None
                low, high = -self._amax, self._amax
            try:
                scales = scales_from_range(self._format, low, high, amax_tensor=self._global_amax)
            except DetentError as error:
                raise DetentError(f"{self.name}: {error}") from None
            self._cached_scales = (key, scales)
        return self._cached_scales[1]

    def load_scales(self, scales: Scales) -> None:
        """Use stored scales as they are, in place of a calibrated range. An empty `scale` sets the outer one alone."""
        self.reset_amax()
        if scales.scale.numel():
            self._set_buffer("_scale", scales.scale)
        for name, value in (("_zero_point", scales.zero_point), ("_outer_scale", scales.outer_scale)):
            if value is not None:
                self._set_buffer(name, value)

    def _constant_amax(self) -> float | None:
        if self.attributes.constant_amax is not None:
            return float(self.attributes.constant_amax)
        return _CONSTANT_AMAX if self.attributes.use_constant_amax else None

    def _range_tensors(self) -> list[Tensor]:
        return [t for name in self._RANGE if (t := getattr(self, name)) is not None]

    def outer_scale(self) -> Tensor | None:
        """The calibrated scale of the scales, for formats that have one and find the rest at each call."""
        if self._outer_scale is not None:
            return self._outer_scale
        rule = self._format.scale
        if not (isinstance(rule, FloatScale) and rule.outer) or self._global_amax is None:
            return None
        return rule.outer_scale(self._global_amax, self._format.element)

    def state_key(self) -> tuple[Any, ...]:
        """Changes whenever this quantizer would quantize differently."""
        extra = [t for t in (self._pre_quant_scale, self._bias_value) if t is not None]
        return (self._revision, *((t.data_ptr(), t._version) for t in self._range_tensors() + extra))

    def sync_amax_across_distributed_group(self, group: Any = None) -> None:
        """Give all ranks of `group` (default: all) the widest range that any of them holds."""
        from detent.distributed import all_reduce_max

        for name in ("_amax", "_high", "_global_amax"):
            if (buffer := getattr(self, name)) is not None:
                self._set_buffer(name, all_reduce_max(buffer, group))
        if self._low is not None:
            self._set_buffer("_low", -all_reduce_max(-self._low, group))

    # ---- work -------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x
        if self._pre_quant_scale is not None:
            x = x * self._pre_quant_scale.to(x.dtype)
        rotation = self._rotation
        if rotation is not None:
            x = hadamard(x, rotation.block_size, in_float32=rotation.rotate_fp32)
        if not self._enabled:
            return x
        if self._if_calib:
            self._observe(x)
        if self._if_quant:
            x = self._quantize(x)
        if rotation is not None and rotation.mode == "rotate_back":
            x = hadamard(x, rotation.block_size, in_float32=rotation.rotate_fp32)
        return x

    def _observe(self, x: Tensor) -> None:
        seen = drop_padding(x)
        if self._bias_observer is not None:
            self._bias_observer.observe(seen)
            # The range is that of what remains when the bias is off: taken about the bias of this batch.
            seen = seen - _bias_observer_of(self.attributes.bias, seen)
        if self._observer is None:
            return
        low, high = torch.aminmax(seen.detach()) if seen.numel() else (torch.zeros(()), torch.zeros(()))
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise DetentError(f"{self.name}: NaN or infinity in an activation during calibration")
        self._observer.observe(seen)

    def _quantize(self, x: Tensor) -> Tensor:
        attributes = self.attributes
        if attributes.backend is not None:
            if attributes.backend not in _backends:
                known = ", ".join(sorted(_backends)) or "none"
                raise DetentError(
                    f"{self.name}: backend {attributes.backend!r} is not registered (registered: {known})"
                )
            return _backends[attributes.backend](x, self)
        bias = self._bias(x)
        if bias is not None:
            x = x - bias
        scales = self.scales()
        if scales is not None:
            self._check_fit(scales, x)
        clip = None if attributes.pass_through_bwd else self._clip(scales)
        y = fake_quantize(x, self._format, scales, outer_scale=self.outer_scale(), clip=clip, name=self.name)
        return y if bias is None else y + bias

    def quantize_to_codes(self, x: Tensor) -> QTensor:
        """`x` as codes: what `forward` simulates, without pre-quantization scale, rotation or bias."""
        scales = self.scales()
        if scales is not None:
            self._check_fit(scales, x)
        return encode(x, self._format, scales, outer_scale=self.outer_scale(), name=self.name)

    def _check_fit(self, scales: Scales, x: Tensor) -> None:
        grid = self._format.granularity.grid(tuple(x.shape))
        wanted = 1
        for n in grid:
            wanted *= n
        if scales.scale.numel() != wanted:
            raise DetentError(
                f"{self.name}: calibrated for {scales.scale.numel()} scales, but a tensor of shape {tuple(x.shape)}"
                f" with {self._format.granularity} needs {wanted}; static scales need tensors of one shape, or use type"
                " 'dynamic'"
            )

    def _clip(self, scales: Scales | None) -> tuple[Tensor, Tensor] | None:
        if scales is None:
            return None
        if self._low is not None and self._high is not None:
            return self._low, self._high
        if self._amax is None and self._constant_amax() is None:
            raise DetentError(
                f"{self.name}: only scales are known, not the clipping range that pass_through_bwd=False needs"
            )
        amax = self._amax if self._amax is not None else torch.tensor(self._constant_amax())
        return -amax, amax

    def _bias(self, x: Tensor) -> Tensor | None:
        if not self.attributes.bias:
            return None
        if self._bias_value is not None:
            return self._bias_value.to(x.dtype)
        return _bias_observer_of(self.attributes.bias, x.detach())

    # ---- state ------------------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):  # type: ignore[no-untyped-def]
        """Calibrated buffers exist only once calibrated, so what a `state_dict` brings is created here."""
        for name in self._STATE:
            if (value := state_dict.get(prefix + name)) is not None:
                current = getattr(self, name)
                if current is None or current.shape != value.shape:
                    device = current.device if current is not None else value.device
                    self._set_buffer(name, torch.empty_like(value, device=device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._revision += 1

    def extra_repr(self) -> str:
        if not self._enabled:
            return "disabled"
        parts = [str(self._format), f"amax={self._range_text()}"]
        if self._pre_quant_scale is not None:
            low, high = torch.aminmax(self._pre_quant_scale.float())
            parts.append(f"pre_quant_scale=[{low:.2e}, {high:.2e}]({self._pre_quant_scale.numel()})")
        if self._rotation is not None:
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
        if amax is None:
            constant = self._constant_amax()
            return "dynamic" if constant is None else f"{constant} (constant)"
        if amax.numel() == 1:
            return f"{float(amax):.2e}"
        return f"[{float(amax.amin()):.2e}, {float(amax.amax()):.2e}]({amax.numel()})"


class _MeanObserver:
    """The mean over some axes, every batch weighing as much as its share of elements."""

    def __init__(self, axes: list[int]) -> None:
        self._axes, self._count = axes, 0
        self._sum: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        axes = [axis % x.dim() for axis in self._axes]
        total = x.detach().double().sum(axes, keepdim=True)
        self._sum = total if self._sum is None else self._sum + total
        self._count += x.numel() // max(1, total.numel())

    def value(self, name: str) -> Tensor:
        if self._sum is None or not self._count:
            raise DetentError(f"{name}: no data was observed, so there is no bias")
        return (self._sum / self._count).to(torch.float32)


class _MidrangeObserver:
    """Half way between the smallest and largest value over some axes."""

    def __init__(self, axes: list[int]) -> None:
        self._axes = axes
        self._low: Tensor | None = None
        self._high: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        axes = [axis % x.dim() for axis in self._axes]
        low, high = x.detach().amin(axes, keepdim=True), x.detach().amax(axes, keepdim=True)
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)

    def value(self, name: str) -> Tensor:
        if self._low is None or self._high is None:
            raise DetentError(f"{name}: no data was observed, so there is no bias")
        return ((self._low.float() + self._high.float()) / 2).to(torch.float32)


def _bias_observer(bias: dict[Any, Any]) -> _MeanObserver | _MidrangeObserver:
    axes = [axis for axis in bias if isinstance(axis, int)]
    return _MidrangeObserver(axes) if bias.get("method", "mean") == "max_min" else _MeanObserver(axes)


def _bias_observer_of(bias: Any, x: Tensor) -> Tensor:
    """The bias of one tensor: what the observer of a single batch would find."""
    observer = _bias_observer(bias)
    observer.observe(x)
    return observer.value("bias").to(x.dtype)


class SequentialQuantizer(nn.Sequential):
    """Several quantizers one after the other on one tensor (int4, then FP8: the weights of W4A8).

    Args:
        quantizers: the `TensorQuantizer`s in the order of their application.
    """

    def __init__(self, *quantizers: TensorQuantizer) -> None:
        super().__init__(*quantizers)

    def _members(self) -> list[TensorQuantizer]:
        return list(self)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        return self._members()[0].name if len(self) else "tensor"

    @name.setter
    def name(self, value: str) -> None:
        for index, quantizer in enumerate(self._members()):
            quantizer.name = f"{value}.{index}"

    @property
    def is_enabled(self) -> bool:
        return any(q.is_enabled for q in self._members())

    @property
    def needs_calibration(self) -> bool:
        return any(q.needs_calibration for q in self._members())

    def enable(self) -> None:
        for quantizer in self._members():
            quantizer.enable()

    def disable(self) -> None:
        for quantizer in self._members():
            quantizer.disable()

    def reset_amax(self) -> None:
        for quantizer in self._members():
            quantizer.reset_amax()

    def state_key(self) -> tuple[Any, ...]:
        return tuple(q.state_key() for q in self._members())

    def set_from_attribute_config(self, attributes: list[QuantizerAttributeConfig | dict[str, Any]]) -> None:
        """Replace the members' attributes; the list must be as long as there are members."""
        if len(attributes) != len(self):
            raise DetentError(f"{self.name}: {len(self)} quantizers in sequence, but {len(attributes)} configurations")
        for quantizer, config in zip(self._members(), attributes, strict=True):
            quantizer.set_from_attribute_config(config)
