"""Structures of transformers' architectures: what is found, and that each fold leaves the function unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from detent.structure import Structure, find_structure
from structure.by_hand import apply_all, rotate
from structure.zoo import DECODERS, OTHERS, inputs, make

NORM, OFFSET, ROWS = "norm", "offset_norm", "rows"
_LLAMA = {"q_proj k_proj v_proj": NORM, "o_proj": "v_proj", "gate_proj up_proj": NORM, "down_proj": "up_proj"}
_OFFSET = {key: OFFSET if value == NORM else value for key, value in _LLAMA.items()}
_FUSED = {"qkv_proj": NORM, "o_proj": "qkv_proj", "gate_up_proj": NORM, "down_proj": "gate_up_proj"}
_MIXTURE = {"q_proj k_proj v_proj": NORM, "o_proj": "v_proj", "gate gate_up_proj": NORM, "down_proj": "experts"}

#: The folds of the last block: readers, and the kind of norm or the module whose rows take the scale; None for no fold.
EXPECTED: dict[str, dict[str, str | None]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "granite": _LLAMA,
    "gemma": _OFFSET,
    "gemma2": _OFFSET,
    "gemma3_text": _OFFSET,
    "phi3": _FUSED,
    "glm": {**_LLAMA, "gate_up_proj": NORM, "down_proj": "gate_up_proj", "gate_proj up_proj": "absent"},
    "phi": {"q_proj k_proj v_proj fc1": NORM, "dense": "v_proj", "fc2": None},
    "gptj": {"q_proj k_proj v_proj fc_in": NORM, "out_proj": "v_proj", "fc_out": None},
    "gpt2": {"c_attn": NORM, "c_fc": NORM},
    "gpt_neox": {"query_key_value": NORM, "dense": "query_key_value", "dense_h_to_4h": NORM, "dense_4h_to_h": None},
    "bloom": {"query_key_value": NORM, "dense": "query_key_value", "dense_h_to_4h": NORM, "dense_4h_to_h": None},
    "falcon": {"query_key_value": NORM, "dense": "query_key_value", "dense_h_to_4h": NORM, "dense_4h_to_h": None},
    "opt": {"q_proj k_proj v_proj": NORM, "out_proj": "v_proj", "fc1": NORM, "fc2": "fc1"},
    "cohere": {"q_proj k_proj v_proj gate_proj up_proj": NORM, "o_proj": "v_proj", "down_proj": "up_proj"},
    "olmo": {"q_proj k_proj v_proj": None, "o_proj": "v_proj", "gate_proj up_proj": None, "down_proj": "up_proj"},
    "olmo2": {"q_proj k_proj v_proj": None, "o_proj": "v_proj", "gate_proj up_proj": None, "down_proj": "up_proj"},
    "mixtral": _MIXTURE,
    "qwen3_moe": _MIXTURE,
    "gpt_oss": {"q_proj k_proj v_proj": NORM, "o_proj": "v_proj", "router gate_up_proj": NORM, "down_proj": None},
    "deepseek_v3": {"q_a_proj kv_a_proj_with_mqa": NORM, "q_b_proj": NORM, "kv_b_proj": NORM, "o_proj": "kv_b_proj"},
    "mamba": {"in_proj": NORM, "conv1d": "in_proj", "x_proj": None, "dt_proj": "x_proj", "out_proj": None},
    "bert": {"query key value": None, "intermediate.dense": None},
    "t5": {"q k v": NORM, "wi": NORM, "wo": "wi"},
    "vit": {"q_proj k_proj v_proj": NORM, "o_proj": "v_proj", "fc1": NORM, "fc2": None},
}
#: Norms on what is added to the stream.
_NORM_AFTER = "norm multiplies what is added to the stream"
NOT_ROTATABLE = {
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2", "glm4", "bloom"), _NORM_AFTER),
    "jetmoe": "reads something other than the sum",  # its attention's experts: more than the probe can tell apart
}


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[Any, Structure]]:
    return {}


def look(model_type: str, found: dict[str, tuple[Any, Structure]]) -> tuple[Any, Structure]:
    """A fresh model and its structure, found once."""
    if model_type not in found:
        model = make(model_type)
        found[model_type] = model, find_structure(model)
    return make(model_type), found[model_type][1]


def logits(model: Any, values: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        output = model(**values)
    return output.logits if hasattr(output, "logits") else output[0]


def kinds(structure: Structure) -> dict[str, str | None]:
    """The sites of the last block as `EXPECTED` tells them."""
    table: dict[str, str | None] = {}
    for site in structure.sites:
        if site.block != structure.blocks[-1]:
            continue
        last = [name.rpartition(".")[2] for name in site.weights]
        key = " ".join(last) if " ".join(last) not in table else ".".join(site.name.split(".")[-2:])
        fold = site.fold
        table[key] = None if fold is None else fold.module.rpartition(".")[2] if fold.kind == ROWS else fold.kind
    return table


@pytest.mark.parametrize("model_type", [*DECODERS, *OTHERS])
def test_every_fold_leaves_the_function_unchanged(model_type: str, found: dict[str, Any]) -> None:
    model, structure = look(model_type, found)
    assert structure.blocks
    assert structure.unread == ()
    values = inputs(model)
    before = logits(model, values)
    assert apply_all(model, structure) >= 2
    after = logits(model, values)
    # Some norms and routers compute in float32 whatever the model's dtype.
    assert (after - before).abs().max() < 2e-5 * before.abs().max()


@pytest.mark.parametrize("model_type", EXPECTED)
def test_what_is_found(model_type: str, found: dict[str, Any]) -> None:
    _, structure = look(model_type, found)
    table = kinds(structure)
    for readers, expected in EXPECTED[model_type].items():
        if expected == "absent":
            assert readers not in table
        elif readers == "intermediate.dense":
            assert all(site.fold is None for site in structure.sites if site.name.endswith(readers))
        else:
            assert table[readers] == expected, (readers, table)
    assert all(bool(site.reason) == (site.fold is None) for site in structure.sites)
    assert all(site.fold is None or site.fold.proved for site in structure.sites)


@pytest.mark.parametrize("model_type", DECODERS)
def test_blocks_and_attention(model_type: str, found: dict[str, Any]) -> None:
    model, structure = look(model_type, found)
    assert len(structure.blocks) == 2
    assert len({type(model.get_submodule(name)) for name in structure.blocks}) == 1
    if model_type == "mamba":
        assert structure.keys == structure.values == ()
    else:
        assert {name.split(".attn")[0] for name in structure.keys}
        for block in structure.blocks:
            for names in (structure.keys, structure.values):
                assert any(name.startswith(block) for name in names)
        assert not any("q_proj" in name or "query." in name for name in (*structure.keys, *structure.values))


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "phimoe", "deepseek_v3", "gpt_oss"])
def test_routers_and_experts(model_type: str, found: dict[str, Any]) -> None:
    _, structure = look(model_type, found)
    assert structure.routers
    assert all(name.rpartition(".")[2] in ("gate", "router") for name in structure.routers)
    assert all("experts" in name for name in structure.experts)
    for router in structure.routers:
        site = structure.site_of(router)
        assert site is not None
        assert site.router
        assert site.routed
        assert all("experts" in name for name in site.routed)


@pytest.mark.parametrize("model_type", DECODERS)
def test_the_residual_stream_rotates(model_type: str, found: dict[str, Any]) -> None:
    model, structure = look(model_type, found)
    stream = structure.stream
    assert stream is not None
    if model_type in NOT_ROTATABLE:
        assert not stream.rotatable
        assert NOT_ROTATABLE[model_type] in stream.reason
        return
    assert stream.rotatable, stream.reason
    assert stream.head is not None
    assert stream.embeddings
    with torch.no_grad():
        for norm in stream.norms:
            for name in norm.parameters[1:]:
                getattr(model.get_submodule(norm.name), name).zero_()
    values = inputs(model)
    before = logits(model, values)
    rotate(model, structure, stream)
    after = logits(model, values)
    assert (after - before).abs().max() < 1e-4 * before.abs().max()


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "mixtral", "gpt_oss", "gemma3_text", "deepseek_v2"])
def test_the_meta_device_shows_the_same(model_type: str, found: dict[str, Any]) -> None:
    _, structure = look(model_type, found)
    assert find_structure(make(model_type, device="meta")) == structure


def test_grouped_queries_share_rows(found: dict[str, Any]) -> None:
    """Six heads of eight channels over two heads of keys and values."""
    _, structure = look("llama", found)
    site = structure.site_of("model.layers.1.self_attn.o_proj")
    assert site is not None
    assert site.fold is not None
    assert site.fold.channels == tuple(head // 3 * 8 + i for head in range(6) for i in range(8))
    _, structure = look("phi3", found)
    site = structure.site_of("model.layers.1.self_attn.o_proj")
    assert site is not None
    assert site.fold is not None
    assert site.fold.channels == tuple(48 + 16 + head // 3 * 8 + i for head in range(6) for i in range(8))
