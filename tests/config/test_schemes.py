"""Scheme names: every name of both guides, with the format that it stands for written out by hand."""

from __future__ import annotations

import pytest

from detent.config import (
    all_schemes,
    check_matches,
    kv_cache_format,
    kv_cache_types,
    match,
    normalize,
    parse_format,
    parse_scheme,
    quant_cfg_for,
    scheme_aliases,
)
from detent.errors import DetentError
from detent.formats import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    NF4,
    FloatScale,
    Format,
    Granularity,
    Integer,
    PowerOfTwoScale,
    per_channel,
    per_group,
    per_tensor,
    per_token,
)

TENSOR, ROWS, TOKEN, G128 = per_tensor(), per_channel(0), per_token(), per_group(128)


def sym(bits: int, tiles: Granularity, dynamic: bool = False) -> Format:
    return Format(Integer(bits), tiles, FloatScale(), dynamic=dynamic)


def asym(bits: int, tiles: Granularity, dynamic: bool = False) -> Format:
    return Format(Integer(bits), tiles, FloatScale(), "int", dynamic)


def usym(bits: int, tiles: Granularity) -> Format:
    return Format(Integer(bits, signed=False), tiles, FloatScale(), "midpoint")


def uasym(bits: int, tiles: Granularity, dynamic: bool = False) -> Format:
    return Format(Integer(bits, signed=False), tiles, FloatScale(), "int", dynamic)


def flt(element: object, tiles: Granularity, scale: str = "float32", dynamic: bool = False) -> Format:
    return Format(element, tiles, FloatScale(scale), dynamic=dynamic)  # type: ignore[arg-type]


def mx(element: object, dynamic: bool = False) -> Format:
    return Format(element, per_group(32), PowerOfTwoScale("even"), dynamic=dynamic)  # type: ignore[arg-type]


def two_stage(dynamic: bool = False, scale: str = "e4m3", group: int = 16) -> Format:
    return Format(E2M1, per_group(group), FloatScale(scale, outer=True), dynamic=dynamic)  # type: ignore[arg-type]


def bfp(dynamic: bool = False) -> Format:
    return Format(Integer(8), per_group(8), PowerOfTwoScale("carry"), dynamic=dynamic)


def micro(mantissa: int, dynamic: bool = False) -> Format:
    return Format(Integer(mantissa + 1, narrow=True), per_group(16), PowerOfTwoScale("floor", micro=2), dynamic=dynamic)


FP8 = flt(E4M3, TENSOR)
INT8 = sym(8, TENSOR)
MXINT8 = Integer(8, narrow=True)
PROGRESSIVE = Format(Integer(4), ROWS, FloatScale(), base=FP8)

