"""Number formats: plain functions on tensors. No module, no model, no configuration."""

from detent.formats.checks import all_finite
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
    searched,
    small_float,
)
from detent.formats.gguf import GGUF_FORMATS
from detent.formats.granularity import Granularity, per_block, per_channel, per_group, per_tensor, per_token
from detent.formats.qtensor import QTensor, decode, encode, encode_packed, fake_quantize, same_bits
from detent.formats.restate import restate
from detent.formats.scales import FloatScale, PowerOfTwoScale, SearchedScale
from detent.formats.stored_scales import Scales, scales_from_range, tile_scale

__all__ = [
    "E2M1",
    "E2M3",
    "E3M2",
    "E4M3",
    "E5M2",
    "GGUF_FORMATS",
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
    "SearchedScale",
    "Table",
    "all_finite",
    "bfp16",
    "decode",
    "encode",
    "encode_packed",
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
    "restate",
    "same_bits",
    "scales_from_range",
    "searched",
    "small_float",
    "tile_scale",
]
