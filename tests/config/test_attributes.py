"""Quantizer attributes: what they accept, what they refuse and how, and the formats they stand for."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from detent.config import QuantizerAttributeConfig, RotateConfig, SequentialConfig, parse_attributes
from detent.errors import DetentError
from detent.formats import (
    E2M1,
    E4M3,
    E5M2,
    FloatScale,
    Format,
    Integer,
    PowerOfTwoScale,
    bfp16,
    encode,
    fake_quantize,
    per_block,
    per_channel,
    per_group,
    per_tensor,
    per_token,
)
from detent.formats.elements import E2M3, E3M2

QMAX = FloatScale(rule="qmax")


class SomeCalibrator:
    pass


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({}, Format(Integer(8), per_tensor(), QMAX)),
        ({"axis": 0}, Format(Integer(8), per_channel(0), QMAX)),
        ({"axis": (0, 2)}, Format(Integer(8), per_channel(0, 2), QMAX)),
        ({"num_bits": 4, "block_sizes": {-1: 128}}, Format(Integer(4), per_group(128), QMAX)),
        ({"num_bits": 4, "block_sizes": {"-1": 128}}, Format(Integer(4), per_group(128), QMAX)),  # as JSON has it
        ({"num_bits": 3, "narrow_range": True}, Format(Integer(3, narrow=True), per_tensor(), QMAX)),
        ({"unsigned": True}, Format(Integer(8, signed=False), per_tensor(), QMAX)),
        ({"type": "dynamic"}, Format(Integer(8), per_tensor(), QMAX, dynamic=True)),
        ({"type": "dynamic", "block_sizes": {-1: None}}, Format(Integer(8), per_token(), QMAX, dynamic=True)),
        ({"block_sizes": {-1: 64, "type": "dynamic"}}, Format(Integer(8), per_group(64), QMAX, dynamic=True)),
        ({"block_sizes": {-1: None, -2: None}}, Format(Integer(8), per_block({-1: None, -2: None}), QMAX)),
        ({"num_bits": (4, 3)}, Format(E4M3, per_tensor(), FloatScale())),
        ({"num_bits": "E5M2", "axis": 0}, Format(E5M2, per_channel(0), FloatScale())),
        (
            {"num_bits": "e4m3", "block_sizes": {-1: 128, -2: 128}},
            Format(E4M3, per_block({-1: 128, -2: 128}), FloatScale()),
        ),
        (
            {"num_bits": (2, 1), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
            Format(E2M1, per_group(32), PowerOfTwoScale("fit"), dynamic=True),
        ),
        (
            {"num_bits": (3, 2), "block_sizes": {-1: 32, "type": "static", "scale_bits": (8, 0)}},
            Format(E3M2, per_group(32), PowerOfTwoScale("fit")),
        ),
        (
            {"num_bits": [2, 3], "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": [8, 0]}},
            Format(E2M3, per_group(16), PowerOfTwoScale("fit"), dynamic=True),
        ),
        (
            {"num_bits": 8, "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": "e8m0"}},
            Format(Integer(8, narrow=True), per_group(32), PowerOfTwoScale("fit"), dynamic=True),
        ),
        (
            {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}},
            Format(E2M1, per_group(16), FloatScale("e4m3", outer=True)),
        ),
        (
            {"num_bits": (2, 1), "block_sizes": {-1: 32, "scale_bits": "e4m3", "four_over_six": True}},
            Format(E2M1, per_group(32), FloatScale("e4m3", outer=True, four_over_six=True)),
        ),
        (
            {"num_bits": (2, 1), "type": "dynamic", "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}},
            Format(E2M1, per_group(16), FloatScale("e4m3", outer=True), dynamic=True),
        ),
        (
            {"num_bits": 4, "block_sizes": {-1: 32, "scale_bits": (4, 3)}},
            Format(Integer(4), per_group(32), FloatScale("e4m3", rule="qmax", outer=True)),
        ),
        (
            {"num_bits": 4, "unsigned": True, "zero_point": "int", "block_sizes": {-1: 32}},
            Format(Integer(4, signed=False), per_group(32), FloatScale(), "int"),
        ),
        ({"zero_point": "float", "axis": 0}, Format(Integer(8), per_channel(0), FloatScale(), "float")),
        ({"format": "bfp16"}, bfp16()),
        ({"format": "int4_per_group_asym"}, Format(Integer(4), per_group(128), FloatScale(), "int")),
        ({"format": bfp16(), "type": "dynamic"}, bfp16(dynamic=True)),
        ({"format": bfp16().to_dict()}, bfp16()),
    ],
)
def test_format(attributes: dict[str, Any], expected: Format) -> None:
    config = QuantizerAttributeConfig(**attributes)
    assert config.to_format() == expected
    assert config.is_dynamic == expected.dynamic
    # The mapping view is complete, and the JSON form says the same.
    assert QuantizerAttributeConfig(**config) == config
    assert QuantizerAttributeConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_axes_are_resolved_where_the_rank_is_known() -> None:
    last = QuantizerAttributeConfig(axis=-1)
    assert last.to_format() == Format(Integer(8), per_channel(-1), QMAX)
    assert last.to_format(ndim=2) == Format(Integer(8), per_channel(1), QMAX)
    assert QuantizerAttributeConfig(block_sizes={1: 16}).to_format(ndim=2).granularity == per_group(16)
    assert QuantizerAttributeConfig(block_sizes={0: 16}).to_format(ndim=2).granularity == per_block({-2: 16})
    with pytest.raises(DetentError, match=r"axis names axis 2, but the tensor has 2 axes"):
        QuantizerAttributeConfig(axis=2).to_format(ndim=2)
    with pytest.raises(DetentError, match=r"block_sizes names axis -3"):
        QuantizerAttributeConfig(block_sizes={-3: 4}).to_format(ndim=2)


def test_only_the_outer_scale_of_dynamic_blocks_is_calibrated() -> None:
    nvfp4 = QuantizerAttributeConfig(num_bits=(2, 1), block_sizes={-1: 16, "type": "dynamic", "scale_bits": (4, 3)})
    assert nvfp4.dynamic_blocks
    assert not nvfp4.is_dynamic
    mx = QuantizerAttributeConfig(num_bits=(2, 1), block_sizes={-1: 32, "type": "dynamic", "scale_bits": (8, 0)})
    assert not mx.dynamic_blocks
    assert mx.is_dynamic


# Values that an independent library gives for torch.manual_seed(0); torch.randn(2, 8), first row.
GOLDEN = {
    "default": ({}, [-1.132558, -1.149214, -0.249829, -0.433037, 0.849419, 0.699521, -0.31645, -2.115219]),
    "int4 in blocks of 4": (
        {"num_bits": 4, "block_sizes": {-1: 4}},
        [-1.15236, -1.15236, -0.329246, -0.493869, 0.906523, 0.604348, -0.302174, -2.115219],
    ),
    "fp8": (
        {"num_bits": (4, 3)},
        [-1.133153, -1.133153, -0.245517, -0.41549, 0.830979, 0.679892, -0.302174, -2.11522],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_numerics_are_those_of_the_python_api(name: str) -> None:
    attributes, expected = GOLDEN[name]
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    got = fake_quantize(x, QuantizerAttributeConfig(**attributes).to_format())[0]
    torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=2e-6)  # printed with six digits


def test_mx_scale_is_the_smallest_power_under_which_nothing_saturates() -> None:
    attributes = QuantizerAttributeConfig(
        num_bits=(2, 1), block_sizes={-1: 32, "type": "dynamic", "scale_bits": (8, 0)}
    )
    for amax, exponent in ((6.0, 0), (6.01, 1), (3.0, -1), (5.0, 0), (12.1, 2)):
        q = encode(torch.full((32,), amax), attributes.to_format())
        assert int(q.scale) - 127 == exponent, amax


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"num_bit": 4}, "unknown field 'num_bit'; did you mean 'num_bits'?"),
        ({"learn_amax": True}, "unknown field 'learn_amax'"),
        ({"num_bits": 9}, "num_bits: 2 to 8 for integers, or .*, not 9"),
        ({"num_bits": 1}, "num_bits: 2 to 8"),
        ({"num_bits": True}, "num_bits: 2 to 8"),
        ({"num_bits": (9, 9)}, r"not \(9, 9\)"),
        ({"num_bits": "int4"}, "not 'int4'"),
        ({"axis": 0, "block_sizes": {-1: 4}}, "axis must be None when block_sizes is given"),
        ({"axis": "0"}, "axis: None, an axis number or a tuple"),
        ({"axis": (0, 0)}, "tuple of different ones"),
        ({"effective_bits": 17}, "effective_bits: .* 16, not 17"),
        ({"effective_bits": 0}, "effective_bits"),
        ({"enable": "perhaps"}, "enable: .* not 'perhaps'"),
        ({"type": "statc"}, "type: .*'static' or 'dynamic', not 'statc'"),
        ({"block_sizes": {}}, "no axis is named"),
        ({"block_sizes": {"type": "dynamic"}}, "no axis is named"),
        ({"block_sizes": {-1: 0}}, "axis -1 needs a positive size"),
        ({"block_sizes": {-1: 4, "typ": "static"}}, "unknown key 'typ'"),
        ({"block_sizes": {-1: 4, -2: 4, "type": "dynamic"}}, "dynamic blocks run along exactly one axis"),
        ({"block_sizes": {-1: 4, "scale_bits": (5, 2)}}, "scale_bits is"),
        ({"block_sizes": {-1: 4, "four_over_six": True}}, "four_over_six"),
        ({"num_bits": 4, "block_sizes": {-1: 4, "scale_bits": (4, 3), "four_over_six": True}}, "four_over_six belongs"),
        ({"num_bits": 4, "block_sizes": {-1: 32, "scale_bits": (8, 0)}}, r"scale_bits \(8, 0\)"),
        ({"num_bits": (4, 3), "unsigned": True}, "belong to integers"),
        ({"unsigned": True, "narrow_range": True}, "narrow_range drops the most negative"),
        ({"bias": {"type": "static"}}, "bias: no axis is named"),
        ({"bias": {-2: None, "method": "median"}}, "method is 'mean' or 'max_min', not 'median'"),
        ({"calibrator": "maximum"}, "calibrator: max, histogram"),
        ({"calibrator": ("percentile", 99)}, "one dictionary"),
        ({"rotate": {"mod": "rotate"}}, "did you mean 'mode'?"),
        ({"trt_high_precision_dtype": "Double"}, "not 'Double'"),
        ({"use_constant_amax": True, "constant_amax": 3.0}, "excludes constant_amax"),
        ({"constant_amax": -1.0}, "constant_amax"),
        ({"constant_amax": float("nan")}, "constant_amax"),
        ({"backend_extra_args": {}}, "needs backend"),
        ({"format": "bfp17"}, "'bfp17' is not the name of a format"),
        ({"format": "bfp16", "axis": 0}, "leave out axis"),
        ({"format": "bfp16", "num_bits": 4, "zero_point": "int"}, "leave out num_bits, zero_point"),
        ({"format": {"element": "int4"}}, "not a format description"),
    ],
)
def test_refusals_are_one_detent_error(attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(DetentError, match=message) as caught:
        QuantizerAttributeConfig(**attributes)
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_defaults() -> None:
    expected = {
        "enable": True,
        "num_bits": 8,
        "effective_bits": None,
        "axis": None,
        "fake_quant": True,
        "unsigned": False,
        "narrow_range": False,
        "type": "static",
        "block_sizes": None,
        "bias": None,
        "calibrator": "max",
        "rotate": False,
        "pass_through_bwd": True,
        "trt_high_precision_dtype": "Float",
        "backend": None,
        "backend_extra_args": None,
        "use_constant_amax": False,
        "constant_amax": None,
        "format": None,
        "zero_point": None,
    }
    config = QuantizerAttributeConfig()
    assert dict(config) == expected
    assert len(config) == len(expected)
    assert config.to_dict() == {}
    assert config.get("axis", 5) is None
    assert config.get("no_such", 5) == 5
    with pytest.raises(KeyError):
        config["no_such"]


def test_assignment_is_checked_and_a_refused_one_changes_nothing() -> None:
    config = QuantizerAttributeConfig(num_bits=4, block_sizes={-1: 32})
    config["enable"] = False
    assert config.enable is False
    with pytest.raises(DetentError, match="axis must be None"):
        config["axis"] = 0
    with pytest.raises(DetentError, match="num_bits"):
        config.num_bits = 77
    assert config == QuantizerAttributeConfig(num_bits=4, block_sizes={-1: 32}, enable=False)


def test_copy_is_deep() -> None:
    config = QuantizerAttributeConfig(block_sizes={-1: 32})
    config.copy().block_sizes[-1] = 8  # type: ignore[index]
    assert config.block_sizes == {-1: 32}


def test_calibrators_and_rotation_in_all_spellings() -> None:
    assert QuantizerAttributeConfig(calibrator=["percentile", {"percentile": 99.0}]).calibrator == (
        "percentile",
        {"percentile": 99.0},
    )
    assert QuantizerAttributeConfig(calibrator=SomeCalibrator).calibrator is SomeCalibrator
    with_arguments = QuantizerAttributeConfig(calibrator=(SomeCalibrator, 1, 2))
    assert with_arguments.calibrator == (SomeCalibrator, 1, 2)
    assert with_arguments.to_dict() == {}  # JSON has no classes, and a calibrated quantizer doesn't need it
    rotated = QuantizerAttributeConfig(rotate={"mode": "rotate_back", "block_size": 64})
    assert rotated.rotate == RotateConfig(mode="rotate_back", block_size=64)


def test_a_list_means_several_quantizers_in_sequence() -> None:
    steps = parse_attributes([{"num_bits": 4, "block_sizes": {-1: 128}}, {"num_bits": (4, 3)}])
    assert isinstance(steps, SequentialConfig)
    assert [step.num_bits for step in steps] == [4, (4, 3)]
    with pytest.raises(DetentError, match="at least one"):
        parse_attributes([])
    with pytest.raises(DetentError, match="attributes are a dictionary"):
        parse_attributes("int8")
