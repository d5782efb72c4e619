"""`detent schemes` and `detent inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cli.runner import Workplace, detent, succeed
from detent.config import all_schemes


def test_every_scheme_is_listed_with_its_bits() -> None:
    rows = {row["name"]: row for row in succeed("schemes", "--json").json}
    assert list(rows) == all_schemes()
    bits = {
        "w_fp4_scale_fp8": 4.5,
        "w_mxfp4": 4.25,
        "w_mx6": 6,
        "w_mx9": 9,
        "w_bfp16": 9,
        "w_int4_per_group_sym": 4.125,
    }
    for name, expected in bits.items():
        assert rows[name]["bits_per_weight"] == pytest.approx(expected, abs=1e-5), name
    assert {"compressed-tensors", "detent", "awq", "gptq"} <= set(rows["w_int4_per_group_sym"]["held_by"])
    held = rows["w_mx6"]["held_by"]
    assert "detent" in held
    assert not {"compressed-tensors", "awq", "gptq", "gguf"} & set(held)
    text = succeed("schemes").out
    assert all(name in text for name in rows)


@pytest.mark.parametrize("scheme", ["w_int4_per_group_sym", "w_mx6", "w_fp8_a_fp8"])
def test_inspect_quantized(scheme: str, place: Workplace) -> None:
    place.quantize("--skip_evaluation", scheme=scheme)
    found = succeed("inspect", place.out, "--json").json
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert set(tensors) == set(load_file(place.model / "model.safetensors"))
    assert found["totals"]["bytes"] == place.report["size_bytes"]["after"] == sum(t["bytes"] for t in tensors.values())
    assert (found["totals"]["quantized"], found["totals"]["kept"]) == (14, 7)
    up = tensors["model.layers.0.mlp.up_proj.weight"]
    assert up["shape"] == [128, 64]
    assert up["format"] == next(x["format"] for x in place.report["layers"] if x["name"].endswith("0.mlp.up_proj"))
    assert up["bits"] == pytest.approx(up["bytes"] * 8 / (128 * 64))
    assert "14 quantized, 7 kept" in succeed("inspect", place.out).out


def test_inspect_float(place: Workplace) -> None:
    found = succeed("inspect", place.model, "--json").json
    assert found["quant_method"] is None
    assert {tensor["format"] for tensor in found["tensors"]} == {"float32"}
    assert found["totals"]["bits_per_parameter"] == 32


def test_json_alone_on_standard_output(place: Workplace, tmp_path: Path) -> None:
    for command in (["evaluate", place.model, "--num_eval_data", 1, "--json"], ["inspect", place.model, "--json"]):
        json.loads(detent(*command).out)
