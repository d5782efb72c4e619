"""``--quant_scheme auto``: a scheme for each layer, chosen block by block."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import detent as library
from cli.runner import Workplace, detent, save_checkpoint, small
from detent.data import load_texts
from detent.data.batches import token_batches
from detent.pretrained.loading import load_tokenizer

FORMATS = ("--auto_formats", "w_int4_per_channel_sym,w_int8_per_channel_sym")


@pytest.mark.slow
def test_what_is_written_weighs_what_was_asked_for(place: Workplace) -> None:
    scores = place.out.parent / "scores.json"
    outcome = place.quantize(
        *FORMATS, "--effective_bits", 7, "--auto_scores", scores, "--skip_evaluation", scheme="auto"
    )
    assert "Chosen formats" in outcome.out
    found = place.report["search"]
    assert 6 < found["effective_bits"] <= 7
    chosen = {name: row["format"] for row in found["choices"] for name in row["layers"]}
    assert len(chosen) == 2 * 7
    assert len(set(chosen.values())) > 1
    for block in (0, 1):
        for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({chosen[f"model.layers.{block}.{name}"] for name in names}) == 1
    tensors, bits, elements = load_file(place.out / "model.safetensors"), 0, 0
    for name in chosen:
        parts = [
            tensors[f"{name}.{part}"]
            for part in ("weight", "weight_packed", "weight_scale")
            if f"{name}.{part}" in tensors
        ]
        bits += sum(part.nbytes * 8 for part in parts)
        elements += load_file(place.model / "model.safetensors")[f"{name}.weight"].numel()
    assert bits / elements == pytest.approx(found["effective_bits"], rel=1e-12)
    # The same scores answer other questions.
    state = json.loads(scores.read_text("utf-8"))
    assert library.auto_quantize_table(state, {"effective_bits": 16})[0]["bits"] >= found["choices"][0]["bits"]


@pytest.mark.slow
def test_block_by_block_scores_are_those_of_a_model_in_memory(place: Workplace) -> None:
    from transformers import AutoModelForCausalLM

    scores = place.out.parent / "scores.json"
    formats = ["w_int4_per_channel_sym", "w_int8_per_channel_sym", "w_fp8_a_fp8"]
    # A budget that leaves everything in floating point is refused in the end, with the scores kept.
    flags = ("--auto_formats", ",".join(formats), "--effective_bits", 32, "--auto_scores", scores, "--skip_evaluation")
    outcome = place.quantize(*flags, scheme="auto", run=detent)
    assert "the budget leaves every layer in floating point" in outcome.err
    streamed = json.loads(scores.read_text("utf-8"))["candidate_stats"]
    batches = token_batches(load_texts(str(place.calibration), "calibration"), load_tokenizer(place.model), 32, 1, 4)
    model = AutoModelForCausalLM.from_pretrained(place.model, dtype=torch.float32)
    _, state = library.auto_quantize(
        model, {"effective_bits": 32}, formats, list(batches), method="curvature", disabled_layers="lm_head"
    )
    for name, unit in streamed.items():
        own = state["candidate_stats"][name]
        assert unit["module_names"] == own["module_names"]
        for option, score in zip(unit["formats"], unit["scores"], strict=True):
            assert score == pytest.approx(own["scores"][own["formats"].index(option)], rel=1e-3), (name, option)


@pytest.mark.parametrize(
    ("flags", "scheme", "said"),
    [
        ((), "auto", "--quant_scheme auto needs --auto_formats"),
        (("--effective_bits", "5"), "w_fp8_a_fp8", "--effective_bits belongs to a search: --quant_scheme auto"),
        (
            (*FORMATS, "--effective_bits", "3"),
            "auto",
            "effective_bits can't be 3: the least that the formats reach is 4.",
        ),
        ((*FORMATS, "--auto_bytes", "1kB"), "auto", "bytes can't be 1,000: the least that the formats reach is"),
        ((*FORMATS, "--auto_bytes", "much"), "auto", "bytes is a number, or a size such as '4GiB', not 'much'"),
        ((*FORMATS, "--group_size", "32"), "auto", "group sizes stand in the names of the formats"),
        (("--auto_formats", "w_int44"), "auto", "unknown scheme 'w_int44'"),
    ],
)
def test_mistakes(flags: tuple[str, ...], scheme: str, said: str, place: Workplace) -> None:
    outcome = place.quantize(*flags, scheme=scheme, run=detent)
    assert outcome.code == 2
    assert said in outcome.err.replace("\n", " ")
    assert not place.out.exists()


def test_a_plan_is_of_one_scheme(place: Workplace) -> None:
    outcome = detent("plan", "--model_dir", place.model, "--quant_scheme", "auto", *FORMATS)
    assert outcome.code == 2
    assert "auto" in outcome.err


@pytest.mark.slow
def test_experts_of_a_mixture_share_a_scheme(place: Workplace, tmp_path: Any) -> None:
    config = small("mixtral", num_local_experts=4, num_experts_per_tok=2)
    place = Workplace(save_checkpoint(tmp_path / "model", config), place.calibration, place.evaluation, place.out)
    place.quantize(*FORMATS, "--effective_bits", 6, "--skip_evaluation", scheme="auto")
    experts = [row for row in place.report["search"]["choices"] if "experts" in row["layers"][0]]
    assert [len(row["layers"]) for row in experts] == [12, 12]
