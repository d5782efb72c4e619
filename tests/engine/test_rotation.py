"""`rotate_model`: the function stays, quantization gets better, and what can't be rotated is refused or undone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import detent
from detent.config.transforms import RotationConfig
from detent.errors import DetentError
from detent.nn.sequential import members_of
from detent.structure import find_structure
from detent.transforms.rotation import random_tokens, rotate_model

transformers = pytest.importorskip("transformers")

VOCABULARY = 60
DYNAMIC4 = {"num_bits": 4, "type": "dynamic", "block_sizes": {-1: None}}
W4A4 = {
    "*weight_quantizer": {"num_bits": 4, "axis": 0},
    "*input_quantizer": DYNAMIC4,
    "*lm_head*": {"enable": False},
    "*embed*": {"enable": False},
    "*wte*": {"enable": False},
    "*wpe*": {"enable": False},
    "default": {"enable": False},
}
KV4 = {**W4A4, "*[kv]_bmm_quantizer": DYNAMIC4}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
#: Four heads of five channels.
ODD_HEADS = {"hidden_size": 20, "word_embed_proj_dim": 20, "ffn_dim": 40}
NARROW = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32}


def model_of(name: str, **changes: Any) -> Any:
    """A small model with random weights, norms and biases, none of them trivial."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **{**SIZES, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if p.dim() == 1:
                offset = 0.0 if parameter_name.endswith("bias") or "gemma" in name else 1.0
                p.copy_(offset + 0.3 * torch.randn_like(p))
            else:
                p.mul_(5)
    return model


def planted(model: Any, factor: float = 30.0) -> Any:
    """The same function with outlier channels behind each norm of a Llama."""
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                norm.weight[3::11] *= factor
                for reader in readers:
                    reader.weight[:, 3::11] /= factor
    return model


def quantized(model: nn.Module, cfg: dict[str, Any] = W4A4) -> nn.Module:
    return detent.quantize(model, {"quant_cfg": cfg, "algorithm": None}, strict=False)


@torch.no_grad()
def logits(model: nn.Module, *, rounding: bool = True) -> Tensor:
    if not rounding:
        detent.disable_quantizer(model, "*")
    return random_tokens(model)(model).logits.double()


