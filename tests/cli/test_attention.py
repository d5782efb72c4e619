"""The key/value cache and FP8 attention from the command line: what is written, and what is read back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cli.runner import Workplace, detent, logits, save_checkpoint, small
from detent.checkpoints import Source
from detent.config import kv_cache_types
from detent.pretrained.loading import load_model
from detent.runs.load import load_quantized

ROWS = ((5, 9, 2, 44, 17, 30, 8),)


def by_hand(folder: Path, fake: Any) -> torch.Tensor:
    """The float model's logits with queries, keys, values and probabilities as `fake(layer, side, x)` makes them."""
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama

    def attention(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **_: Any) -> Any:
        q, k, v = (fake(module.layer_idx, side, x) for side, x in (("q", q), ("k", k), ("v", v)))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * scaling
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        p = scores.masked_fill(hidden, float("-inf")).float().softmax(-1).to(q.dtype)
        return (fake(module.layer_idx, "p", p) @ v).transpose(1, 2), None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_llama, "eager_attention_forward", attention)
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype="auto")
        return logits(model.eval(), ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_cache", kv_cache_types())
def test_every_type_end_to_end(kv_cache: str, dtype: torch.dtype, place: Workplace, tmp_path: Path) -> None:
    """Two key/value heads for four of queries. The run itself compares the logits read back with those simulated."""
    config = small(num_hidden_layers=1, head_dim=32)
    place = replace(place, model=save_checkpoint(tmp_path / "m", config, dtype))
    place.quantize("--kv_cache_dtype", kv_cache, "--skip_evaluation", scheme="no_quant")
    model = load_quantized(place.out)
    plain = logits(load_model(Source(place.model), config, dtype=dtype), ROWS)
    assert not torch.equal(logits(model, ROWS), plain)
    assert sum(m.is_enabled for n, m in model.named_modules() if n.endswith("_quantizer")) == 2  # type: ignore[operator, misc]


def fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    ratio = x.double() / scale.double()
    codes = torch.from_numpy(ratio.clamp(-448, 448).float().numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
    return (codes * scale).to(x.dtype)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_fp8_attention(implementation: str, place: Workplace) -> None:
    outcome = place.quantize(
        "--fp8_attention_quant", "--skip_evaluation", "--model_attn_implementation", implementation, scheme="no_quant"
    )
    assert "does not hold quantized attention probabilities" in outcome.err
    scales = load_file(place.out / "model.safetensors")
    assert sum(name.endswith(tuple(f"self_attn.{side}.scale" for side in "qkvp")) for name in scales) == 8
    expected = by_hand(
        place.model, lambda layer, side, x: fp8(x, scales[f"model.layers.{layer}.self_attn.{side}.scale"])
    )
    read = load_quantized(place.out, attention=implementation)
    torch.testing.assert_close(logits(read, ROWS), expected, rtol=1e-4, atol=1e-4)
    exact = by_hand(place.model, lambda layer, side, x: x)
    assert (expected - exact).norm() > 0.01 * exact.norm()


def test_keys_are_quantized_after_the_rotary_embedding(place: Workplace) -> None:
    """As engines cache them; the scale written for them is that of what is cached."""
    place.quantize("--kv_cache_dtype", "fp8", "--kv_cache_post_rope", "--skip_evaluation", scheme="w_fp8_a_fp8")
    tensors = load_file(place.out / "model.safetensors")
    config = json.loads((place.out / "config.json").read_text("utf-8"))["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["kv_cache_scheme"]["type"] == "float"
    assert {n for n in tensors if n.startswith("model.layers.0.self_attn.") and n.count(".") == 4} == {
        "model.layers.0.self_attn.k_scale",
        "model.layers.0.self_attn.v_scale",
    }


@pytest.mark.parametrize("kv_cache", ["mxfp4", "fp8_dynamic"])
def test_fp8_attention_with_another_cache(kv_cache: str, place: Workplace) -> None:
    outcome = place.quantize("--fp8_attention_quant", "--kv_cache_dtype", kv_cache, run=detent)
    assert outcome.code == 2
    assert (
        f"fp8_attention_quant quantizes keys and values to fp8, so kv_cache_dtype can't be '{kv_cache}'" in outcome.err
    )


CAPPED = {"head_dim": 16, "attn_logit_softcapping": 2.0}
SINKS = {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}


@pytest.mark.parametrize(("model_type", "values"), [("gemma2", CAPPED), ("gpt_oss", SINKS)])
def test_fp8_probabilities_of_other_attention(
    model_type: str, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caps and sinks take part: the model's own function, its softmax followed by rounding, gives the same."""
    import importlib

    from transformers import AutoModelForCausalLM

    import detent as library

    torch.manual_seed(0)
    config = small(model_type, **values)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    exact = logits(model, ROWS)
    source = importlib.import_module(type(model).__module__)
    softmax, eager, scale = torch.nn.functional.softmax, source.eager_attention_forward, torch.tensor(1 / 448)

    def rounded(*inputs: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "softmax", lambda *a, **k: fp8(softmax(*a, **k), scale))
            return eager(*inputs, **options)

    with monkeypatch.context() as patch:
        patch.setattr(source, "eager_attention_forward", rounded)
        expected = logits(model, ROWS)
    library.quantize(model, {"quant_cfg": {"*p_bmm_quantizer": {"num_bits": (4, 3), "constant_amax": 1.0}}})
    torch.testing.assert_close(logits(model, ROWS), expected, rtol=1e-4, atol=1e-4)
    assert (expected - exact).norm() > 1e-3 * exact.norm()
