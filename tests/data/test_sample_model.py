"""The sample model that ships with the package: small, complete, loadable offline, and worth quantizing."""

from __future__ import annotations

import json
import math
import struct
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

DATA = Path(str(files("detent") / "data"))
FOLDER = DATA / "sample_model"
TEXTS = DATA / "texts"
WINDOW = 512


@pytest.fixture(scope="module")
def config() -> dict:
    return json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def windows(tokenizer) -> list[torch.Tensor]:
    ids = tokenizer((TEXTS / "evaluation.txt").read_text(encoding="utf-8"), return_tensors="pt").input_ids
    return [w for w in ids.split(WINDOW, dim=1) if w.shape[1] > 1]


def load(dtype: torch.dtype = torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype, local_files_only=True).eval()


def perplexity(model, windows: list[torch.Tensor]) -> float:
    """By the definition: the exponential of the mean of -log p(token | those before it in the window), in float64."""
    losses = []
    with torch.no_grad():
        for window in windows:
            log_p = model(input_ids=window).logits[0, :-1].double().log_softmax(-1).numpy()
            losses.append(-log_p[np.arange(window.shape[1] - 1), window[0, 1:].numpy()])
    return math.exp(np.concatenate(losses).mean())


def rounded(weight: np.ndarray, bits: int, group: int = 128) -> np.ndarray:
    """Each run of `group` inputs on `2^bits` levels; the half width of the grid is the run's largest magnitude."""
    result = np.empty_like(weight)
    for start in range(0, weight.shape[1], group):
        part = weight[:, start : start + group]
        step = np.abs(part).max(axis=1, keepdims=True) * 2 / (2**bits - 1)
        result[:, start : start + group] = step * np.clip(np.rint(part / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return result


def rounded_model(bits: int):
    model = load()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.copy_(torch.from_numpy(rounded(parameter.double().numpy(), bits)))
    return model


@pytest.fixture(scope="module")
def baseline(windows) -> float:
    return perplexity(load(), windows)


def card_row() -> list[float]:
    """The card's perplexities on the built-in evaluation text: as stored, 8, 4 and 3 bits."""
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    row = next(line for line in card.splitlines() if line.startswith("| built-in evaluation text |"))
    return [float(cell) for cell in row.strip("|").split("|")[1:]]


def test_folder_is_small_and_complete():
    sizes = {p.name: p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()}
    assert sum(sizes.values()) <= 6_000_000, sizes
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(sizes)


def test_config_is_a_grouped_query_llama_with_widths_of_whole_groups(config):
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    heads, shared, width = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    assert shared < heads
    assert heads % shared == 0
    for size in (config["hidden_size"], config["intermediate_size"], heads * width, shared * width):
        assert size % 128 == 0


def test_every_tensor_on_disk_is_bfloat16():
    raw = (FOLDER / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    dtypes = {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    assert dtypes
    assert set(dtypes.values()) == {"BF16"}


def test_nothing_in_the_folder_names_a_path_of_the_machine_that_made_it():
    for path in FOLDER.glob("*.json"):
        assert "/work" not in path.read_text(encoding="utf-8")
        assert "/tmp" not in path.read_text(encoding="utf-8")


def test_linear_layers_divide_into_groups_of_128():
    for module in load().modules():
        if isinstance(module, torch.nn.Linear):
            assert module.in_features % 128 == 0
            assert module.out_features % 128 == 0


def test_tokenizer_spells_any_text_and_begins_with_its_begin_token(tokenizer, config):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (config["bos_token_id"], config["eos_token_id"])
    assert tokenizer.pad_token_id is not None
    assert len(tokenizer) == config["vocab_size"]
    text = 'She said: "I am thirty-one."\n\n  Café, 雨, \t🙂'
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text


def test_a_padded_batch_gives_the_logits_of_its_rows(tokenizer):
    texts = ["The old man", "It was upon a cold and windy evening in November that she"]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    model = load()
    with torch.no_grad():
        together = model(**batch).logits
        for row, text in enumerate(texts):
            alone = model(**tokenizer(text, return_tensors="pt")).logits[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, atol=1e-4, rtol=1e-4)


def test_perplexity_is_that_of_the_card(baseline):
    assert baseline == pytest.approx(card_row()[0], rel=2e-3)


def test_perplexity_means_something(windows, baseline, config):
    shuffled = [w[:, torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(0))] for w in windows]
    assert baseline < config["vocab_size"] / 20
    assert perplexity(load(), shuffled) > 5 * baseline


@pytest.mark.slow
def test_eight_bits_are_free_and_three_are_not(windows, baseline):
    eight, four, three = (perplexity(rounded_model(bits), windows) for bits in (8, 4, 3))
    assert [eight, four, three] == pytest.approx(card_row()[1:], rel=2e-3)
    assert eight < 1.005 * baseline
    assert eight < four < three
    assert three > 1.05 * baseline


def test_generation_runs(tokenizer):
    ids = tokenizer("The old man", return_tensors="pt").input_ids
    produced = load(torch.bfloat16).generate(ids, max_new_tokens=8, do_sample=False)
    assert produced.shape[1] > ids.shape[1]


@pytest.mark.parametrize(("name", "words"), [("calibration.txt", 3500), ("evaluation.txt", 3000)])
def test_texts_are_long_enough_and_do_not_repeat(name, words):
    text = (TEXTS / name).read_text(encoding="utf-8")
    assert len(text.split()) >= words
    paragraphs = text.strip().split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)


def test_the_two_texts_share_no_long_phrase():
    def phrases(name: str) -> set[tuple[str, ...]]:
        tokens = (TEXTS / name).read_text(encoding="utf-8").split()
        return {tuple(tokens[i : i + 8]) for i in range(len(tokens) - 7)}

    assert not phrases("calibration.txt") & phrases("evaluation.txt")
