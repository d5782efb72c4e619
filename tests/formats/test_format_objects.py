"""What a format says about itself: bits, text, JSON, hash; and the errors of formats that can't be."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from detent import formats as df
from detent.errors import DetentError
from detent.formats import Format
from formats.cases import CASES, Case

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.mark.parametrize(
    ("fmt", "expected"),
    [
        (df.nvfp4(), 4.5),
        (df.mx("e2m1"), 4.25),
        (df.mx("e2m3"), 6.25),
        (df.mx("e4m3"), 8.25),
        (df.mx("int8"), 8.25),
        (df.micro_exponent(4), 4),
        (df.micro_exponent(6), 6),
        (df.micro_exponent(9), 9),
        (df.bfp16(), 9),
        (df.integer(4, df.per_group(128)), 4.25),
        (df.integer(4, df.per_group(128)).with_scale_dtype("bfloat16"), 4.125),
        (df.integer(4, df.per_group(128), signed=False, symmetric=False), 4.25 + 4 / 128),
        (df.integer(4, df.per_group(128), signed=False, symmetric=False, float_zero_point=True), 4.5),
        (df.integer(8), 8),
        (df.fp8(), 8),
        (df.nf4(), 4.5),
        (df.progressive(), 4),
    ],
    ids=lambda v: str(v),
)
def test_bits_per_element(fmt: Format, expected: float) -> None:
    assert fmt.bits_per_element() == expected


def test_bits_per_element_of_a_shape_counts_everything_stored() -> None:
    assert df.integer(8).bits_per_element((4, 8)) == 8 + 32 / 32
    assert df.integer(4, df.per_channel(0)).bits_per_element((4, 8)) == 4 + 32 * 4 / 32
    assert (
        df.integer(4, df.per_group(16)).bits_per_element((3, 37)) == 4 + 32 * 9 / 111
    )  # three groups a row, one short
    assert df.nvfp4().bits_per_element((16, 16)) == 4 + 8 / 16 + 32 / 256
    assert df.fp8("e4m3", df.per_block({0: 128, 1: 128})).bits_per_element((200, 300)) == 8 + 32 * 6 / 60000
    assert df.micro_exponent(6).bits_per_element((3, 5)) == pytest.approx(5 + (3 * 8 + 3 * 3) / 15)  # 3 pairs a row
    assert df.progressive().bits_per_element((4, 8)) == 4 + (4 * 32 + 32) / 32


@every_case
def test_json_hash_and_text(case: Case) -> None:
    fmt, _ = case.native()
    for variant in (fmt, fmt.as_dynamic()):
        again = Format.from_dict(json.loads(json.dumps(variant.to_dict())))
        assert again == variant
        assert hash(again) == hash(variant)
        assert str(again) == str(variant)
    assert fmt != fmt.as_dynamic()
    assert str(fmt) != str(fmt.as_dynamic())
    with pytest.raises(FrozenInstanceError):
        fmt.dynamic = True  # type: ignore[misc]


def test_formats_tell_themselves_apart() -> None:
    formats = [case.native()[0] for case in CASES]
    assert len(set(formats)) == len(formats)
    assert len({str(fmt) for fmt in formats}) == len(formats)
    assert str(df.integer(4, df.per_group(128))) == "int4 per_group(128), float32 scale"


def test_damaged_descriptions_are_refused() -> None:
    good = df.micro_exponent(6).to_dict()
    damaged = [
        {},
        {**good, "element": {"type": "Decimal"}},
        {**good, "element": {**good["element"], "bits": 17}},
        {**good, "element": {**good["element"], "colour": "red"}},
        {**good, "scale": {**good["scale"], "rounding": "sideways"}},
        {**good, "scale": {"type": "FloatScale", "dtype": "float31"}},
        {**good, "scale": {"type": "FloatScale", "rule": "third_range"}},
        {**good, "granularity": {**good["granularity"], "kind": "per_mood"}},
        {**good, "granularity": {**good["granularity"], "blocks": [[-1, 0]]}},
        {**good, "zero_point": "west"},
    ]
    for description in damaged:
        with pytest.raises(DetentError):
            Format.from_dict(description)


def test_impossible_formats_are_refused() -> None:
    with pytest.raises(DetentError, match="zero point"):
        replace(df.fp8(), zero_point="int")
    with pytest.raises(DetentError, match="midpoint"):
        replace(df.integer(8), zero_point="midpoint")
    with pytest.raises(DetentError, match="lookup table"):
        replace(df.nf4(), scale=df.PowerOfTwoScale())
    with pytest.raises(DetentError, match="groups of multiples of 2"):
        df.micro_exponent(6).with_granularity(df.per_tensor())
    with pytest.raises(DetentError, match="groups of multiples of 2"):
        df.micro_exponent(6).with_granularity(df.per_group(5))
    with pytest.raises(DetentError, match="outer scale"):
        df.FloatScale(outer=True)
    with pytest.raises(DetentError, match="four_over_six"):
        df.FloatScale(four_over_six=True)
    with pytest.raises(DetentError, match="base of a progressive"):
        df.progressive(4, base=df.integer(8))
    with pytest.raises(DetentError, match="base of a progressive"):
        df.progressive(4, base=df.fp8("e4m3", df.per_channel(0)))
    with pytest.raises(DetentError, match="at least 1 element"):
        df.per_group(0)
    with pytest.raises(DetentError, match="positive"):
        df.per_block({0: -1})
    with pytest.raises(DetentError, match="MX4, MX6 and MX9"):
        df.micro_exponent(5)
    with pytest.raises(DetentError, match="unknown float element"):
        df.fp8("e9m9")


def test_who_stores_an_outer_scale() -> None:
    for fmt in (df.integer(4), df.mx("e2m1"), df.nvfp4(), df.progressive(), df.nf4()):
        q = df.encode(torch.ones(2, 64), fmt)
        assert fmt.has_outer_scale == (q.outer_scale is not None), str(fmt)
    assert df.nvfp4().scale.outer
    assert not df.progressive().scale.outer  # its outer scale is that of the base


def test_scales_move_and_map() -> None:
    scales = df.encode(torch.randn(4, 16), df.integer(4, df.per_channel(0), signed=False, symmetric=False)).scales
    doubled = scales.map(lambda t: t * 2)
    assert torch.equal(doubled.scale, scales.scale * 2)
    assert torch.equal(doubled.zero_point, scales.zero_point * 2)
    assert doubled.outer_scale is None
    assert scales.to("meta").scale.is_meta


def test_finite() -> None:
    assert df.all_finite(torch.empty(0))
    assert df.all_finite(torch.tensor([1.0, -1e38]))
    for bad in (float("nan"), float("inf"), float("-inf")):
        assert not df.all_finite(torch.tensor([1.0, bad], dtype=torch.bfloat16))


def test_same_bits() -> None:
    zero, nan = torch.tensor([0.0]), torch.tensor([float("nan")])
    assert df.same_bits(nan, nan.clone())
    assert not df.same_bits(zero, -zero)
    assert not df.same_bits(zero, zero.half())
    assert not df.same_bits(zero, torch.zeros(2))
