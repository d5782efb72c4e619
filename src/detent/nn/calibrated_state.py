"""What calibration leaves in a quantizer: ranges, scales, a bias, a pre-quantization scale, all plain tensors.

Invariants: every piece of state is a buffer that exists once it is set and is found in `state_dict`; `state_key`
changes whenever the quantizer would quantize differently; moving a model to another dtype never touches a range or a
scale.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from detent.config.attributes import QuantizerAttributeConfig
from detent.config.base import shown
from detent.distributed import all_reduce_max
from detent.errors import DetentError
from detent.formats import FloatScale, Format, Scales, scales_from_range
from detent.formats.exporting import exporting

#: What ModelOpt pins an FP8 range to under ``use_constant_amax``.
_CONSTANT_AMAX = 448.0

_revisions = itertools.count(1)


def stamp(x: Tensor) -> tuple[int, int, int]:
    """Tells whether a tensor has been replaced or changed in place, as long as it is kept alive."""
    return (id(x), x.data_ptr(), -1 if x.is_inference() else x._version)


def is_plain(x: Tensor) -> bool:
    """Whether a tensor is neither sparse nor nested."""
    return x.layout is torch.strided and not x.is_nested


def kind_of(x: Any) -> str:
    """What a message calls a value that was given for a tensor of real numbers."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    layout = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
    return " ".join([layout] * (not is_plain(x)) + ["meta"] * x.is_meta + [str(x.dtype).removeprefix("torch.")])


