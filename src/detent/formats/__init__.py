"""Number formats: plain functions on tensors. No module, no model, no configuration."""

from detent.formats.elements import E2M1, E2M3, E3M2, E4M3, E5M2, NF4, UE5M3, Float, Integer, Table
from detent.formats.format import (
    Format,
    bfp16,
    fp8,
    integer,
    micro_exponent,
    mx,
    nf4,
    nvfp4,
    progressive,
    small_float,
)
from detent.formats.granularity import Granularity, per_block, per_channel, per_group, per_tensor, per_token
from detent.formats.qtensor import QTensor, Scales, decode, encode, fake_quantize, scales_from_range
from detent.formats.scales import FloatScale, PowerOfTwoScale

__all__ = [
    "E2M1",
    "E2M3",
    "E3M2",
    "E4M3",
    "E5M2",
    "NF4",
    "UE5M3",
    "Float",
    "FloatScale",
    "Format",
    "Granularity",
    "Integer",
    "PowerOfTwoScale",
    "QTensor",
    "Scales",
    "Table",
    "bfp16",
    "decode",
    "encode",
    "fake_quantize",
    "fp8",
    "integer",
    "micro_exponent",
    "mx",
    "nf4",
    "nvfp4",
    "per_block",
    "per_channel",
    "per_group",
    "per_tensor",
    "per_token",
    "progressive",
    "scales_from_range",
    "small_float",
]
