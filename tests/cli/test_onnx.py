"""`--model_export onnx`: files for ONNX beside the checkpoint."""

from __future__ import annotations

import json
import stat

import pytest

from cli.runner import Workplace, detent


@pytest.mark.slow
def test_is_written_beside_the_checkpoint_and_can_be_overwritten(place: Workplace) -> None:
    outcome = place.quantize("--group_size", 32, "--skip_evaluation", "--model_export", "onnx")
    folder = place.out / "onnx"
    report = json.loads((folder / "onnx_report.json").read_text("utf-8"))
    assert (place.out / "model.safetensors").exists()
    assert {path.name for path in folder.iterdir()} >= {"model.onnx", "config.json", "tokenizer.json"}
    assert "quantization_config" not in json.loads((folder / "config.json").read_text("utf-8"))
    assert report["relative"] < 1e-5
    assert f"ONNX: {folder / 'model.onnx'}" in outcome.err.replace("\n", "")
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(place.out.stat().st_mode)
    place.quantize("--group_size", 32, "--skip_evaluation", "--overwrite")
    assert not folder.exists()


def test_two_checkpoint_formats(place: Workplace) -> None:
    refused = place.quantize("--model_export", "gptq", "awq", run=detent)
    assert refused.code == 2
    assert "one checkpoint format a run, not gptq and awq" in refused.err