#: name: (weight, input, output)
EXPECTED: dict[str, tuple[Format | None, ...]] = {
    "no_quant": (None, None, None),
    "w_fp8_a_fp8": (FP8, FP8, None),
    "w_fp8_a_fp8_o_fp8": (FP8, FP8, FP8),
    "w_fp8_per_channel_sym": (flt(E4M3, ROWS), FP8, FP8),
    "w_fp8_per_channel_static_a_fp8_per_token_dynamic": (flt(E4M3, ROWS), flt(E4M3, TOKEN, dynamic=True), None),
    "ptpc_fp8": (flt(E4M3, ROWS), flt(E4M3, TOKEN, dynamic=True), None),
    "w_int8_a_int8_per_tensor_sym": (INT8, INT8, None),
    "w_int8_a_int8_per_tensor_sym_dynamic": (INT8, sym(8, TENSOR, True), None),
    "w_int8_a_int8_per_token_dynamic": (sym(8, ROWS), sym(8, TOKEN, True), None),
    "w_int8_per_channel_a_int8_per_tensor_sym": (sym(8, ROWS), INT8, None),
    "w_int8_per_channel_a_int8_per_tensor_sym_dynamic": (sym(8, ROWS), sym(8, TENSOR, True), None),
    "w_int8_per_tensor_sym": (INT8, None, None),
    "w_int8_per_tensor_mse": (INT8, INT8, None),
    "w_int8_per_tensor_percentile": (INT8, INT8, None),
    "w_int8_per_group_sym": (sym(8, G128), None, None),
    "w_uint8_a_uint8_per_tensor_asym": (uasym(8, TENSOR), uasym(8, TENSOR), None),
    "w_uint8_per_group_asym": (uasym(8, G128), None, None),
    "w_uint8_per_tensor_mse": (uasym(8, TENSOR), uasym(8, TENSOR), None),
    "w_uint8_per_tensor_percentile": (uasym(8, TENSOR), uasym(8, TENSOR), None),
    "w_int4_per_channel_sym": (sym(4, ROWS), None, None),
    "w_int4_per_channel_asym": (asym(4, ROWS), None, None),
    "w_int4_per_group_sym": (sym(4, G128), None, None),
    "w_int4_per_group_asym": (asym(4, G128), None, None),
    "w_uint4_per_channel_sym": (usym(4, ROWS), None, None),
    "w_uint4_per_channel_asym": (uasym(4, ROWS), None, None),
    "w_uint4_per_group_sym": (usym(4, G128), None, None),
    "w_uint4_per_group_asym": (uasym(4, G128), None, None),
    "w_uint4_a_bfloat16_per_group_asym": (uasym(4, G128), None, None),
    "w_uint4_a_uint4_per_channel": (uasym(4, ROWS), uasym(4, TOKEN, True), None),
    "w_uint4_per_channel_a_int8_per_tensor": (uasym(4, ROWS), INT8, None),
    "w_uint4_per_group_a_int8_per_tensor": (uasym(4, G128), INT8, None),
    "w_uint4_per_token_a_int8_per_channel": (uasym(4, ROWS), sym(8, TOKEN, True), None),
    "w_int3_per_group_asym": (asym(3, G128), None, None),
    "w_int3_per_channel_asym": (asym(3, ROWS), None, None),
    "w_int2_per_group_asym": (asym(2, G128), None, None),
    "w_fp4_per_group": (flt(E2M1, G128, "e4m3"), None, None),
    "w_fp4_per_group_a_fp4_per_group": (flt(E2M1, G128, "e4m3"), flt(E2M1, G128, "e4m3", True), None),
    "w_fp4_per_group_a_fp8_e4m3_per_group": (flt(E2M1, G128, "e4m3"), flt(E4M3, G128, dynamic=True), None),
    "w_fp6_e3m2_per_group_a_fp6_e3m2_per_group": (flt(E3M2, G128, "e4m3"), flt(E3M2, G128, "e4m3", True), None),
    "w_fp6_e2m3_per_group_a_fp6_e2m3_per_group": (flt(E2M3, G128, "e4m3"), flt(E2M3, G128, "e4m3", True), None),
    "w_fp4_scale_fp8": (two_stage(), None, None),
    "w_fp4_a_fp4_scale_fp8": (two_stage(), two_stage(True), None),
    "w_bfp16": (bfp(), None, None),
    "w_bfp16_a_bfp16": (bfp(), bfp(True), None),
    "w_bfp16_per_group_sym": (bfp(), None, None),
    "w_mx6": (micro(4), None, None),
    "w_mx6_a_mx6": (micro(4), micro(4, True), None),
    "w_mxint8": (mx(MXINT8), None, None),
    "w_mxfp8": (mx(E4M3), None, None),
    "w_mxfp8_a_mxfp8": (mx(E4M3), mx(E4M3, True), None),
    "w_mxfp6_e3m2": (mx(E3M2), None, None),
    "w_mxfp6_e3m2_a_mxfp6_e3m2": (mx(E3M2), mx(E3M2, True), None),
    "w_mxfp6_e2m3": (mx(E2M3), None, None),
    "w_mxfp6_e2m3_a_mxfp6_e2m3": (mx(E2M3), mx(E2M3, True), None),
    "w_mxfp4": (mx(E2M1), None, None),
    "w_mxfp4_a_mxfp4": (mx(E2M1), mx(E2M1, True), None),
    "w_mxfp4_a_mxfp6": (mx(E2M1), mx(E2M3, True), None),
    "w_mxfp4_a_mxfp6_e3m2": (mx(E2M1), mx(E3M2, True), None),
    "w_mxfp4_a_mxfp6_e2m3": (mx(E2M1), mx(E2M3, True), None),
    "w_mxfp4_a_mxfp8": (mx(E2M1), mx(E4M3, True), None),
    "w_mxfp4_diffs": (mx(E2M1), None, None),
    # deprecated spellings
    "w_mx_fp4_a_mx_fp4_sym": (mx(E2M1), mx(E2M1, True), None),
    "w_mxfp4_a_mxfp4_sym": (mx(E2M1), mx(E2M1, True), None),
    "w_mx_fp6_e3m2_sym": (mx(E3M2), None, None),
    "w_mx_fp6_e2m3_sym": (mx(E2M3), None, None),
    "w_mx_int8_per_group_sym": (mx(MXINT8), None, None),
    "w_mx_fp6_e3m2_a_mx_fp6_e3m2": (mx(E3M2), mx(E3M2, True), None),
    "w_mx_fp6_e2m3_a_mx_fp6_e2m3": (mx(E2M3), mx(E2M3, True), None),
    "w_mx_fp4_a_mx_fp6_sym": (mx(E2M1), mx(E2M3, True), None),
    "w_mx_fp8_a_mx_fp8": (mx(E4M3), mx(E4M3, True), None),
    # today's names
    "int4_wo_32": (sym(4, per_group(32)), None, None),
    "int4_wo_64": (sym(4, per_group(64)), None, None),
    "int4_wo_128": (sym(4, G128), None, None),
    "int4_wo_per_channel": (sym(4, ROWS), None, None),
    "int4_wa_64": (sym(4, per_group(64)), sym(4, per_group(64), True), None),
    "uint4_wo_32": (uasym(4, per_group(32)), None, None),
    "uint4_wo_64": (uasym(4, per_group(64)), None, None),
    "uint4_wo_128": (uasym(4, G128), None, None),
    "uint4_wo_per_channel": (uasym(4, ROWS), None, None),
    "int8": (INT8, INT8, None),
    "fp8": (FP8, FP8, None),
    "mxfp4": (mx(E2M1), mx(E2M1, True), None),
    "mxfp4_weight_only": (mx(E2M1), None, None),
    "mxfp6_e3m2": (mx(E3M2), mx(E3M2, True), None),
    "mxfp6_e2m3": (mx(E2M3), mx(E2M3, True), None),
    "mxfp4_mxfp6_e2m3": (mx(E2M1), mx(E2M3, True), None),
    "mxfp4_fp8": (mx(E2M1), FP8, None),
    "amdfp4": (flt(E2M1, per_group(16), "ue5m3"), flt(E2M1, per_group(16), "ue5m3", True), None),
    "amdfp4_g32": (flt(E2M1, per_group(32), "ue5m3"), flt(E2M1, per_group(32), "ue5m3", True), None),
    "amdfp4_global16": (two_stage(scale="ue5m3"), two_stage(True, "ue5m3"), None),
    "amdfp4_global32": (two_stage(scale="ue5m3", group=32), two_stage(True, "ue5m3", 32), None),
    "int4_fp8": (PROGRESSIVE, flt(E4M3, TENSOR, dynamic=True), None),
    "mx6": (micro(4), micro(4, True), None),
    "mx9": (micro(7), micro(7, True), None),
    "bfp16": (bfp(), bfp(True), None),
    "nvfp4": (two_stage(), two_stage(True), None),
    "fp4_block16_scale_e4m3": (two_stage(), two_stage(True), None),
    # natural neighbours
    "w_int3_per_group_sym": (sym(3, G128), None, None),
    "w_uint2_per_group_asym": (uasym(2, G128), None, None),
    "w_int5_per_channel_asym": (asym(5, ROWS), None, None),
    "w_mxfp8_e5m2": (mx(E5M2), None, None),
    "w_mxfp8_a_mxfp8_e5m2": (mx(E4M3), mx(E5M2, True), None),
    "w_mx9": (micro(7), None, None),
    "w_mx4_a_mx9": (micro(2), micro(7, True), None),
    "w_nf4_per_group": (flt(NF4, G128), None, None),
    "w_fp8_per_channel": (flt(E4M3, ROWS), None, None),
    "w_fp8_e5m2_per_tensor": (flt(E5M2, TENSOR), None, None),
    "w_int4_per_group_a_int8_per_token_dynamic": (sym(4, G128), sym(8, TOKEN, True), None),
    "w_int4_per_group_a_int8_per_token": (sym(4, G128), sym(8, TOKEN, True), None),
    "w_int4_per_group_a_fp8": (sym(4, G128), FP8, None),
    "w_int2_on_fp8": (Format(Integer(2), ROWS, FloatScale(), base=FP8), None, None),
    "w_fp8_a_int8_per_tensor_asym": (FP8, asym(8, TENSOR), None),
    "w_int4_per_group_g32_sym": (sym(4, per_group(32)), None, None),
}

