"""Presets: names, formats and algorithms as the reference tables have them, and what they leave alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from detent.config import (
    MaxCalibConfig,
    MseCalibConfig,
    NoCalibConfig,
    QuantizeAlgorithmConfig,
    QuantizeConfig,
    SequentialConfig,
    check_matches,
    choices,
    is_enabled,
    match,
    need_calibration,
    parse_algorithm,
    presets,
    update_quant_cfg_with_kv_cache_quant,
)
from detent.config.base import ModeloptField
from detent.config.presets import _default_disabled_quantizer_cfg
from detent.errors import DetentError
from detent.formats import (
    E2M1,
    E3M2,
    E4M3,
    FloatScale,
    Format,
    Integer,
    PowerOfTwoScale,
    per_block,
    per_channel,
    per_group,
    per_tensor,
    per_token,
)

QMAX = FloatScale(rule="qmax")
INT8, INT8_PC = Format(Integer(8), per_tensor(), QMAX), Format(Integer(8), per_channel(0), QMAX)
INT4 = Format(Integer(4), per_group(128), QMAX)
FP8 = Format(E4M3, per_tensor(), FloatScale())
NVFP4 = Format(E2M1, per_group(16), FloatScale("e4m3", outer=True))
NVFP4_32 = Format(E2M1, per_group(32), FloatScale("e4m3", outer=True))
NVFP4_46 = Format(E2M1, per_group(16), FloatScale("e4m3", outer=True, four_over_six=True))


def mx(element: Any) -> Format:
    return Format(element, per_group(32), PowerOfTwoScale("fit"), dynamic=True)


#: name: (weight, input, method, whether data is needed); for the weight and input of a linear layer in an MLP.
EXPECTED: dict[str, tuple[Any, Any, str | None, bool]] = {
    "INT8_DEFAULT_CFG": (INT8_PC, INT8, "max", True),
    "INT8_SMOOTHQUANT_CFG": (INT8_PC, INT8, "smoothquant", True),
    "INT8_WEIGHT_ONLY_CFG": (INT8_PC, None, "max", False),
    "FP8_DEFAULT_CFG": (FP8, FP8, "max", True),
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": (
        Format(E4M3, per_channel(0), FloatScale()),
        Format(E4M3, per_token(), FloatScale(), dynamic=True),
        "max",
        False,
    ),
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": (Format(E4M3, per_block({-1: 128, -2: 128}), FloatScale()), None, "max", False),
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG": (INT4, None, "max", False),
    "INT4_AWQ_CFG": (INT4, None, "awq_lite", True),
    "W4A8_AWQ_BETA_CFG": ([INT4, FP8], FP8, "awq_lite", True),
    "NVFP4_DEFAULT_CFG": (NVFP4, NVFP4, "max", True),
    "NVFP4_AWQ_LITE_CFG": (NVFP4, NVFP4, "awq_lite", True),
    "NVFP4_AWQ_CLIP_CFG": (NVFP4, NVFP4, "awq_clip", True),
    "NVFP4_AWQ_FULL_CFG": (NVFP4, NVFP4, "awq_full", True),
    "NVFP4_SVDQUANT_DEFAULT_CFG": (NVFP4, NVFP4, "svdquant", True),
    "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG": (NVFP4, NVFP4, "mse", True),
    "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG": (NVFP4, NVFP4, "local_hessian", True),
    "NVFP4_FOUR_OVER_SIX_CFG": (NVFP4_46, NVFP4, "mse", True),
    "W4A16_NVFP4_CFG": (NVFP4, None, "max", False),
    "W4A8_NVFP4_FP8_CFG": (NVFP4_32, FP8, "max", True),
    "MXFP4_DEFAULT_CFG": (mx(E2M1), mx(E2M1), None, False),
    "MXFP6_DEFAULT_CFG": (mx(E3M2), mx(E3M2), None, False),
    "MXFP8_DEFAULT_CFG": (mx(E4M3), mx(E4M3), None, False),
    "MXINT8_DEFAULT_CFG": (mx(Integer(8, narrow=True)), mx(Integer(8, narrow=True)), None, False),
    "W4A8_MXFP4_FP8_CFG": (mx(E2M1), FP8, None, True),
    "NVFP4_MLP_ONLY_CFG": (NVFP4, NVFP4, "max", True),
    "NVFP4_EXPERTS_ONLY_CFG": (None, None, "max", True),
    "NVFP4_OMLP_ONLY_CFG": (NVFP4, NVFP4, "max", True),
    "NVFP4_MLP_WEIGHT_ONLY_CFG": (NVFP4_32, None, "max", False),
    "MXFP4_MLP_WEIGHT_ONLY_CFG": (mx(E2M1), None, None, False),
    "NVFP4_FP8_MHA_CONFIG": (NVFP4, NVFP4, "max", True),
    "MAMBA_MOE_FP8_AGGRESSIVE_CFG": (FP8, FP8, "max", True),
    "MAMBA_MOE_FP8_CONSERVATIVE_CFG": (FP8, FP8, "max", True),
    "MAMBA_MOE_NVFP4_AGGRESSIVE_CFG": (NVFP4, NVFP4, "max", True),
    "MAMBA_MOE_NVFP4_CONSERVATIVE_CFG": (NVFP4, NVFP4, "max", True),
    "FP8_KV_CFG": (None, None, "max", True),
    "FP8_AFFINE_KV_CFG": (None, None, "max", True),
    "NVFP4_KV_CFG": (None, None, "max", True),
    "NVFP4_AFFINE_KV_CFG": (None, None, "max", True),
    "NVFP4_KV_ROTATE_CFG": (None, None, "max", True),
}
LLAMA = [
    f"model.layers.0.{place}.{kind}_quantizer"
    for place in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    for kind in ("weight", "input", "output")
] + ["lm_head.weight_quantizer", "lm_head.input_quantizer"]


def formats(attributes: Any) -> Any:
    if not is_enabled(attributes):
        return None
    if isinstance(attributes, SequentialConfig):
        return [step.to_format(2) for step in attributes]
    return attributes.to_format(2)


def test_names() -> None:
    assert choices == set(EXPECTED)
    assert len(choices) == 39


@pytest.mark.parametrize("name", EXPECTED)
def test_preset(name: str) -> None:
    config = getattr(presets, name)
    weight, activation, method, data = EXPECTED[name]
    rules = QuantizeConfig(**config).rules
    assert formats(match(rules, "model.layers.0.mlp.up_proj.weight_quantizer")) == weight
    assert formats(match(rules, "model.layers.0.mlp.up_proj.input_quantizer")) == activation
    algorithm = config["algorithm"]
    assert (algorithm["method"] if isinstance(algorithm, dict) else algorithm) == method
    assert need_calibration(config) is data
    for excluded in ("lm_head", "model.layers.0.block_sparse_moe.gate", "model.layers.3.mlp.gate", "a.router.x"):
        assert formats(match(rules, f"{excluded}.weight_quantizer")) is None
    for parent in ("nn.BatchNorm2d", "nn.LeakyReLU", "nn.Embedding"):
        assert formats(match(rules, "model.x.input_quantizer", {parent})) is None
    if weight is not None:  # on an ordinary model none of its entries is in vain
        assert check_matches(rules, LLAMA) == []
    else:
        with pytest.raises(DetentError, match="quantizes nothing|matches no quantizer"):
            check_matches(rules, LLAMA)


def test_selective_presets() -> None:
    def on(preset: Any, name: str) -> bool:
        return formats(match(QuantizeConfig(**preset).rules, f"{name}.weight_quantizer")) is not None

    expert, attention, out = "layers.1.mlp.experts.3.up_proj", "layers.1.self_attn.q_proj", "layers.1.self_attn.o_proj"
    assert [on(presets.NVFP4_EXPERTS_ONLY_CFG, n) for n in (expert, attention, out)] == [True, False, False]
    assert [on(presets.NVFP4_MLP_ONLY_CFG, n) for n in (expert, attention, out)] == [True, False, False]
    assert [on(presets.NVFP4_OMLP_ONLY_CFG, n) for n in (expert, attention, out)] == [True, False, True]
    assert [on(presets.MAMBA_MOE_FP8_AGGRESSIVE_CFG, n) for n in (expert, out, "l.mixer.in_proj")] == [
        True,
        False,
        True,
    ]
    assert not on(presets.MAMBA_MOE_FP8_CONSERVATIVE_CFG, "l.mixer.in_proj")


def test_key_value_presets_quantize_nothing_else() -> None:
    names = ["l.0.q_bmm_quantizer", "l.0.k_bmm_quantizer", "l.0.v_bmm_quantizer", "l.0.up.weight_quantizer"]
    for preset in (presets.FP8_KV_CFG, presets.NVFP4_KV_CFG, presets.NVFP4_KV_ROTATE_CFG, presets.FP8_AFFINE_KV_CFG):
        rules = QuantizeConfig(**preset).rules
        assert check_matches(rules, names) == []
        assert [formats(match(rules, name)) is not None for name in names] == [False, True, True, False]
    rotated = QuantizeConfig(**presets.NVFP4_KV_ROTATE_CFG).rules
    assert [match(rotated, name).rotate for name in names[:3]] == [True, True, False]  # type: ignore[union-attr]
    affine = match(QuantizeConfig(**presets.NVFP4_AFFINE_KV_CFG).rules, names[1])
    assert affine.bias == {-2: None, -4: None, "type": "static"}  # type: ignore[union-attr]


def test_adding_a_key_value_cache() -> None:
    before = copy.deepcopy(presets.FP8_DEFAULT_CFG)
    for kv in (presets.NVFP4_KV_CFG, presets.NVFP4_KV_CFG["quant_cfg"]):
        both = update_quant_cfg_with_kv_cache_quant(presets.FP8_DEFAULT_CFG, kv)
        rules = QuantizeConfig(**both).rules
        assert formats(match(rules, "l.0.k_bmm_quantizer")) == NVFP4
        assert formats(match(rules, "l.0.up.weight_quantizer")) == FP8
    assert before == presets.FP8_DEFAULT_CFG
    alone = update_quant_cfg_with_kv_cache_quant({}, presets.FP8_KV_CFG["quant_cfg"])
    assert alone["algorithm"] == "max"
    assert formats(match(QuantizeConfig(**alone).rules, "l.0.up.weight_quantizer")) is None


def test_copies_never_change_a_preset() -> None:
    before = copy.deepcopy(presets.NVFP4_DEFAULT_CFG)
    for duplicate in (presets.NVFP4_DEFAULT_CFG.copy(), copy.deepcopy(presets.NVFP4_DEFAULT_CFG)):
        duplicate["algorithm"] = None
        duplicate["quant_cfg"]["*weight_quantizer"]["block_sizes"][-1] = 32
        duplicate["quant_cfg"].append({"quantizer_name": "*", "enable": False})
        assert duplicate["quant_cfg"]["*input_quantizer"]["block_sizes"][-1] == 16  # nothing is shared inside either
    assert before == presets.NVFP4_DEFAULT_CFG
    spread = {**_default_disabled_quantizer_cfg}
    spread["*lm_head*"]["enable"] = True
    for entry in [*_default_disabled_quantizer_cfg]:
        entry["enable"] = True
    assert all(entry["enable"] is False for entry in _default_disabled_quantizer_cfg)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_cfg": {"*": {"num_bits": 8}}, "algoritm": "max"},
            "unknown field 'algoritm'; did you mean 'algorithm'?",
        ),
        ({"algorithm": "max"}, "'quant_cfg' is required"),
        ({"quant_cfg": 3}, "a dictionary of patterns or a list of entries"),
        ({"quant_cfg": {"*": {"num_bits": 8}}, "algorithm": 3}, "algorithm: None, a name"),
        ({"quant_cfg": {"*": {"num_bits": 8}}, "algorithm": {"alpha": 1}}, "algorithm: None, a name"),
        ("int8", "config: a dictionary with 'quant_cfg' and 'algorithm'"),
    ],
)
def test_refused_configurations(config: Any, message: str) -> None:
    with pytest.raises(DetentError, match=message):
        QuantizeConfig.of(config)


def test_algorithms() -> None:
    assert parse_algorithm(None) == [NoCalibConfig()]
    assert parse_algorithm("max") == [MaxCalibConfig(distributed_sync=True)]
    assert parse_algorithm(["max", {"method": "mse", "step_size": 0.5}]) == [
        MaxCalibConfig(),
        MseCalibConfig(step_size=0.5),
    ]
    defaults = MseCalibConfig()
    assert (defaults.step_size, defaults.start_multiplier, defaults.stop_multiplier) == (0.1, 0.25, 4.0)
    assert defaults.fp8_scale_sweep is False
    for spec, message in (
        ("maxx", "did you mean 'max'"),
        ("awq_light", "did you mean 'awq_lite'"),
        ({"method": "mse", "steps": 3}, "unknown field 'steps'"),
        ({"method": "mse", "start_multiplier": 5.0}, "is greater than"),
    ):
        with pytest.raises(DetentError, match=message):
            parse_algorithm(spec)


def test_an_algorithm_of_ones_own() -> None:
    class CustomConfig(QuantizeAlgorithmConfig):
        method: str = ModeloptField("custom_calib")
        strength: float = ModeloptField(0.5, title="How much.", ge=0)

    known = {"custom_calib": CustomConfig}
    assert parse_algorithm({"method": "custom_calib", "strength": 2}, known) == [CustomConfig(strength=2.0)]
    with pytest.raises(DetentError, match="strength"):
        parse_algorithm({"method": "custom_calib", "strength": -1}, known)
