"""`save_pretrained` of a quantized model writes it with its quantizers, and what goes through `state_dict` works."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import detent
from detent import DetentError
from tiny_language_model import make_model

IDS = torch.tensor([[1, 5, 9, 4]])


def quantized() -> Any:
    return detent.quantize(make_model(), detent.INT8_WEIGHT_ONLY_CFG)


@pytest.mark.parametrize("how", ["itself", "part", "copy", "pickled", "packed"])
def test_a_quantized_model_is_not_written_as_a_float_one(how: str, tmp_path: Path) -> None:
    model = quantized()
    if how == "part":
        model = model.model
    elif how == "copy":
        model = copy.deepcopy(model)
        assert model.save_pretrained.args[0] is model
    elif how == "pickled":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        model = torch.load(buffer, weights_only=False)
    elif how == "packed":
        detent.compress(model)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["quantization_config"] == {"quant_method": "detent_state"}
    assert detent.detent_state(type(model).from_pretrained(tmp_path)) == detent.detent_state(model)


def test_folded_weights_can_be_written_and_load_as_they_compute(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = quantized()
    expected = model(IDS).logits
    detent.fold_weight(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(IDS).logits, expected)


def test_a_refused_configuration_leaves_save_pretrained_alone(tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(DetentError):
        detent.quantize(model, {"quant_cfg": {"*nothing*": {"num_bits": 4}}})
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path)


def test_trainers_checkpoints_go_through_state_dict(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from safetensors.torch import load_file
    from transformers import Trainer, TrainingArguments

    model = quantized()
    options = TrainingArguments(str(tmp_path), max_steps=1, save_steps=1, report_to=[], use_cpu=True)
    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
    Trainer(model, options, train_dataset=data).train()
    again = quantized()
    missing, unexpected = again.load_state_dict(
        load_file(tmp_path / "checkpoint-1" / "model.safetensors"), strict=False
    )
    assert not unexpected
    assert not missing
    assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)
    assert "they are for load_state_dict of a model that is quantized alike" in caplog.text
