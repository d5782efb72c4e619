"""Language models as ONNX: with and without a cache, from a quantized checkpoint and from a model in memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

import detent
from detent.errors import DetentError
from detent.onnx import LanguageModelGraph
from detent.runs.load import load_quantized
from detent.runs.onnx import export_onnx_checkpoint

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CONFIGS = {
    "Llama": SIZES,
    "Qwen3": {**SIZES, "head_dim": 8},
    "Phi3": SIZES,
    "Gemma3Text": {**SIZES, "head_dim": 8, "sliding_window": 5},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_one_token_after_the_other_gives_the_logits_of_all_at_once(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**CONFIGS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(1, 96, (1, 9))
    model = detent.quantize(model, detent.INT8_DEFAULT_CFG, lambda m: m(input_ids=ids))
    graph = LanguageModelGraph(model, with_cache=True).eval()
    report = detent.export_onnx(
        graph,
        graph.sample(),
        tmp_path / "m.onnx",
        dynamic_shapes=graph.dynamic_shapes(),
        input_names=graph.input_names(),
        output_names=graph.output_names(),
    )
    assert report.relative is not None
    assert report.relative < 1e-5
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), options)
    names = graph.input_names()[graph.input_names().index("past_key_values.0.key") :]
    past = [np.zeros((1, 2, 0, 8), np.float32) for _ in names]
    for at in range(ids.shape[1]):  # from an empty cache on
        feeds = {"input_ids": ids[:, at : at + 1].numpy(), "attention_mask": np.ones((1, at + 1), np.int64)}
        feeds["position_ids"] = np.array([[at]])
        logits, *past = session.run(None, {**feeds, **dict(zip(names, past, strict=True))})
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, -1:]
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-5)


@pytest.mark.slow
def test_a_checkpoint_read_back(tmp_path: Path) -> None:
    scheme = detent.SchemeOptions("w_int4_per_group_sym", group_size=32)
    skip = detent.EvaluationOptions(skip=True)
    detent.quantize_checkpoint(detent.ModelOptions(), scheme, tmp_path / "q", evaluation=skip)
    report = export_onnx_checkpoint(tmp_path / "q", tmp_path / "onnx", with_cache=False)
    assert report.relative is not None
    assert report.relative < 1e-5
    layers = load_quantized(tmp_path / "q", dtype=torch.float32)
    count = sum(p.numel() for name, p in layers.named_parameters() if "_proj" in name)
    assert report.types["INT4"] == count // 2
    written = json.loads((tmp_path / "onnx" / "onnx_report.json").read_text())
    assert (written["path"], written["types"]) == ("model.onnx", report.types)
    assert "quantization_config" not in json.loads((tmp_path / "onnx" / "config.json").read_text())
    assert transformers.AutoTokenizer.from_pretrained(str(tmp_path / "onnx"))("a").input_ids
    assert not list((tmp_path / "onnx").glob("*.safetensors"))
    with pytest.raises(DetentError, match="overwrite"):
        export_onnx_checkpoint(tmp_path / "q", tmp_path / "onnx")


def test_what_keeps_no_keys_and_values_is_refused() -> None:
    config = transformers.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = transformers.MambaForCausalLM(config).eval()
    with pytest.raises(DetentError, match=r"export it without"):
        LanguageModelGraph(model, with_cache=True)