CALIBRATORS = {
    "w_int8_per_tensor_mse": ("mse", "mse"),
    "w_int8_per_tensor_percentile": ("percentile", "percentile"),
    "w_uint8_per_tensor_mse": ("mse", "mse"),
    "w_uint8_per_tensor_percentile": ("percentile", "percentile"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_scheme(name: str) -> None:
    scheme = parse_scheme(name)
    assert (scheme.weight, scheme.input, scheme.output) == EXPECTED[name]
    assert (scheme.weight_calibrator, scheme.input_calibrator) == CALIBRATORS.get(name, ("max", "max"))
    assert scheme.needs_data == any(f is not None and not f.dynamic for f in (scheme.input, scheme.output))
    # Its proper name means the same, and knows this one.
    again = parse_scheme(scheme.name)
    assert again == scheme
    assert name == scheme.name or name in scheme.aliases


def test_every_listed_name_is_a_scheme() -> None:
    names = all_schemes()
    assert len(names) == len(set(names))
    assert set(all_schemes(neighbours=False)) <= set(names)
    for name in [*names, *scheme_aliases()]:
        parse_scheme(name)
    for bits in range(2, 9):
        for kind in ("per_group_sym", "per_group_asym", "per_channel_sym", "per_channel_asym"):
            assert {f"w_int{bits}_{kind}", f"w_uint{bits}_{kind}"} <= set(names)


def test_options() -> None:
    assert parse_scheme("w_int4_per_group_sym", 32).weight == sym(4, per_group(32))
    assert parse_scheme("w_uint4_a_bfloat16_per_group_asym", 32).weight == uasym(4, per_group(32))
    assert parse_scheme("w_fp4_per_group_a_fp8_e4m3_per_group", 64).input == flt(E4M3, per_group(64), dynamic=True)
    assert parse_scheme("w_fp4_per_group", 16, "float32").weight == flt(E2M1, per_group(16))
    assert parse_scheme("w_fp4_per_group", None, "e4m3").weight == flt(E2M1, G128, "e4m3")
    for mode in ("even", "floor", "ceil"):
        weight = parse_scheme("w_mxfp4", 32, scale_calculation_mode=mode).weight
        assert weight == Format(E2M1, per_group(32), PowerOfTwoScale(mode))  # type: ignore[arg-type]
    # One of the two formats has groups to choose: the other keeps its own.
    mixed = parse_scheme("w_int4_per_group_a_mxfp8", 64)
    assert (mixed.weight, mixed.input) == (sym(4, per_group(64)), mx(E4M3, True))
    assert parse_scheme("W_FP8_A_FP8").weight == FP8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("w_int4_per_group_sym", 0), "1 or more, not 0"),
        (("w_int4_per_group_sym", -1), "1 or more, not -1"),
        (("w_int4_per_group_sym", "32"), "1 or more, not '32'"),
        (("w_mxfp4", 64), "'w_mxfp4' has blocks of 32"),
        (("w_mxfp4_a_mxfp4", 128), "has blocks of 32"),
        (("w_bfp16", 16), "has blocks of 8"),
        (("w_mx6", 32), "has blocks of 16"),
        (("w_fp4_scale_fp8", 32), "has blocks of 16"),
        (("w_fp8_a_fp8", 32), "has no groups"),
        (("int4_wo_128", 64), "asks for groups of 128, group_size for 64"),
        (("w_fp4_per_group", None, "e5m2"), "scale_format: e4m3 or float32"),
        (("w_int4_per_group_sym", None, "float32"), "no FP4 or FP6 in groups"),
        (("w_mxfp4", None, None, "round"), "even, floor or ceil, not 'round'"),
        (("w_int4_per_group_sym", None, None, "floor"), "no OCP MX"),
        (("w_int9_per_group_sym",), "'int9' is not the name of a format.*nearest schemes are w_int8_per_group_sym"),
        (("w_int4_per_block_sym",), "per_block: square blocks share a scale in weights of fp8 alone"),
        (("w_fp8_per_block_a_fp8_per_block",), "per_block: square blocks share a scale in weights of fp8 alone"),
        (("w_int4_per_grp_sym",), "unknown qualifier 'per'.*w_int4_per_group_sym"),
        (("w_int4_per_group_sim",), "unknown qualifier 'sim'.*w_int4_per_group_sym"),
        (("int4_per_group_sym",), "unknown scheme.*w_int4_per_group_sym"),
        (("banana",), "unknown scheme 'banana'.*detent schemes"),
        (("",), "unknown scheme ''"),
        (("w_",), "the name of a format is missing"),
        (("w_int8_a",), "the name of a format is missing"),
        (("w_int8_a_int8_a_int4",), "each once"),
        (("w_mxfp8_per_channel",), "blocks of 32 along the last axis and no other granularity"),
        (("w_mxfp6_e5m2",), "mxfp6 has e2m3 and e3m2, not 'e5m2'"),
        (("w_fp8_asym",), "fp8 has no zero point"),
        (("w_int4_per_group_dynamic",), "dynamic describes activations"),
        (("w_int8_a_int8_per_token_static",), "static: activations"),
        (("w_int8_per_channel_per_tensor",), "two values for its granularity"),
        (("w_bfloat16",), "quantizes nothing"),
        (("w_int8_scale_e4m3",), "scale_e4m3 belongs to fp8, fp6 and fp4"),
        (("w_int8_a_int4_on_fp8",), "a format of weights"),
    ],
)
def test_refusals(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(DetentError, match=message):
        parse_scheme(*arguments)  # type: ignore[arg-type]


KV = {
    "fp8": FP8,
    "fp8_dynamic": flt(E4M3, TENSOR, dynamic=True),
    "fp8_per_head": flt(E4M3, per_channel(1)),
    "int8_per_tensor_static": INT8,
    "int8_per_tensor_dynamic": sym(8, TENSOR, True),
    "int8_per_token": sym(8, TOKEN, True),
    "uint4": uasym(4, TOKEN, True),
    "mxfp8": mx(E4M3, True),
    "fp6e2m3_per_group": flt(E2M3, G128, "e4m3", True),
    "mxfp6_e2m3": mx(E2M3, True),
    "fp6e3m2_per_group": flt(E3M2, G128, "e4m3", True),
    "mxfp6_e3m2": mx(E3M2, True),
    "fp4_per_group": flt(E2M1, G128, "e4m3", True),
    "mxfp4": mx(E2M1, True),
}


def test_key_value_cache_types() -> None:
    assert {name: kv_cache_format(name) for name in kv_cache_types()} == KV
    assert kv_cache_format("fp4_per_group", 32, "float32") == flt(E2M1, per_group(32), dynamic=True)
    with pytest.raises(DetentError, match="did you mean 'fp8'"):
        kv_cache_format("fp_8")


def test_format_names() -> None:
    assert parse_format("mx6") == micro(4)
    assert parse_format("nvfp4") == two_stage()
    assert parse_format("int4_per_group_g32_asym") == asym(4, per_group(32))
    assert parse_format("fp8_per_token_dynamic") == flt(E4M3, TOKEN, dynamic=True)
    with pytest.raises(DetentError, match="is not quantized"):
        parse_format("bfloat16")
    with pytest.raises(DetentError, match="format 'int4_per_group': group_size 0|1 or more"):
        parse_format("int4_per_group", 0)


def test_scheme_as_quant_cfg() -> None:
    rules = normalize(quant_cfg_for(parse_scheme("w_int8_per_tensor_mse"), exclude=["lm_head", "*.gate"]))
    linear = {"nn.Linear"}
    names = {
        "layers.0.up.weight_quantizer": linear,
        "layers.0.up.input_quantizer": linear,
        "layers.0.up.output_quantizer": linear,
        "layers.0.gate.weight_quantizer": linear,
        "lm_head.weight_quantizer": linear,
        "embed.weight_quantizer": {"nn.Embedding"},
    }
    assert check_matches(rules, names) == []
    got = {name: match(rules, name, classes) for name, classes in names.items()}
    on = [name for name, attributes in got.items() if attributes is not None and attributes.enable]  # type: ignore[union-attr]
    assert on == ["layers.0.up.weight_quantizer", "layers.0.up.input_quantizer"]
    weight = got["layers.0.up.weight_quantizer"]
    assert weight.to_format() == INT8  # type: ignore[union-attr]
    assert weight.calibrator == "mse"  # type: ignore[union-attr]
