"""`--quant_algo` and `--pre_quantization_optimization`: what they leave, read by transformers, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cli.runner import Workplace, detent, logits
from detent.runs.load import load_quantized

DATA = ("--dataset", "builtin", "--num_calib_data", 8, "--seq_len", 32, "--group_size", 32)


def outcomes(place: Workplace) -> dict[str, list[dict[str, object]]]:
    return {layer["name"]: layer["algorithms"] for layer in place.report["layers"]}


@pytest.mark.parametrize(
    "algorithm",
    [
        "awq",
        "gptq",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("mse", "hqq", "awq_lite,gptq", "local_hessian", "best", "autoround")
        ),
    ],
)
def test_algorithms_write_what_they_simulated(algorithm: str, place: Workplace) -> None:
    settings = place.out.parent / "settings.json"
    fewer = {"best": {"steps": 3}, "autoround": {"iterations": 3}}.get(algorithm)
    more = () if fewer is None else ("--quant_algo_config_file_path", settings)
    settings.write_text(json.dumps(fewer or {}))
    place.quantize("--quant_algo", algorithm, *DATA, *more)
    ours = logits(load_quantized(place.out))
    assert torch.isfinite(ours).all()
    for steps in outcomes(place).values():
        for step in steps:
            assert step["after"] <= step["before"] * (1 + 1e-9), step


@pytest.mark.parametrize("algorithm", ["awq", "awq_lite"])
def test_awq_folds_its_scales_and_transformers_reads_the_result(algorithm: str, place: Workplace) -> None:
    place.quantize("--quant_algo", algorithm, *DATA)
    before, after = load_file(place.model / "model.safetensors"), load_file(place.out / "model.safetensors")
    norms = [name for name in before if name.endswith("layernorm.weight")]
    assert norms
    assert any(step["decided"].get("alpha") for steps in outcomes(place).values() for step in steps)
    if algorithm == "awq_lite":  # with clipping, the scales that are worth it may lie in matrices alone
        assert any(not torch.equal(before[name], after[name]) for name in norms)
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(place.out, dtype=torch.float32)
    torch.testing.assert_close(logits(theirs), logits(load_quantized(place.out)), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("before", [("rotation",), ("quarot",), ("rotation", "smoothquant")])
def test_rotations_reload_as_they_were_simulated(before: tuple[str, ...], place: Workplace) -> None:
    flags = [flag for name in before for flag in ("--pre_quantization_optimization", name)]
    outcome = place.quantize("--quant_scheme", "w_int8_a_int8_per_tensor_sym", *flags, *DATA[:-2])
    assert "Traceback" not in outcome.err
    reported = place.report["perplexity"]["after"]
    assert place.evaluate()["perplexity"]["after"] == pytest.approx(reported, rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--quant_algo", "gpqt"), "did you mean 'gptq'"),
        (("--quant_algo_config_file_path", "x.json"), "name the algorithm with --quant_algo"),
        (("--quant_algo", "gptq", "--quant_algo_config_file_path", "nowhere.json"), "there is no file nowhere.json"),
        (("--quant_algo", "gptq", "--quant_scheme", "w_mx6"), "chooses codes jointly"),
        (("--skip_quantization", "--quant_algo", "awq"), "has no effect"),
    ],
)  # fmt: skip
def test_mistakes_are_one_message(flags: tuple[str, ...], message: str, place: Workplace) -> None:
    scheme = (
        () if {"--quant_scheme", "--skip_quantization"} & set(flags) else ("--quant_scheme", "w_int4_per_group_sym")
    )
    outcome = detent(
        "quantize", "--model_dir", place.model, "--output_dir", place.out, "--device", "cpu", *scheme, *flags
    )
    assert outcome.code == 2
    assert message in " ".join(outcome.err.split())
    assert "Traceback" not in outcome.err
    assert not Path(place.out).exists()


def test_quarks_files_are_read(place: Workplace, tmp_path: Path) -> None:
    file = tmp_path / "gptq_config.json"
    file.write_text(json.dumps({
        "name": "gptq", "damp_percent": 0.02, "desc_act": False, "static_groups": True, "true_sequential": True,
        "block_size": 64, "inside_layer_modules": ["self_attn.k_proj"], "model_decoder_layers": "model.layers",
    }))  # fmt: skip
    outcome = place.quantize("--quant_algo", "gptq", "--quant_algo_config_file_path", file, *DATA)
    assert "inside_layer_modules" in outcome.err
    steps = [step for steps in outcomes(place).values() for step in steps]
    assert all(step["decided"]["act_order"] is False for step in steps)  # type: ignore[index]
    assert all(step["decided"]["damping"] == 0.02 for step in steps)  # type: ignore[index]


def test_the_error_of_a_solved_weight_is_that_of_the_float_one(place: Workplace) -> None:
    """GPTQ leaves weights on their grid: what they are compared with has to be what they were before."""
    place.quantize("--group_size", 32, "--quant_algo", "gptq", "--skip_evaluation")
    before = load_file(place.model / "model.safetensors")
    after = dict(load_quantized(place.out).named_parameters())
    for layer in place.report["layers"]:
        weight = before[f"{layer['name']}.weight"]
        error = float((after[f"{layer['name']}.weight"] - weight).norm() / weight.norm())
        assert layer["relative_error"] == pytest.approx(error, rel=1e-3)
        assert error > 0.03