ARCHITECTURES = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "gemma": {"head_dim": 8},
    "qwen3": {"head_dim": 8},
    "gpt2": NARROW,
    "gptj": {**NARROW, "rotary_dim": 4},
    "gpt_neox": {},
    "opt": {"word_embed_proj_dim": 24, "ffn_dim": 40},
    "phi": {"hidden_size": 32},
    "phi3": {},
    "cohere": {},
    "olmo": {},
    "starcoder2": {},
    "mixtral": {"num_local_experts": 3},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_function_is_unchanged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms with and without weight, offset or bias, LayerNorm, parallel blocks, fused qkv, Conv1D, fused experts."""
    monkeypatch.setattr("detent.transforms.rotation._objective", lambda *_: None)  # whatever rounding makes of it
    model = model_of(name.split()[0], **ARCHITECTURES[name])
    before = logits(model)
    quantized(model, KV4)  # which takes experts apart
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    structure = find_structure(model)
    report = rotate_model(model, structure, RotationConfig(random=True, random2=True))
    assert [p.name for p in report.parts if p.where][:2] == ["R1", "R2"]
    after = logits(model, rounding=False)
    torch.testing.assert_close(after, before, rtol=0, atol=2e-5 * float(before.abs().max()))
    for norm in structure.stream.norms:
        values = [model.get_parameter(f"{norm.name}.weight")] if norm.fold else []
        assert all(torch.equal(v, torch.full_like(v, 0.0 if norm.fold == "offset_norm" else 1.0)) for v in values)
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, weights.get(n, torch.empty(0)))]
    assert len(changed) > 10
    assert set(changed) <= set(report.changed)


def test_r1_gives_the_rotated_stream() -> None:
    """What a block writes is what it wrote before, times R."""
    model = model_of("llama")
    states: list[Tensor] = []
    model.model.layers[1].register_forward_hook(lambda *args: states.append(args[-1].detach().double()))
    logits(model)
    rotate_model(model, find_structure(model), RotationConfig(r2=False))
    states.clear()
    logits(model)
    rotated = states[-1]
    plain = model_of("llama")
    plain.model.layers[1].register_forward_hook(lambda *args: states.append(args[-1].detach().double()))
    logits(plain)
    from detent.nn.hadamard_matrices import hadamard_matrix

    expected = states[-1] @ hadamard_matrix(24).double() / 24**0.5
    torch.testing.assert_close(rotated, expected, rtol=1e-4, atol=1e-4)


def test_tied_embeddings_are_untied_and_reload(tmp_path: Path) -> None:
    model = model_of("llama", tie_word_embeddings=True)
    report = rotate_model(model, find_structure(model))
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False
    assert "lm_head.weight" in report.changed
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("cfg", [W4A4, KV4], ids=["W4A4", "W4A4KV4"])
def test_four_bits_come_nearer_to_a_model_with_outliers(cfg: dict[str, Any]) -> None:
    right = logits(model_of("llama")).log_softmax(-1)

    def divergence(model: nn.Module) -> float:
        ours = logits(model).log_softmax(-1)
        return float((right.exp() * (right - ours)).sum(-1).mean())

    without = divergence(quantized(planted(model_of("llama")), cfg))
    model = quantized(planted(model_of("llama")), cfg)
    report = rotate_model(model, find_structure(model))
    assert {p.name for p in report.parts if p.where} == {"R1", "R2", "R4"} | ({"R3"} if cfg is KV4 else set())
    assert divergence(model) < 0.5 * without
    assert report.before == pytest.approx(without)
    assert report.after == pytest.approx(divergence(model))


def test_online_rotations_live_in_quantizers_and_are_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detent.transforms.rotation._objective", lambda *_: None)
    model = quantized(planted(model_of("llama")), KV4)
    rotate_model(model, find_structure(model), RotationConfig(r1=False, r2=False))
    layer = model.model.layers[0]
    for quantizer in (
        layer.mlp.down_proj.input_quantizer,
        layer.self_attn.k_bmm_quantizer,
        layer.self_attn.q_bmm_quantizer,
    ):
        assert members_of(quantizer)[0].fused_rotation is not None
    assert not layer.self_attn.q_bmm_quantizer.is_enabled
    detent.save(model, tmp_path / "model.safetensors")
    again = detent.restore(model_of("llama"), tmp_path / "model.safetensors")
    assert torch.equal(logits(again), logits(model))


def test_ranges_found_before_are_forgotten() -> None:
    model = quantized(planted(model_of("llama")))
    detent.calibrate(model, "max")
    quantizer = model.model.layers[0].mlp.up_proj.weight_quantizer
    assert quantizer.is_calibrated
    rotate_model(model, find_structure(model))
    assert not quantizer.is_calibrated


def test_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detent.transforms.rotation._objective", lambda *_: None)
    model = model_of("llama", tie_word_embeddings=True).to(torch.bfloat16)
    report = rotate_model(model, find_structure(model))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert report.change < 0.1


def test_widths_without_a_hadamard_matrix_get_blocks() -> None:
    model = quantized(planted(model_of("llama", intermediate_size=94)))
    report = rotate_model(model, find_structure(model))
    sizes = {part.name: part.size for part in report.parts}
    assert sizes["R1"] == "24 channels"
    assert sizes["R4"] == "94 channels in blocks of 2"
    assert "R4: 94 channels in blocks of 2 at 2 places" in [str(p) for p in report.parts]


# ---- refusals -------------------------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, Any]:
    tensors = {n: t.detach().clone() for n, t in model.state_dict().items()}
    attributes = {n: repr(m) for n, m in model.named_modules() if "quantizer" in n}
    return {"tensors": tensors, "attributes": attributes, "tied": model.config.tie_word_embeddings}


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert before["tensors"].keys() == after["tensors"].keys()
    assert all(torch.equal(t, after["tensors"][n]) for n, t in before["tensors"].items())
    assert (before["attributes"], before["tied"]) == (after["attributes"], after["tied"])


#: What can be rotated where a norm stands between a block and the stream, or more than one reads it.
WITHOUT_R1: dict[str, tuple[dict[str, Any], set[str]]] = {
    "olmo2": ({}, {"R2", "R3", "R4"}),
    "gemma2": ({"head_dim": 8}, {"R2", "R3", "R4"}),
    "gemma3_text": ({"head_dim": 8}, {"R2", "R3", "R4"}),
    "glm4": ({"head_dim": 8}, {"R2", "R3", "R4"}),
}


@pytest.mark.parametrize("name", WITHOUT_R1)
def test_where_the_stream_cannot_be_rotated_the_rest_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detent.transforms.rotation._objective", lambda *_: None)
    changes, expected = WITHOUT_R1[name]
    model = model_of(name, **changes)
    right = logits(model)
    model = quantized(model, KV4)
    before, structure = snapshot(model), find_structure(model)
    with pytest.raises(DetentError, match=r"R1: the residual stream can't be rotated: .*norm.*; set r1=False"):
        rotate_model(model, structure, RotationConfig(r1=True))
    assert_same(model, before)
    report = rotate_model(model, structure)
    r1, *rest = report.parts
    assert str(r1).startswith("R1: not done (the residual stream can't be rotated: ")
    assert {part.name for part in rest if part.where} == expected
    torch.testing.assert_close(logits(model, rounding=False), right, rtol=0, atol=2e-5 * float(right.abs().max()))


def test_what_was_not_rotated_is_told_to_the_user(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("detent.transforms.rotation._objective", lambda *_: None)
    model = model_of("olmo2")
    detent.quantize(model, {"quant_cfg": W4A4, "algorithm": ["rotation", "max"]}, strict=False)
    assert any("R1: not done (the residual stream can't be rotated" in r.getMessage() for r in caplog.records)
    with pytest.raises(DetentError, match="R1: the residual stream can't be rotated"):
        detent.quantize(
            model_of("olmo2"), {"quant_cfg": W4A4, "algorithm": {"method": "rotation", "r1": True}}, strict=False
        )


@pytest.mark.parametrize("part", ["writers", "readers", "embeddings"])
def test_a_structure_that_misses_something_is_noticed(part: str) -> None:
    model = quantized(model_of("llama", tie_word_embeddings=True))
    structure = find_structure(model)
    stream = replace(structure.stream, **{part: getattr(structure.stream, part)[1:]})
    before = snapshot(model)
    with pytest.raises(DetentError, match="R1: it would change the model's outputs by"):
        rotate_model(model, replace(structure, stream=stream), RotationConfig(r1=True))
    assert_same(model, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    report = rotate_model(model, replace(structure, stream=stream), RotationConfig(r2=False, r4=True))
    assert "it would change the model's outputs by" in report.parts[0].reason
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, before["tensors"]["lm_head.weight"])


def test_heads_that_would_change_the_function_are_left() -> None:
    model = quantized(planted(model_of("llama")))
    structure = find_structure(model)
    sites = tuple(
        replace(s, fold=replace(s.fold, channels=tuple(reversed(range(12))) * 2)) if s.name.endswith("o_proj") else s
        for s in structure.sites
    )
    report = rotate_model(model, replace(structure, sites=sites))
    r2 = next(p for p in report.parts if p.name == "R2")
    assert r2.where == ()
    assert "aren't heads of 6 neighbouring rows" in r2.reason


def test_rotations_that_make_rounding_worse_are_taken_back() -> None:
    model = quantized(model_of("llama", tie_word_embeddings=True))
    with torch.no_grad():  # weights on their grid already, so that rounding loses nothing
        detent.calibrate(model, "max")
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.weight_quantizer.is_enabled:
                module.weight.copy_(module.quantized_weight())
        detent.disable_quantizer(model, "*input_quantizer")
    before = snapshot(model)
    report = rotate_model(model, find_structure(model))
    assert "undone, since it raised the error" in report.notice
    assert all(part.where == () for part in report.parts)
    assert report.changed == ()
    assert_same(model, before)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rotation_size": 16}, "width of 24 cannot be rotated in blocks of 16, which doesn't divide it"),
        ({"rotation_size": 6}, "has no Hadamard matrix; the largest block that can be used is 24"),
        ({"r3": True, "r1": False}, "R3: no Hadamard matrix exists for a width of 5"),
        ({"rotation_size": 12}, "R4: model.layers.0.mlp.down_proj: a width of 40 cannot be rotated in blocks of 12"),
    ],
)
def test_sizes_that_cannot_be(config: dict[str, Any], words: str) -> None:
    model = quantized(model_of("opt", **ODD_HEADS) if "r3" in config else model_of("llama"), KV4)
    before = snapshot(model)
    with pytest.raises(DetentError, match=words):
        rotate_model(model, find_structure(model), RotationConfig(**config))
    assert_same(model, before)


def test_odd_heads_keep_their_keys_where_nobody_insists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detent.transforms.rotation._objective", lambda *_: None)
    model = quantized(model_of("opt", **ODD_HEADS), KV4)
    report = rotate_model(model, find_structure(model))
    assert {p.name: bool(p.where) for p in report.parts} == {"R1": True, "R2": False, "R3": False, "R4": True}
    assert "no Hadamard matrix exists for a width of 5" in report.parts[1].reason
    assert "no Hadamard matrix exists for a width of 5" in report.parts[2].reason


def test_online_rotations_need_quantizers() -> None:
    model = model_of("llama")
    with pytest.raises(DetentError, match="R3 turns queries and keys in quantizers"):
        rotate_model(model, find_structure(model), RotationConfig(r3=True))
    with pytest.raises(DetentError, match="R4 turns the input"):
        rotate_model(model, find_structure(model), RotationConfig(r4=True))
    with pytest.raises(DetentError, match="nothing was rotated"):
        rotate_model(model, find_structure(model), RotationConfig(r1=False, r2=False))


def test_rotation_comes_before_scaling() -> None:
    model = quantized(model_of("llama"))
    model.model.layers[0].mlp.up_proj.input_quantizer.pre_quant_scale = torch.ones(24)
    with pytest.raises(DetentError, match="name rotation first"):
        rotate_model(model, find_structure(model))


def test_any_model_with_a_probe_of_its_own() -> None:
    model = model_of("llama").model
    ids = torch.arange(8)[None]
    structure = find_structure(model)
    if structure.stream is None or not structure.stream.rotatable:  # its output is a norm of the stream
        with pytest.raises(DetentError, match="R1"):
            rotate_model(model, structure, RotationConfig(r1=True), lambda m: m(input_ids=ids))
    report = rotate_model(model, structure, RotationConfig(r1=False), lambda m: m(input_ids=ids))
    assert report.change < 1e-5
    with pytest.raises(DetentError, match="has to return a tensor"):
        rotate_model(model, structure, RotationConfig(r1=False), lambda m: None)
    with pytest.raises(DetentError, match="pass run="):
        rotate_model(nn.Linear(2, 2), structure)
