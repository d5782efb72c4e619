"""Attention that isn't behind transformers' attention interface, and caches of latents."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

import detent
import plain_quant
from cli.runner import small
from detent.errors import DetentError
from detent.nn.attention import attention_modules, caches_latents

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
MODELS: dict[str, dict[str, Any]] = {
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon with alibi": {"alibi": True, "multi_query": False},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2},
    "codegen": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
}


def random_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = small(name.partition(" ")[0], **MODELS[name])
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()


class Cache(DynamicCache):
    """A cache that holds what `change` makes of the keys (0) and values (1) of each layer."""

    def __init__(self, change: Callable[[int, int, Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def update(self, key: Tensor, value: Tensor, layer: int, *more: Any, **options: Any) -> Any:
        changed = self.change(layer, 0, key), self.change(layer, 1, value)
        return super().update(*changed, layer, *more, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_fp8_cache(name: str, dtype: torch.dtype) -> None:
    plain = random_model(name, dtype)
    ranges: dict[tuple[int, int], float] = {}

    def observe(layer: int, which: int, x: Tensor) -> Tensor:
        ranges[layer, which] = float(x.abs().amax())
        return x

    def fp8(layer: int, which: int, x: Tensor) -> Tensor:
        return plain_quant.small_floats(x.float(), ranges[layer, which]).to(x.dtype)

    with torch.no_grad():
        exact = plain(IDS, past_key_values=Cache(observe), use_cache=True).logits.float()
        expected = plain(IDS, past_key_values=Cache(fp8), use_cache=True).logits.float()
        model = detent.quantize(copy.deepcopy(plain), detent.FP8_KV_CFG, lambda m: m(IDS, use_cache=False))
        found = model(IDS, use_cache=False).logits.float()
    assert len(ranges) == 4
    modules = dict(attention_modules(model))
    assert len(modules) == 2
    for layer, module in enumerate(modules.values()):
        for which, quantizer in enumerate((module.k_bmm_quantizer, module.v_bmm_quantizer)):
            assert float(quantizer.amax) == pytest.approx(ranges[layer, which], rel=1e-6)
    on = [n for n, q in detent.model.conversion.named_quantizers(model) if q.is_enabled]
    assert len(on) == 4
    error = (expected - exact).norm()
    assert error > 0.002 * exact.norm()
    # In bfloat16, sums in another order round differently.
    assert (found - expected).norm() < (1e-5 if dtype == torch.float32 else 0.3) * error


class OwnAttention(nn.Module):
    """A causal self-attention as people write it, with or without PyTorch's function."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.fused = nn.Linear(32, 96), nn.Linear(32, 32), fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(-2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        scores = q @ k.transpose(-2, -1) / 8**0.5
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return F.softmax(scores.masked_fill(hidden, float("-inf")), -1) @ v


def by_hand(module: OwnAttention, x: Tensor, change: Callable[[str, Tensor], Tensor]) -> Tensor:
    """The output with queries, keys, values and probabilities changed, each row of the scores by itself."""
    q, k, v = (part.unflatten(-1, (4, 8)) for part in module.qkv(x).chunk(3, -1))
    q, k, v = change("q", q), change("k", k), change("v", v)
    scores = torch.einsum("bthc,bshc->bhts", q, k) / 8**0.5
    scores = scores + torch.full(scores.shape[-2:], float("-inf")).triu(1)
    result = torch.einsum("bhts,bshc->bthc", change("p", scores.softmax(-1)), v)
    return module.out(result.flatten(-2))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("sides", ["kv", "qkvp"])
def test_attention_of_ones_own(fused: bool, sides: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(OwnAttention(fused), nn.LayerNorm(32), OwnAttention(fused)).eval()
    x = torch.randn(2, 5, 32)
    plain = copy.deepcopy(model)
    detent.quantize(model, {"quant_cfg": {f"*[{sides}]_bmm_quantizer": {"num_bits": (4, 3)}}}, lambda m: m(x))

    def fp8(side: str, t: Tensor) -> Tensor:
        return plain_quant.small_floats(t, float(t.abs().amax())) if side in sides else t

    with torch.no_grad():
        first = by_hand(plain[0], x, fp8)
        torch.testing.assert_close(model[0](x), first, rtol=1e-5, atol=1e-5)
        detent.disable_quantizer(model, "*")
        assert torch.equal(model(x), plain(x))


def test_a_scale_a_token_belongs_to_a_token() -> None:
    """Keys come transposed to a product; a scale is that of a token of a head all the same."""
    torch.manual_seed(0)
    plain = OwnAttention(fused=False)
    x = torch.randn(2, 5, 32)
    cfg = {"*[kv]_bmm_quantizer": {"num_bits": 4, "block_sizes": {-1: None}, "type": "dynamic"}}
    model = detent.quantize(copy.deepcopy(plain), {"quant_cfg": cfg})

    def rows(side: str, t: Tensor) -> Tensor:
        return plain_quant.integers(t, t.abs().amax(-1, keepdim=True), 4) if side in "kv" else t

    with torch.no_grad():
        torch.testing.assert_close(model(x), by_hand(plain, x, rows), rtol=1e-5, atol=1e-5)


def test_padding_is_no_part_of_the_range() -> None:
    """BLOOM's keys are laid out as [batch * heads, channels, tokens]."""
    model = random_model("bloom")
    ids = IDS.flip(0)
    mask = torch.ones_like(ids)
    mask[1, :8] = 0
    detent.quantize(model, detent.FP8_KV_CFG, lambda m: m(input_ids=ids, attention_mask=mask))
    seen: list[Tensor] = []
    look = Cache(lambda layer, which, x: (seen.append(x), x)[1])
    plain = random_model("bloom")
    with torch.no_grad():
        plain(input_ids=ids, attention_mask=mask, past_key_values=look, use_cache=True)
    different = 0
    for index, x in enumerate(seen):
        module = model.transformer.h[index // 2].self_attention
        quantizer = (module.k_bmm_quantizer, module.v_bmm_quantizer)[index % 2]
        real = x.movedim(2, 1)[mask.bool()].abs().amax()
        assert float(quantizer.amax) == pytest.approx(float(real), rel=1e-6)
        different += bool(real < x.abs().amax())
    assert different


class Relative(nn.Module):
    """Scores with a second product in them: which of the two has the keys can't be told."""

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ x.transpose(-1, -2)) + (x @ x.flip(1).transpose(-1, -2))).softmax(-1) @ x


