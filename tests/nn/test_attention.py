"""Quantized keys, values, queries and probabilities against attention written out by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

import detent
import plain_quant
from detent.errors import DetentError
from tiny_language_model import make_model

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
Change = Callable[[Any, torch.Tensor], torch.Tensor]


def by_hand(model: Any, q: Change, k: Change, v: Change, p: Change, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Logits with attention computed here, from queries, keys (after the rotary embedding) and values as changed."""

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> Any:
        query, key, value = q(module, query), k(module, key), v(module, value)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(-1, -2) * scaling
        n = scores.shape[-1]
        scores = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), float("-inf"))
        return (p(module, scores.softmax(-1)) @ value).transpose(1, 2).contiguous(), None

    plain = copy.deepcopy(model)
    plain.config._attn_implementation = "eager"
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(modeling_llama, "eager_attention_forward", attention)
        return plain(IDS).logits


def same(_: Any, x: torch.Tensor) -> torch.Tensor:
    return x


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_fp8_cache(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_model()
    ranges: dict[tuple[int, str], float] = {}

    def observe(which: str) -> Change:
        def change(module: Any, x: torch.Tensor) -> torch.Tensor:
            ranges[module.layer_idx, which] = float(x.abs().amax())
            return x

        return change

    by_hand(plain, same, observe("k"), observe("v"), same, monkeypatch)

    def fp8(which: str) -> Change:
        return lambda module, x: plain_quant.small_floats(x, ranges[module.layer_idx, which])

    expected = by_hand(plain, same, fp8("k"), fp8("v"), same, monkeypatch)
    model = copy.deepcopy(plain)
    model.config._attn_implementation = implementation
    detent.quantize(model, detent.FP8_KV_CFG, lambda m: m(IDS))
    attention = model.model.layers[1].self_attn
    assert float(attention.k_bmm_quantizer.amax) == pytest.approx(ranges[1, "k"], rel=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model(IDS).logits, plain(IDS).logits, rtol=1e-3, atol=1e-3)
        detent.disable_quantizer(model, "*[kv]_bmm_quantizer")
        assert model.config._attn_implementation == implementation
        reference = copy.deepcopy(plain)
        reference.config._attn_implementation = implementation
        assert torch.equal(model(IDS).logits, reference(IDS).logits)
        detent.enable_quantizer(model, "*[kv]_bmm_quantizer")
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_probabilities(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_model()
    expected = by_hand(plain, same, same, same, lambda _, x: plain_quant.small_floats(x, 1.0), monkeypatch)
    model = copy.deepcopy(plain)
    model.config._attn_implementation = implementation
    detent.quantize(model, {"quant_cfg": {"*p_bmm_quantizer": {"num_bits": (4, 3), "constant_amax": 1.0}}})
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_rotated_keys_meet_rotated_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the rotation alone, scores are what they were."""
    model = make_model()
    with torch.no_grad():
        before = model(IDS).logits
        cfg = {"*[qk]_bmm_quantizer": {"num_bits": 8, "rotate": True}, "*[qk]_bmm_*": {"num_bits": 8, "rotate": True}}
        detent.quantize(model, {"quant_cfg": cfg, "algorithm": None})
        after = model(IDS).logits
    assert 0 < (after - before).norm() < 0.1 * before.norm()


@pytest.mark.parametrize("preset", ["FP8_KV_CFG", "FP8_AFFINE_KV_CFG", "NVFP4_KV_CFG", "NVFP4_KV_ROTATE_CFG"])
def test_generation_with_a_cache(preset: str) -> None:
    model = detent.quantize(make_model(), getattr(detent, preset), lambda m: m(IDS))
    mask = torch.ones_like(IDS)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    with_cache = model.generate(IDS, use_cache=True, **settings)
    without = model.generate(IDS, use_cache=False, **settings)
    assert with_cache.shape[1] > IDS.shape[1]
    assert torch.equal(with_cache, without)


def test_models_without_such_attention_say_so() -> None:
    with pytest.raises(DetentError, match="matches no quantizer"):
        detent.quantize(torch.nn.Sequential(torch.nn.Linear(4, 4)), detent.FP8_KV_CFG)


def test_failure_restores_the_attention_function() -> None:
    model = make_model()
    before = model.config._attn_implementation
    with pytest.raises(DetentError, match="never called"):
        detent.quantize(model, detent.FP8_KV_CFG, lambda m: None)
    assert model.config._attn_implementation == before
    assert not hasattr(model.model.layers[0].self_attn, "k_bmm_quantizer")


KV_PRESETS = ("FP8_KV_CFG", "FP8_AFFINE_KV_CFG", "NVFP4_KV_CFG", "NVFP4_AFFINE_KV_CFG", "NVFP4_KV_ROTATE_CFG")


@pytest.mark.parametrize("preset", KV_PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_preset_alone_quantizes_keys_and_values_alone(preset: str, dtype: torch.dtype) -> None:
    model = make_model().to(dtype)
    before = model(IDS).logits
    detent.quantize(model, getattr(detent, preset), lambda m: m(IDS))
    names = [name for name, q in detent.model.conversion.named_quantizers(model) if q.is_enabled]
    assert sorted(names) == sorted(
        f"model.layers.{n}.self_attn.{side}_bmm_quantizer" for n in range(2) for side in "kv"
    )
    after = model(IDS).logits
    assert after.dtype == dtype
    assert 0 < (after - before).norm() < before.norm()


def test_fp8_attention_beside_nvfp4_weights() -> None:
    model = detent.quantize(make_model(), detent.NVFP4_FP8_MHA_CONFIG, lambda m: m(IDS))
    attention = model.model.layers[0].self_attn
    for side in "qkvp":
        quantizer = getattr(attention, f"{side}_bmm_quantizer")
        assert quantizer.is_enabled
        assert quantizer.num_bits == (4, 3)
        assert float(quantizer.amax) > 0
    assert float(attention.p_bmm_quantizer.amax) == pytest.approx(1.0)  # the first token sees itself alone
    assert attention.q_proj.weight_quantizer.is_enabled
