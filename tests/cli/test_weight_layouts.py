"""The layouts of AutoAWQ, GPTQ and MLX on the command line: quantize, evaluate, quantize again.

Every run reads its own result back and compares logits with the simulated model's.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cli.runner import Workplace, detent, logits, save_checkpoint, small
from detent.runs.load import load_quantized

GPTQ = ("--quant_algo", "gptq", "--seq_len", 8, "--num_calib_data", 2)
EXPORTS: dict[str, tuple[Any, ...]] = {
    "awq": ("--model_export", "hf_format", "--custom_mode", "awq"),
    "gptq": ("--model_export", "gptq"),
    "gptq v2": ("--model_export", "gptq", "--gptq_version", 2),
    "mlx": ("--model_export", "mlx"),
}


@pytest.mark.parametrize(
    ("export", "algorithm"),
    [("awq", ("--quant_algo", "awq", *GPTQ[2:])), ("gptq", GPTQ), ("gptq v2", ()), ("mlx", GPTQ)],
)
def test_quantize_and_evaluate(export: str, algorithm: tuple[Any, ...], place: Workplace) -> None:
    place.quantize("--group_size", 32, *EXPORTS[export], *algorithm)
    found = json.loads((place.out / "config.json").read_text())["quantization_config"]
    assert (found.get("quant_method", "mlx"), found["bits"], found["group_size"]) == (export.split()[0], 4, 32)
    before = place.report["perplexity"]["after"]
    assert place.evaluate()["perplexity"]["after"] == pytest.approx(before, rel=1e-6)
    assert detent("inspect", place.out).code == 0


@pytest.mark.parametrize("export", ["awq", "gptq", "mlx"])
def test_as_a_source(export: str, place: Workplace, tmp_path: Path) -> None:
    place.quantize("--group_size", 32, *EXPORTS[export], "--skip_evaluation")
    again = replace(place, model=place.out, out=tmp_path / "again")
    outcome = again.quantize("--group_size", 32, "--skip_evaluation")
    assert "the source is quantized" in outcome.err
    assert not (again.out / "quantize_config.json").exists()
    config = json.loads((again.out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert "quantization" not in config
    (first, second) = (logits(load_quantized(folder)) for folder in (place.out, again.out))
    assert (first - second).norm() < 0.8 * first.norm()  # of random weights in 4 bits twice


@pytest.mark.parametrize("export", EXPORTS)
def test_experts(export: str, place: Workplace, tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model", small("mixtral", num_local_experts=4, num_experts_per_tok=2))
    place = replace(place, model=model)
    scheme = "w_uint4_per_group_asym" if "2" in export else "w_int4_per_group_sym"
    place.quantize("--group_size", 32, *EXPORTS[export], "--skip_evaluation", scheme=scheme)
    names = load_file(place.out / "model.safetensors").keys()
    codes = "weight" if export == "mlx" else "qweight"
    assert {f"model.layers.1.block_sparse_moe.experts.{n}.w2.{codes}" for n in range(4)} < names
    assert "model.layers.0.block_sparse_moe.gate.weight" in names
    found = json.loads((place.out / "config.json").read_text())["quantization_config"]
    kept = [name.replace("\\", "") for name in found.get("modules_to_not_convert", found.get("dynamic", []))]
    assert export == "mlx" or any("block_sparse_moe.gate" in name for name in kept)
    assert torch.isfinite(logits(load_quantized(place.out))).all()


def test_sizes_that_differ(place: Workplace) -> None:
    options = ("--group_size", 32, "--group_size_per_layer", "*down_proj", 64, "--skip_evaluation")
    outcome = place.quantize(*options, *EXPORTS["awq"], run=detent)
    assert outcome.code == 2
    assert "awq holds one group size for all layers" in outcome.err
    assert "gptq holds several" in outcome.err
    assert not place.out.exists()
    place.quantize(*options, *EXPORTS["gptq"])
    found = json.loads((place.out / "config.json").read_text())["quantization_config"]["dynamic"]
    assert found["+:^model\\.layers\\.1\\.mlp\\.down_proj$"]["group_size"] == 64


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (EXPORTS["awq"], "codes of 8 bits; those of 4 bits are held; hf_format does"),
        ((*EXPORTS["gptq"], "--kv_cache_dtype", "fp8"), "weights alone"),
        ((*EXPORTS["mlx"], "--group_size", 16), "in groups of 32, 64 or 128 are held"),
        ((*EXPORTS["gptq"], "--gptq_version", 3), "gptq_version is 1 or 2, not 3"),
    ],
)
def test_what_is_refused_before_anything_runs(options: tuple[Any, ...], said: str, place: Workplace) -> None:
    outcome = place.quantize(*options, scheme="w_int8_per_group_sym", run=detent)
    assert outcome.code == 2
    assert said in outcome.err