class Unsoftened(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x.softmax(-1)
        return x @ x.transpose(-1, -2) @ x


@pytest.mark.parametrize("kind", [Relative, Unsoftened])
def test_products_that_cannot_be_told_apart(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind())
    with pytest.raises(DetentError, match=f"0.k_bmm_quantizer: {kind.__name__} multiplies activations"):
        detent.quantize(model, detent.FP8_KV_CFG, lambda m: m(torch.randn(1, 3, 4)))


def test_an_error_inside_leaves_nothing_behind() -> None:
    model = detent.quantize(OwnAttention(True), detent.FP8_KV_CFG, lambda m: m(torch.randn(1, 3, 32)))
    before = torch._C._len_torch_function_stack()
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 3, 31))
    assert torch._C._len_torch_function_stack() == before


def test_saved_and_restored() -> None:
    x = torch.randn(1, 3, 32)
    torch.manual_seed(0)
    plain = OwnAttention(True)
    model = detent.quantize(copy.deepcopy(plain), detent.FP8_KV_CFG, lambda m: m(x))
    restored = detent.restore_from_detent_state(copy.deepcopy(plain), detent.detent_state(model))
    restored.load_state_dict(model.state_dict())
    for other in (restored, copy.deepcopy(model)):
        assert torch.equal(other(x), model(x))
    assert not torch.equal(model(x), plain(x))


def test_latents_are_found_by_structure() -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention
    from transformers.models.llama.modeling_llama import LlamaAttention
    from transformers.models.minicpm3.modeling_minicpm3 import MiniCPM3Attention

    kinds = (DeepseekV3Attention, MiniCPM3Attention, LlamaAttention, GptOssAttention)
    assert [caches_latents(kind) for kind in kinds] == [True, True, False, False]


@pytest.mark.parametrize("name", ["deepseek_v3", "falcon", "bloom"])
def test_generation_with_a_cache(name: str) -> None:
    model = detent.quantize(random_model(name), detent.FP8_KV_CFG, lambda m: m(IDS))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}
    with_cache = model.generate(IDS, use_cache=True, **settings)
    assert with_cache.shape[1] > IDS.shape[1]
    assert torch.equal(with_cache, model.generate(IDS, use_cache=False, **settings))


def test_latents_are_not_rotated() -> None:
    """Queries meet keys, not the latents that these are made of."""
    with pytest.raises(DetentError, match="self_attn.k_bmm_quantizer: rotates what DeepseekV3Attention caches"):
        detent.quantize(random_model("deepseek_v3"), detent.NVFP4_KV_ROTATE_CFG, lambda m: m(IDS))


@pytest.mark.parametrize("name", ["gptj", "bloom"])
def test_rotated_keys_meet_rotated_queries(name: str) -> None:
    model = random_model(name)
    with torch.no_grad():
        before = model(IDS).logits
        detent.quantize(model, detent.NVFP4_KV_ROTATE_CFG, lambda m: m(IDS))
        for module in (module for _, module in attention_modules(model)):
            module.k_bmm_quantizer.format = module.v_bmm_quantizer.format = detent.TensorQuantizer().format
        detent.model.conversion.settle(model)
        after = model(IDS).logits
    assert 0 < (after - before).norm() < 0.1 * before.norm()


@pytest.mark.slow
def test_compiled_it_computes_the_same() -> None:
    x = torch.randn(1, 3, 32)
    for fused in (True, False):
        model = detent.quantize(OwnAttention(fused), detent.FP8_KV_CFG, lambda m: m(x))
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x), rtol=1e-5, atol=1e-6)
