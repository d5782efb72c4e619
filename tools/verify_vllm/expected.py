"""What vLLM 0.32 makes of each of Detent's formats, as a table: taken by which of its classes, or refused and why.

`make verify-vllm` fails where vLLM does something else; tests hold that every case has exactly one row. Needs no vLLM.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What happens to some cases.

    Attributes:
        names: a regular expression for the whole name of a case.
        scheme: vLLM's class without "CompressedTensors"; "" where no linear layer is quantized; None: refused.
        says: a regular expression that is found in vLLM's refusal.
        note: what a user should know.
    """

    names: str
    scheme: str | None
    says: str = ""
    note: str = ""


_NO_SCHEME = "No compressed-tensors compatible scheme was found"

TABLE = (
    Row(r"w_u?int[2-8]_per_(group|channel)_a?sym|w_uint4_a_bfloat16_per_group_asym", "WNA16"),
    Row(r"INT4_(AWQ|BLOCKWISE_WEIGHT_ONLY)_CFG|INT8_WEIGHT_ONLY_CFG", "WNA16"),
    Row(r"w_int4_per_group_sym, lm_head too", "WNA16"),
    Row(r"w_int4_per_group_a_int8_per_token_dynamic|w_uint4_per_token_a_int8_per_channel", "WNA8Int"),
    Row(r"w_int8(_per_channel)?_a_int8_per_tensor_sym(_mse|_percentile)?", "W8A8Int8"),
    Row(r"w_int8_a_int8_per_token_dynamic|INT8_(DEFAULT|SMOOTHQUANT)_CFG", "W8A8Int8"),
    Row(r"w_fp8_a_fp8|w_fp8_per_channel_static_a_fp8_per_token_dynamic", "W8A8Fp8"),
    Row(r"FP8_(DEFAULT|PER_CHANNEL_PER_TOKEN)_CFG|MAMBA_MOE_FP8_\w+", "W8A8Fp8"),
    Row(r"w_fp8_e4m3_per_(tensor|channel)|FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "W8A16Fp8"),
    Row(r"w_fp4(_a_fp4)?_scale_fp8|w_nvfp4|W4A16_NVFP4_CFG|MAMBA_MOE_NVFP4_\w+", "W4A4Fp4"),
    Row(r"NVFP4_(DEFAULT|AWQ_\w+|FOUR_OVER_SIX|MLP_ONLY|OMLP_ONLY|W4A4_WEIGHT_\w+)_CFG", "W4A4Fp4"),
    Row(r"w_mxfp4_a_mxfp4|MXFP4_DEFAULT_CFG", "W4A4Mxfp4"),
    Row(r"w_mxfp4|MXFP4_MLP_WEIGHT_ONLY_CFG", "W4A4Mxfp4", note="a kernel that can also rounds inputs to MXFP4"),
    Row(r"w_mxfp4_a_mxfp6(_e2m3)?", "W4A4Mxfp4", note="inputs become MXFP4 or stay in 16 bits, not MXFP6"),
    Row(r"w_mxfp4_a_mxfp8", "W4A8Mxfp4", note="scales of inputs are float32, not powers of two"),
    Row(r"w_mxfp8_a_mxfp8|MXFP8_DEFAULT_CFG", "W8A8Mxfp8"),
    Row(r"w_mxfp8", "W8A8Mxfp8", note="a kernel that can also rounds inputs to MXFP8"),
    Row(r"--kv_cache_dtype fp8(_per_head)?|FP8_KV_CFG", ""),
    Row(r"w_int[38]_per_\w+_a_int8_per_token_dynamic", "WNA8Int"),
    Row(r"w_int[248]_per_(group|channel)_a?sym_a_int4_per_(token|group)_dynamic", "WNA4Int"),
    Row(r"w_int[248]_per_channel_a_int8_per_tensor_o_int8_per_tensor", "WNA8O8Int"),
    Row(r"w_mxfp4_a_fp8_per_token_dynamic", "W4A8Mxfp4"),
    Row(r"w_int[248]_per_(group|channel)_sym, embeddings too", "WNA16"),
    Row(r"w_int8_a_int8_per_token_dynamic, down_proj rotated", "W8A8Int8"),
    # Refused
    Row(
        r"w_int3_per_channel_a_int8_per_tensor_o_int8_per_tensor",
        None,
        "Unsupported num_bits = 3 for WNA8O8Int",
        "weights beside int8 inputs and outputs have 2, 4 or 8 bits",
    ),
    Row(r"w_int8_per_tensor_sym", None, _NO_SCHEME, "integers alone need a scale per channel or group"),
    Row(
        r"w_int8(_per_channel)?_a_int8_per_tensor_sym_dynamic",
        None,
        _NO_SCHEME,
        "dynamic integer inputs need a scale per token",
    ),
    Row(
        r"w_uint8_a_uint8_per_tensor_asym(_mse|_percentile)?",
        None,
        _NO_SCHEME,
        "8-bit weights beside integer inputs have to be symmetric",
    ),
    Row(r"w_uint4_a_uint4_per_channel", None, _NO_SCHEME, "inputs of 4 bits have to be symmetric"),
    Row(
        r"w_uint4_per_(channel|group)_a_int8_per_tensor",
        None,
        _NO_SCHEME,
        "narrow weights need inputs with dynamic scales per token",
    ),
    Row(r"w_int4_per_group_a_fp8_per_tensor", None, _NO_SCHEME, "narrow weights need FP8 inputs per token"),
    Row(r"w_mxfp6_e2m3(_a_mxfp6_e2m3)?", None, _NO_SCHEME, "MXFP6 has kernels in vLLM, but no scheme yet"),
    Row(r"w_fp8_e4m3_per_group", None, "'NoneType' object has no attribute", "FP8 is taken per tensor, channel, block"),
    Row(
        r"w_fp8_a_fp8_o_fp8|w_fp8_per_channel_a_fp8_per_tensor_o_fp8_per_tensor",
        None,
        r"no module or parameter named '.*output_scale'",
        "FP8 outputs aren't quantized",
    ),
    Row(
        r"w_mxfp4_a_fp8_per_tensor|W4A8_MXFP4_FP8_CFG",
        None,
        r"no module or parameter named '.*input_scale'",
        "MXFP4 weights need FP8 inputs with dynamic scales",
    ),
    Row(
        r"--kv_cache_dtype int8_per_tensor_static",
        None,
        "Currently supported kv cache quantization is num_bits=8, type=float",
        "keys and values can be FP8 only",
    ),
)


def rows_of(name: str) -> list[Row]:
    """The rows for a case: one, if the table is right."""
    return [row for row in TABLE if re.fullmatch(row.names, name)]
