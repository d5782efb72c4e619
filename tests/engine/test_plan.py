"""The plan: every tensor once, with a format or a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cli.runner import save_checkpoint, small
from detent.checkpoints import Source
from detent.config import kv_cache_format, parse_scheme
from detent.errors import DetentError
from detent.plan.plan import Plan, make_plan, with_scale_dtype
from detent.pretrained.loading import load_config, model_on_meta


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("plan") / "llama")


def planned(folder: Path, scheme: str = "w_int4_per_group_sym", **options: Any) -> Plan:
    return make_plan(Source(folder), model_on_meta(load_config(folder)), parse_scheme(scheme), **options)


def test_each_tensor_once(llama: Path) -> None:
    plan = planned(llama)
    assert set(plan.parameters) | set(plan.kept) == set(Source(llama))
    assert set(plan.parameters) & set(plan.kept) == set()
    assert {f"{name}.weight" for name in plan.formats.layers} == set(plan.parameters)
    assert plan.formats.ignored == ("lm_head",)
    assert plan.kept["lm_head.weight"] == "output embedding, kept by default"
    assert plan.kept["model.embed_tokens.weight"] == "embedding"
    assert (plan.overlooked, plan.overlooked_share, plan.unties) == ({}, 0, False)


@pytest.mark.parametrize(
    ("scheme", "kv_cache", "needed"),
    [
        ("w_int4_per_group_sym", None, False),
        ("w_mx6_a_mx6", None, False),
        ("ptpc_fp8", None, False),
        ("w_fp8_a_fp8", None, True),
        ("w_fp4_a_fp4_scale_fp8", None, True),
        ("w_int4_per_group_sym", "fp8", True),
        ("w_int4_per_group_sym", "mxfp4", False),
    ],
)
def test_whether_data_is_needed(scheme: str, kv_cache: str | None, needed: bool, llama: Path) -> None:
    fmt = None if kv_cache is None else kv_cache_format(kv_cache)
    assert planned(llama, scheme, kv_cache=fmt).needs_data is needed


def test_exclusions(llama: Path) -> None:
    plan = planned(llama, exclude=["*.mlp.*", "model.layers.0"])
    assert set(plan.formats.layers) == {f"model.layers.1.self_attn.{n}_proj" for n in "qkvo"} | {"lm_head"}
    assert plan.kept["model.layers.1.mlp.up_proj.weight"] == "excluded by '*.mlp.*'"
    with pytest.raises(DetentError, match="'down_proj'"):
        planned(llama, exclude=["*.dwon_proj"])
    with pytest.raises(DetentError, match="every linear layer"):
        planned(llama, exclude=["*"])


def test_later_layer_rules_win_and_exclusions_win_over_all(llama: Path) -> None:
    rules = {"*.mlp.*": parse_scheme("w_int4_per_group_sym", 64), "*.up_proj": parse_scheme("w_int4_per_group_sym", 32)}
    plan = planned(llama, per_layer=rules, exclude=["model.layers.0.mlp.up_proj"], allow_unfused=True)
    formats = {name: str(layer.weight).split(",")[0] for name, layer in plan.formats.layers.items()}
    assert formats["model.layers.1.mlp.up_proj"] == "int4 per_group(32)"
    assert formats["model.layers.1.mlp.down_proj"] == "int4 per_group(64)"
    assert formats["model.layers.1.self_attn.q_proj"] == "int4 per_group(128)"
    assert "model.layers.0.mlp.up_proj" not in formats
    with pytest.raises(DetentError, match="group_size_per_layer"):
        planned(llama, per_layer={"*.nothing": parse_scheme("w_mx6")})


def test_tied_head(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "tied", small(tie_word_embeddings=True))
    assert not planned(folder).unties
    plan = planned(folder, exclude=[])
    assert plan.unties
    assert "lm_head" in plan.formats.layers
    assert "model.embed_tokens.weight" in plan.kept


def test_overlooked_share(tmp_path: Path) -> None:
    config = small("mixtral", num_local_experts=4, num_experts_per_tok=2)
    folder = save_checkpoint(tmp_path / "mixture", config)
    assert planned(folder).overlooked_share == 0


def test_scales_of_narrow_integers_are_in_the_models_dtype() -> None:
    int4, int8 = parse_scheme("w_int4_per_group_sym"), parse_scheme("w_int8_per_group_sym")
    assert "bfloat16 scale" in str(with_scale_dtype(int4, torch.bfloat16).weight)
    assert with_scale_dtype(int4, torch.float32) is int4
    assert with_scale_dtype(int8, torch.bfloat16) is int8