class CalibratedState(nn.Module):
    """The part of a `TensorQuantizer` that calibration fills in."""

    #: Buffers that hold calibrated state; None until set.
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
        "_svdquant_lora_a",
        "_svdquant_lora_b",
        "_fused_rotation",
    )
    #: Those of them that determine the range or scale.
    _RANGE = _STATE[:7]

    _amax: Tensor | None
    _low: Tensor | None
    _high: Tensor | None
    _global_amax: Tensor | None
    _scale: Tensor | None
    _zero_point: Tensor | None
    _outer_scale: Tensor | None
    _pre_quant_scale: Tensor | None
    _bias_value: Tensor | None
    #: A low-rank branch alongside the weight that this quantizer rounds: see `detent.nn.low_rank`.
    _svdquant_lora_a: Tensor | None
    _svdquant_lora_b: Tensor | None
    _fused_rotation: Tensor | None

    name: str
    attributes: QuantizerAttributeConfig
    _format: Format
    _revision: int
    _cached_scales: tuple[Any, list[Tensor], Scales] | None
    #: `fused_rotation` as a number, with the revision at which it was read.
    _fused_rotation_read: tuple[int, int] | None

    def __init__(self) -> None:
        super().__init__()
        self._buffers.update(dict.fromkeys(self._STATE))
        self._put(_cached_scales=None, _fused_rotation_read=None)
        self._changed()

    def train(self, mode: bool = True) -> Self:
        self.training = mode
        return self

    def _changed(self) -> None:
        """Note that the quantizer may quantize differently from now on. No two revisions are ever the same."""
        self._put(_revision=next(_revisions))

    def _put(self, **values: Any) -> None:
        """Set attributes that are neither tensors nor modules, past what nn.Module looks at in each assignment: a large
        model has a hundred thousand quantizers."""
        self.__dict__.update(values)

    def _set_buffer(self, name: str, value: Tensor | None) -> None:
        self.register_buffer(name, value)
        self._changed()

    # ---- range ------------------------------------------------------------------------------------------------------

    @property
    def _outer_only(self) -> bool:
        """Whether only the scale of the scales is calibrated, the others being found at each call."""
        rule = self._format.scale
        return self._format.dynamic and isinstance(rule, FloatScale) and rule.outer

    @property
    def amax(self) -> Tensor | None:
        """The largest magnitude that stays unclipped, float32 in the shape of the scales; None if not calibrated.

        Where the scales of blocks are dynamic under a calibrated one (NVFP4 activations), that of the whole tensor.
        """
        if self._outer_only:
            return self._global_amax
        if self._low is not None and self._high is not None:
            return torch.maximum(-self._low, self._high)
        return self._amax

    @amax.setter
    def amax(self, value: Tensor | float | None) -> None:
        if value is None:
            raise DetentError(f"{self.name}: amax cannot be set to None; use reset_amax()")
        value = self._real(value, "amax").to(torch.float32)
        if not bool(torch.isfinite(value).all()) or bool((value < 0).any()):
            raise DetentError(f"{self.name}: amax must be finite and not negative")
        before = self.amax
        if before is not None and before.shape != value.shape:
            raise DetentError(
                f"{self.name}: amax has shape {tuple(before.shape)}, not {tuple(value.shape)}; call reset_amax() first"
            )
        if self._outer_only:
            self.global_amax = value
        else:
            self.set_range(-value, value)

    def _real(self, value: Any, what: str) -> Tensor:
        """A copy of real numbers that have values."""
        try:
            tensor = torch.as_tensor(value).detach().clone()
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise DetentError(f"{self.name}: {what}: a tensor or a number, not {shown(value)}: {error}") from None
        if tensor.is_complex() or not is_plain(tensor) or tensor.is_meta:
            raise DetentError(f"{self.name}: {what}: a dense tensor of real numbers with values, not {kind_of(tensor)}")
        return tensor

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Set the range of each tile, float32 in the shape of the scales."""
        if self._format.zero_point in ("int", "float"):
            self._set_buffer("_low", low.detach().to(torch.float32).clone())
            self._set_buffer("_high", high.detach().to(torch.float32).clone())
        else:
            self._set_buffer("_amax", torch.maximum(-low, high).detach().to(torch.float32).clone())

    def reset_amax(self) -> None:
        """Forget everything calibrated about the range, the bias included (not the pre-quantization scale)."""
        self._buffers.update(dict.fromkeys((*self._RANGE, "_bias_value")))
        self._changed()

    @property
    def is_calibrated(self) -> bool:
        """Whether a range or scale is known."""
        return any(getattr(self, name) is not None for name in self._RANGE)

    @property
    def global_amax(self) -> Tensor | None:
        """For a format with an outer scale: the tensor-wide largest magnitude behind that scale."""
        return self._global_amax

    @global_amax.setter
    def global_amax(self, value: Tensor | float) -> None:
        value = self._real(value, "global_amax")
        if value.numel() != 1:
            raise DetentError(f"{self.name}: one tensor has one global amax, not {tuple(value.shape)}")
        self._set_buffer("_global_amax", value.to(torch.float32).reshape(()))

    @property
    def pre_quant_scale(self) -> Tensor | None:
        """What the tensor is multiplied with first, broadcast from its last axis; None for nothing."""
        return self._pre_quant_scale

    @pre_quant_scale.setter
    def pre_quant_scale(self, value: Tensor | float | None) -> None:
        if value is not None:
            value = self._real(value, "pre_quant_scale")
            if not bool(torch.isfinite(value).all()):
                raise DetentError(f"{self.name}: pre_quant_scale must be finite")
        self._set_buffer("_pre_quant_scale", value)

    @property
    def fused_rotation(self) -> int | None:
        """Size of the blocks in which the tensor is rotated because a weight was turned to match; 0: blocks as large as
        can be; None: it isn't. Unlike the attribute `rotate` it outlives a change of attributes: without it the model
        would compute something else."""
        if self._fused_rotation is None:
            return None
        read = self._fused_rotation_read
        if read is None or (read[0] != self._revision and not self._fused_rotation.is_meta):
            read = self._fused_rotation_read = (self._revision, int(self._fused_rotation))
        return read[1]

    @fused_rotation.setter
    def fused_rotation(self, value: int | None) -> None:
        self._set_buffer("_fused_rotation", None if value is None else torch.tensor(value, dtype=torch.int32))

    @property
    def svdquant_lora_a(self) -> Tensor | None:
        """[rank, in]: the first matrix of the low-rank branch alongside the weight; None without a branch."""
        return self._svdquant_lora_a

    @svdquant_lora_a.setter
    def svdquant_lora_a(self, value: Tensor | None) -> None:
        self._set_buffer("_svdquant_lora_a", None if value is None else value.detach().clone())

    @property
    def svdquant_lora_b(self) -> Tensor | None:
        """[out, rank]: its second matrix."""
        return self._svdquant_lora_b

    @svdquant_lora_b.setter
    def svdquant_lora_b(self, value: Tensor | None) -> None:
        self._set_buffer("_svdquant_lora_b", None if value is None else value.detach().clone())

    def export_amax(self) -> Tensor | None:
        """`amax` as a checkpoint needs it: a copy, zeros replaced by 1 so that no scale is 0."""
        amax = self.amax if self.amax is not None else self._global_amax
        return None if amax is None else torch.where(amax == 0, 1.0, amax).clone()

    def sync_amax_across_distributed_group(self, group: Any = None) -> None:
        """Give all ranks of `group` (default: all) the widest range that any of them holds."""
        for name in ("_amax", "_high", "_global_amax"):
            if (buffer := getattr(self, name)) is not None:
                self._set_buffer(name, all_reduce_max(buffer, group))
        if self._low is not None:
            self._set_buffer("_low", -all_reduce_max(-self._low, group))

    # ---- scales -----------------------------------------------------------------------------------------------------

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
        bounds = self._bounds()
        if bounds is None or self._outer_only:
            return None
        if exporting():  # of tensors without values or addresses
            return scales_from_range(self._format, *bounds, amax_tensor=self._global_amax)
        used = self._range_tensors()
        key = (self._revision, *(stamp(t) for t in used))
        if self._cached_scales is None or self._cached_scales[0] != key:
            try:
                scales = scales_from_range(self._format, *bounds, amax_tensor=self._global_amax)
            except DetentError as error:
                raise DetentError(f"{self.name}: {error}") from None
            self._cached_scales = (key, used, scales)
        return self._cached_scales[2]

    def scales_for(self, x: Tensor) -> Scales | None:
        """`scales`, checked against the shape of `x` and on its device.

        Raises:
            DetentError: they were calibrated for a tensor of another shape.
        """
        scales = self.scales()
        if scales is None or x.numel() == 0:
            return scales
        grid = self._format.granularity.grid(tuple(x.shape))
        tensors = [scales.scale, scales.zero_point]
        if self._constant_amax() is not None and self._scale is None:  # one number, for however many tiles
            tensors = [None if t is None else t.expand(grid) for t in tensors]
        elif scales.scale.numel() != math.prod(grid):
            raise DetentError(
                f"{self.name}: calibrated for {scales.scale.numel()} scales, but a tensor of shape {tuple(x.shape)}"
                f" with {self._format.granularity} needs {math.prod(grid)}; static scales need tensors of one shape,"
                " or use type 'dynamic'"
            )
        moved = [None if t is None else t.to(x.device) for t in (*tensors, scales.outer_scale)]
        return Scales(*moved)  # type: ignore[arg-type]

    def load_scales(self, scales: Scales) -> None:
        """Use stored scales unchanged, instead of a calibrated range. An empty `scale` sets only the outer one."""
        self.reset_amax()
        if scales.scale.numel():
            self._set_buffer("_scale", scales.scale)
        for name, value in (("_zero_point", scales.zero_point), ("_outer_scale", scales.outer_scale)):
            if value is not None:
                self._set_buffer(name, value)

    def outer_scale(self) -> Tensor | None:
        """The calibrated scale of the scales, for formats that have one and find the rest at each call."""
        if self._outer_scale is not None:
            return self._outer_scale
        rule = self._format.scale
        if not (isinstance(rule, FloatScale) and rule.outer):
            return None
        constant = self._constant_amax()
        amax = self._global_amax if constant is None else torch.tensor(constant)
        return None if amax is None else rule.outer_scale(amax, self._format.element)

    def _clip(self, scales: Scales | None) -> tuple[Tensor, Tensor] | None:
        """The bounds outside of which pass_through_bwd=False stops gradients; None where nothing is ever clipped."""
        if scales is None:
            return None
        bounds = self._bounds()
        if bounds is None:
            raise DetentError(
                f"{self.name}: only scales are known, not the clipping range that pass_through_bwd=False needs"
            )
        return bounds

    def _bounds(self) -> tuple[Tensor, Tensor] | None:
        """(low, high) of each tile, or of all of them for a constant range."""
        constant = self._constant_amax()
        if constant is not None:
            return torch.tensor(-constant), torch.tensor(constant)
        if self._low is not None and self._high is not None:
            return self._low, self._high
        return None if self._amax is None else (-self._amax, self._amax)

    def _constant_amax(self) -> float | None:
        if self.attributes.constant_amax is not None:
            return float(self.attributes.constant_amax)
        return _CONSTANT_AMAX if self.attributes.use_constant_amax else None

    # ---- identity ---------------------------------------------------------------------------------------------------

    def _range_tensors(self) -> list[Tensor]:
        return [t for name in self._RANGE if (t := getattr(self, name)) is not None]

    def state_tensors(self) -> list[Tensor]:
        """All calibrated tensors."""
        return [t for name in self._STATE if (t := getattr(self, name)) is not None]

    def state_key(self) -> tuple[Any, ...]:
        """Changes whenever this quantizer would quantize differently, as long as `state_tensors` are kept alive."""
        return (self._revision, *(stamp(t) for t in self.state_tensors()))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Ranges and scales follow a model to another device, but never to another dtype."""
        before = {name: t for name in self._STATE if (t := getattr(self, name)) is not None}
        parent: Any = super()  # torch doesn't annotate its types
        parent._apply(fn, recurse)
        for name, tensor in before.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                self._set_buffer(name, tensor.to(moved.device))
        self._changed()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached_scales": None}  # made again from the range when needed

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):  # type: ignore[no-untyped-def]
        """Calibrated buffers exist only once calibrated, so what a `state_dict` brings is created here."""
        for name in self._STATE:
            if (value := state_dict.get(prefix + name)) is not None:
                current = getattr(self, name)
                if current is None or current.shape != value.shape or current.dtype != value.dtype:
                    device = current.device if current is not None else value.device
                    self._set_buffer(name, torch.empty_like(value, device=device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._changed()
