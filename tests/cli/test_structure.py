"""`detent structure`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.runner import detent, save_checkpoint, small, succeed
from detent.structure import find_structure


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("phi3") / "model", small("phi3"))


def test_tree(phi3: Path) -> None:
    out = succeed("structure", phi3).out
    assert out.splitlines()[0] == "Phi3ForCausalLM"
    for line in (
        "residual stream of 64 channels: embeddings model.embed_tokens, 5 readers (rms norms), 4 writers, head lm_head",
        "can be rotated",
        "model.layers.0 ... model.layers.1: 2 blocks, all alike",
        "self_attn.qkv_proj [keys, values]",
        "reads 64 channels; scale folds into the weight of input_layernorm",
        "scale folds into rows of self_attn.qkv_proj (rows 96-111, 96-127, 112-127; 2 channels share a row)",
        "reads 128 channels; scale folds into rows of mlp.gate_up_proj (rows 128-255)",
        "outside the blocks",
    ):
        assert line in out


def test_json_is_what_the_model_shows(phi3: Path) -> None:
    from transformers import AutoModelForCausalLM

    found = succeed("structure", phi3, "--json").json
    expected = find_structure(AutoModelForCausalLM.from_pretrained(phi3)).to_dict()
    folds = [site["fold"] for site in expected["sites"] if site["fold"]["channels"]]
    told = [site["fold"] for site in found["sites"] if site["fold"]["channels"]]
    for fold, ranges in zip(folds, told, strict=True):
        assert [i for first, last in ranges["channels"] for i in range(first, last + 1)] == list(fold["channels"])
    assert found["model"] == "Phi3ForCausalLM"
    assert found["blocks"] == ["model.layers.0", "model.layers.1"]
    assert found["stream"]["rotatable"]
    assert [site["name"] for site in found["sites"]] == [site["name"] for site in expected["sites"]]


def test_no_weights_are_needed(phi3: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((phi3 / "config.json").read_text())
    assert succeed("structure", tmp_path).out == succeed("structure", phi3).out


def test_an_encoder(tmp_path: Path) -> None:
    config = small("bert", num_key_value_heads=None).to_dict() | {"architectures": ["BertForMaskedLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = succeed("structure", tmp_path).out
    assert out.startswith("BertForMaskedLM")
    assert "bert.encoder.layer.1: 1 block" in out
    assert "no fold: attention.output.LayerNorm also feeds output.LayerNorm with no weight in between" in out


def test_overrides(phi3: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    table.write_text('{"sites": {"*.o_proj": null}}')
    out = succeed("structure", phi3, "--overrides", table).out
    assert "reads 64 channels; no fold: switched off by the override '*.o_proj'" in out


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "config.json"),
        ("{", "config.json"),
        ('{"model_type": "unheard_of"}', "unheard_of"),
        ('{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 10}', ""),
    ],
)
def test_bad_folders(config: str | None, message: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    outcome = detent("structure", tmp_path)
    assert outcome.code == 2
    assert len(outcome.err.strip().splitlines()) == 1
    assert message in outcome.err


def test_bad_overrides(phi3: Path, tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text('{"sites": {"*.out": null}}')
    outcome = detent("structure", phi3, "--overrides", tmp_path / "table.json")
    assert outcome.code == 2
    assert "'*.out' matches no site" in outcome.err
