"""`QuantizerAttributeConfig`: what one quantizer does, in the words of the Python API, and its `Format`.

Integers follow ``amax / (2^(b-1) - 1)`` here, with the range -2^(b-1) .. 2^(b-1)-1 (or symmetric with `narrow_range`);
FP8 follows amax/448; a block with ``scale_bits`` (8, 0) is an OCP MX block whose exponent is the smallest one under
which nothing saturates, one with ``scale_bits`` (4, 3) has E4M3 scales under a float32 scale (the NVFP4 layout).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, Self

from pydantic import field_serializer, field_validator, model_validator

from detent.config import attribute_values as av
from detent.config.base import ConfigField, ConfigModel, as_keywords, shown
from detent.config.format_names import parse_format
from detent.errors import DetentError
from detent.formats import (
    Format,
    Granularity,
    Integer,
    integer,
    mx,
    nvfp4,
    per_block,
    per_channel,
    per_tensor,
)
from detent.formats.elements import float_element
from detent.formats.scales import FloatScale


class RotateConfig(ConfigModel):
    """A normalized Hadamard rotation of the last axis before quantizing.

    Attributes:
        enable: whether to rotate.
        mode: ``rotate``, or ``rotate_back`` to undo the rotation after quantizing.
        rotate_fp32: without effect: half-precision inputs are always summed in float32 and rounded once.
        block_size: rotate in blocks of this many elements; None: the whole axis, or the largest blocks of it that have
            a Hadamard matrix.


    Example:
        >>> import torch
        >>> from detent import RotateConfig, TensorQuantizer
        >>> quantizer = TensorQuantizer({"rotate": RotateConfig(mode="rotate_back")}, if_quant=False)
        >>> bool(torch.allclose(quantizer(torch.eye(4)), torch.eye(4), atol=1e-6))
        True
    """

    enable: bool = ConfigField(True)
    mode: Literal["rotate", "rotate_back"] = ConfigField("rotate")
    rotate_fp32: bool = ConfigField(False)
    block_size: int | None = ConfigField(None, ge=1)


#: Where the attributes keep the format that they describe, among what isn't a field.
_KNOWN = "known_format"


class QuantizerAttributeConfig(ConfigModel):
    """The attributes of one quantizer. Also usable as a mapping: ``attributes["enable"]``, ``**attributes``.

    Attributes:
        enable: False passes the tensor through.
        num_bits: 2 to 8 for integers; for floats (exponent bits, mantissa bits), also written ``"e4m3"``.
        effective_bits: bits that a search for mixed precision counts; None: those of the format.
        axis: one scale per index along this axis or these axes; None: one per tensor.
        fake_quant: quantize and dequantize; False: return codes.
        unsigned: integers from 0; negative values are an error unless there is a zero point.
        narrow_range: integers without the most negative one.
        type: ``static``: ranges are calibrated; ``dynamic``: recomputed for each tensor.
        block_sizes: ``{axis: size}``, size None for the whole axis; besides it ``"type"`` (``static`` or ``dynamic``),
            ``"scale_bits"`` ((8, 0) or (4, 3)), ``"scale_block_sizes"`` and ``"four_over_six"``. Excludes `axis`.
        bias: what is subtracted before quantizing and added back after: ``{axis: None}`` for each axis that one bias
            covers, as in `block_sizes`, so that the other axes have a bias for each index (``{-2: None, -4: None}`` on
            keys [batch, heads, seq, dim]: one for each head and channel); besides it ``"type"`` (``static`` or
            ``dynamic``) and ``"method"`` (``mean`` or ``max_min``).
        calibrator: ``max``, ``histogram``, ``percentile``, ``entropy`` or ``mse``; with arguments
            ``("percentile", {"percentile": 99.9})``; or a class, also as ``(class, argument, ...)``.
        rotate: rotate the last axis first: True, False or a `RotateConfig`.
        pass_through_bwd: the gradient passes unchanged; False: it is zero where values were clipped.
        trt_high_precision_dtype: ``Float``, ``Half`` or ``BFloat16``: the type around Q/DQ nodes in an ONNX export.
        backend, backend_extra_args: name of a registered backend that quantizes instead, and its arguments.
        use_constant_amax: take 448 for the range and calibrate nothing.
        constant_amax: take this number for the range and calibrate nothing.
        format: a `Format`, its dictionary, or a format name (``"bfp16"``, ``"mx6"``, ``"int4_per_group_asym"``); what
            num_bits, axis, block_sizes, unsigned, narrow_range and zero_point would say must then be left out.
        zero_point: ``int`` or ``float``: asymmetric integers, with a rounded or an unrounded zero point.

    Raises:
        DetentError: an unknown attribute, a value out of range, attributes that exclude each other.


    Example:
        >>> from detent import QuantizerAttributeConfig
        >>> attributes = QuantizerAttributeConfig(num_bits=4, block_sizes={-1: 128})
        >>> attributes["num_bits"], attributes.to_dict()
        (4, {'num_bits': 4, 'block_sizes': {'-1': 128}})
    """

    enable: bool = ConfigField(True)
    num_bits: int | tuple[int, int] = ConfigField(8)
    effective_bits: float | None = ConfigField(None, gt=0, le=16)
    axis: int | tuple[int, ...] | None = ConfigField(None)
    fake_quant: bool = ConfigField(True)
    unsigned: bool = ConfigField(False)
    narrow_range: bool = ConfigField(False)
    type: Literal["static", "dynamic"] = ConfigField("static")
    block_sizes: dict[int | str, Any] | None = ConfigField(None)
    bias: dict[int | str, Any] | None = ConfigField(None)
    calibrator: Any = ConfigField("max")
    rotate: bool | RotateConfig = ConfigField(False)
    pass_through_bwd: bool = ConfigField(True)
    trt_high_precision_dtype: Literal["Float", "Half", "BFloat16"] = ConfigField("Float")
    backend: str | None = ConfigField(None)
    backend_extra_args: dict[str, Any] | None = ConfigField(None)
    use_constant_amax: bool = ConfigField(False)
    constant_amax: float | None = ConfigField(None, gt=0, allow_inf_nan=False)
    format: Format | str | None = ConfigField(None)
    zero_point: Literal["int", "float"] | None = ConfigField(None)

    _num_bits = field_validator("num_bits", mode="before")(av.num_bits)
    _axis = field_validator("axis", mode="before")(av.axis)
    _block_sizes = field_validator("block_sizes", mode="before")(av.block_sizes)
    _bias = field_validator("bias", mode="before")(av.bias)
    _calibrator = field_validator("calibrator", mode="before")(av.calibrator)

    @field_validator("rotate", mode="before")
    @classmethod
    def _rotate(cls, value: Any) -> Any:
        if isinstance(value, bool | RotateConfig):
            return value
        if isinstance(value, Mapping):
            return RotateConfig(**as_keywords(value))
        raise DetentError(f"rotate: True, False or a RotateConfig, not {shown(value)}")

    @field_validator("format", mode="before")
    @classmethod
    def _format(cls, value: Any) -> Any:
        if value is None or isinstance(value, Format):
            return value
        if isinstance(value, Mapping):
            return Format.from_dict(dict(value))
        if isinstance(value, str):
            parse_format(value)
            return value
        raise DetentError(f"format: a Format, its dictionary or a format name, not {shown(value)}")

    @field_serializer("format")
    def _format_out(self, value: Format | str | None) -> Any:
        return value.to_dict() if isinstance(value, Format) else value

    @model_validator(mode="after")
    def _together(self) -> QuantizerAttributeConfig:
        if self.axis is not None and self.block_sizes is not None:
            raise DetentError("axis must be None when block_sizes is given; a scale belongs to a channel or to a block")
        if self.use_constant_amax and self.constant_amax is not None:
            raise DetentError("use_constant_amax means 448 and excludes constant_amax; give one of the two")
        if self.backend_extra_args is not None and self.backend is None:
            raise DetentError("backend_extra_args needs backend, the name of a registered backend")
        if self.format is not None:
            given = [name for name, default in _FORMAT_FIELDS.items() if getattr(self, name) != default]
            if given:
                raise DetentError(f"format already specifies the whole format; leave out {', '.join(given)}")
            return self
        if isinstance(self.num_bits, tuple):
            if self.unsigned or self.narrow_range or self.zero_point:
                raise DetentError(
                    f"unsigned, narrow_range and zero_point belong to integers, not to num_bits={self.num_bits}"
                )
        elif self.unsigned and self.narrow_range:
            raise DetentError(
                "narrow_range drops the most negative integer, and unsigned has none; give one of the two"
            )
        self.to_format()  # all other combinations that aren't valid
        return self

    @property
    def is_dynamic(self) -> bool:
        """Whether nothing needs calibration: each tensor's own values give its scales."""
        return self.to_format().dynamic

    @property
    def dynamic_blocks(self) -> bool:
        """Whether the scales of blocks are dynamic under a float32 scale that is calibrated (NVFP4 activations)."""
        fmt = self.to_format()
        outer = isinstance(fmt.scale, FloatScale) and fmt.scale.outer
        return outer and not fmt.dynamic and (self.block_sizes or {}).get("type") == "dynamic"

    def to_format(self, ndim: int | None = None) -> Format:
        """The number format that these attributes describe.

        Args:
            ndim: the rank of the tensor, where it is known: axes are then checked against it and counted as
                `Granularity` does, blocks from the end and channels from the start.

        Raises:
            DetentError: an axis that a tensor of that rank lacks, or a combination that is not a format.
        """
        if ndim is not None:
            return self._described(ndim)
        # A large model asks a hundred thousand times. What is known goes along with copies, and not with changes.
        known: Format | None = self.__dict__.get(_KNOWN)
        if known is None:
            known = self.__dict__[_KNOWN] = self._described(None)
        return known

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__.pop(_KNOWN, None)
        super().__setattr__(name, value)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        made = super().model_copy(update=update, deep=deep)
        if update and update.keys() != {"enable"}:
            made.__dict__.pop(_KNOWN, None)
        return made

    def _described(self, ndim: int | None) -> Format:
        dynamic = self.type == "dynamic"
        if self.format is not None:
            fmt = self.format if isinstance(self.format, Format) else parse_format(self.format)
            return fmt.as_dynamic() if dynamic else fmt
        if self.block_sizes is None:
            fmt = self._one_scale(_channels(self.axis, ndim))
            return fmt.as_dynamic(dynamic)
        granularity = per_block(av.block_axes(self.block_sizes, ndim))
        scale_bits = self.block_sizes.get("scale_bits")
        dynamic_blocks = self.block_sizes.get("type") == "dynamic"
        if scale_bits is None:
            return self._one_scale(granularity).as_dynamic(dynamic or dynamic_blocks)
        if scale_bits == (8, 0):
            return self._mx_block(granularity).as_dynamic(dynamic or dynamic_blocks)
        return self._two_stage(granularity).as_dynamic(dynamic)

    def _one_scale(self, granularity: Granularity) -> Format:
        """A float32 scale per tile."""
        if isinstance(self.num_bits, tuple):
            return Format(float_element(*self.num_bits), granularity, FloatScale())
        if self.zero_point is not None:
            fmt = integer(
                self.num_bits,
                granularity,
                signed=not self.unsigned,
                symmetric=False,
                float_zero_point=self.zero_point == "float",
            )
            return replace(fmt, element=self._integer())
        return Format(self._integer(), granularity, FloatScale(rule="qmax"))

    def _integer(self) -> Integer:
        assert isinstance(self.num_bits, int)
        return Integer(self.num_bits, signed=not self.unsigned, narrow=self.narrow_range)

    def _mx_block(self, granularity: Granularity) -> Format:
        if self.num_bits == 8 and not (self.unsigned or self.zero_point):
            kind = "int8"
        elif self.num_bits in ((4, 3), (5, 2), (3, 2), (2, 3), (2, 1)):
            kind = "e{}m{}".format(*self.num_bits)
        else:
            raise DetentError(
                "block_sizes: scale_bits (8, 0) (OCP MX) goes with num_bits 8 (signed), (4, 3), (5, 2), (3, 2), (2, 3)"
                f" or (2, 1), not {self.num_bits}"
            )
        return mx(kind, rounding="fit").with_granularity(granularity)

    def _two_stage(self, granularity: Granularity) -> Format:
        four_over_six = bool((self.block_sizes or {}).get("four_over_six"))
        fmt = nvfp4(four_over_six=four_over_six).with_granularity(granularity)
        if self.num_bits == (2, 1):
            return fmt
        if four_over_six:
            raise DetentError(f"block_sizes: four_over_six belongs to num_bits (2, 1), not {self.num_bits}")
        if self.zero_point:
            raise DetentError("block_sizes: E4M3 scales under a float32 scale leave no room for a zero_point")
        return replace(self._one_scale(granularity), scale=FloatScale("e4m3", rule="qmax", outer=True))

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, as JSON can hold it; `QuantizerAttributeConfig(**d)` is equal again.

        A calibrator given as a class is left out: it made the ranges and isn't needed to use them.
        """
        values = {
            name: value
            for name, value in self.model_dump(mode="python").items()
            if getattr(self, name) != type(self).model_fields[name].default
        }
        if "calibrator" in values and not isinstance(av.calibrator_name(self.calibrator), str):
            del values["calibrator"]
        return {name: av.jsonable(value) for name, value in values.items()}


#: What `format` makes superfluous, with the values that count as "not given".
_FORMAT_FIELDS: dict[str, Any] = {
    "num_bits": 8,
    "axis": None,
    "block_sizes": None,
    "unsigned": False,
    "narrow_range": False,
    "zero_point": None,
}


class SequentialConfig(list[QuantizerAttributeConfig]):
    """Several attributes for quantizers applied one after the other (a `SequentialQuantizer`); at least one."""

    def __init__(self, steps: Any) -> None:
        super().__init__(QuantizerAttributeConfig.model_validate(step) for step in steps)
        if not self:
            raise DetentError("a list of attributes has at least one entry, one for each quantizer in sequence")


Attributes = QuantizerAttributeConfig | SequentialConfig


def parse_attributes(value: Any) -> Attributes:
    """Attributes from a mapping, from a list of mappings (applied in sequence), or as they are. Raises DetentError."""
    if isinstance(value, QuantizerAttributeConfig | SequentialConfig):
        return value
    if isinstance(value, list | tuple):
        return SequentialConfig(value)
    if isinstance(value, Mapping):
        return QuantizerAttributeConfig(**as_keywords(value))
    raise DetentError(
        f"attributes are a dictionary, or a list of them for several quantizers in sequence, not {shown(value)}"
    )


def merged(current: QuantizerAttributeConfig, given: Any) -> QuantizerAttributeConfig:
    """`current`, updated with `given`.

    Args:
        current: the attributes now.
        given: a mapping, which changes the attributes that it names; a `QuantizerAttributeConfig` replaces them all.

    Raises:
        DetentError: not a mapping, or the result isn't valid.
    """
    if isinstance(given, QuantizerAttributeConfig):
        return given
    if not isinstance(given, Mapping):
        raise DetentError(f"attributes are a dictionary such as {{'num_bits': 8}}, not {shown(given)}")
    explicit = {name: getattr(current, name) for name in current.model_fields_set}
    return QuantizerAttributeConfig(**{**explicit, **as_keywords(given)})


def _channels(axis: int | tuple[int, ...] | None, ndim: int | None) -> Granularity:
    if axis is None:
        return per_tensor()
    axes = (axis,) if isinstance(axis, int) else axis
    if ndim is not None:
        axes = tuple(sorted(av.checked_axis(a, ndim, "axis") % ndim for a in axes))
    return per_channel(*axes)
