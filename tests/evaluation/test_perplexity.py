"""Perplexity against a plain float64 sum over every predicted token."""

from __future__ import annotations

import math
import random
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detent.data.text import TextSource
from detent.errors import DetentError
from detent.evaluation import evaluation_ids, perplexity
from detent.progress import use_reporter
from tiny_language_model import FIRST_WORD_ID, VOCABULARY, WORDS, ids, make_model, make_tokenizer, words


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(positions=16)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(FIRST_WORD_ID, VOCABULARY, (16 * 4 + 5,), generator=torch.Generator().manual_seed(0))


def expected_nll(model: Any, tokens: Tensor, window: int) -> tuple[float, int]:
    """Total negative log-likelihood and number of predicted tokens, one token at a time."""
    total, count = 0.0, 0
    for start in range(0, tokens.numel(), window):
        piece = tokens[start : start + window]
        if piece.numel() < 2:
            continue
        with torch.no_grad():
            logits = model(input_ids=piece[None]).logits[0].double()
        for position in range(piece.numel() - 1):
            row = logits[position]
            total += (torch.logsumexp(row, 0) - row[piece[position + 1]]).item()
            count += 1
    return total, count


@pytest.mark.parametrize("window", [2048, 16, 7, 2])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_equals_the_definition(model: Any, tokens: Tensor, window: int, batch_size: int) -> None:
    result = perplexity(model, tokens, window=window, batch_size=batch_size)
    used = min(window, 16)
    nll, count = expected_nll(model, tokens, used)
    assert result.nll == pytest.approx(nll, rel=1e-6)
    assert result.tokens == count
    assert result.perplexity == pytest.approx(math.exp(nll / count), rel=1e-6)
    assert result.window == used
    assert result.windows == math.ceil(tokens.numel() / used) - (tokens.numel() % used == 1)


def test_chunks_of_logits_change_nothing(model: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = perplexity(model, tokens)
    monkeypatch.setattr(sys.modules["detent.evaluation.perplexity"], "_CHUNK_LOGITS", 3 * VOCABULARY)
    assert perplexity(model, tokens).nll == pytest.approx(whole.nll, rel=1e-12)


def test_low_precision_logits_are_widened(model: Any, tokens: Tensor) -> None:
    half = make_model(positions=16).bfloat16()
    nll, count = expected_nll(half, tokens, 16)
    assert perplexity(half, tokens).perplexity == pytest.approx(math.exp(nll / count), rel=1e-5)


def test_max_windows(model: Any, tokens: Tensor) -> None:
    assert perplexity(model, tokens, max_windows=2) == perplexity(model, tokens[:32])
    assert perplexity(model, tokens, max_windows=99) == perplexity(model, tokens)


def test_uniform_model_has_the_size_of_its_vocabulary() -> None:
    class Uniform(nn.Module):
        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 50))

    assert perplexity(Uniform(), torch.arange(40)).perplexity == pytest.approx(50, rel=1e-6)


def test_text_and_its_ids_give_the_same(model: Any) -> None:
    tokenizer = make_tokenizer()
    texts = [" ".join(random.Random(i).choices(WORDS, k=9)) for i in range(5)]
    by_ids = perplexity(model, evaluation_ids(texts, tokenizer))
    assert perplexity(model, texts, tokenizer) == by_ids
    assert perplexity(model, "\n\n".join(texts), tokenizer) == by_ids
    assert perplexity(model, TextSource(texts, "x"), tokenizer) == by_ids


def test_documents_are_joined_and_begin_once() -> None:
    found = evaluation_ids(TextSource([words(1, 2), words(3)], "x"), make_tokenizer())
    assert found.tolist() == [1, *ids(1, 2, 3)]


def test_shape_with_a_batch_dimension(model: Any, tokens: Tensor) -> None:
    assert perplexity(model, tokens[None]) == perplexity(model, tokens)


def test_mode_is_left_as_it_was(tokens: Tensor) -> None:
    model = make_model(positions=16)
    evaluated = perplexity(model, tokens)
    model.config.attention_dropout = 0.5
    model.train()
    assert perplexity(model, tokens) == evaluated
    assert all(module.training for module in model.modules())


def test_progress(model: Any, tokens: Tensor) -> None:
    seen: list[tuple[str, int, int]] = []
    with use_reporter(lambda *event: seen.append(event)):
        perplexity(model, tokens)
    assert seen[0] == ("Measuring perplexity", 0, 5)
    assert seen[-1] == ("Measuring perplexity", 5, 5)


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"window": 1}, "window must be at least 2"),
            ({"batch_size": 0}, "batch_size must be at least 1"),
            ({"max_windows": 0}, "max_windows must be at least 1"),
        ],
    )
    def test_numbers(self, model: Any, tokens: Tensor, arguments: dict[str, int], message: str) -> None:
        with pytest.raises(DetentError, match=message):
            perplexity(model, tokens, **arguments)

    @pytest.mark.parametrize("bad", [torch.arange(1), torch.zeros(2, 8, dtype=torch.int64), torch.zeros(8)])
    def test_ids(self, model: Any, bad: Tensor) -> None:
        with pytest.raises(DetentError, match="token ids must be integers"):
            perplexity(model, bad)

    def test_vocabulary(self, model: Any) -> None:
        with pytest.raises(DetentError, match=f"token id {VOCABULARY}, but the model has only {VOCABULARY} ids"):
            perplexity(model, torch.tensor([3, VOCABULARY]))

    def test_text_without_a_tokenizer(self, model: Any) -> None:
        with pytest.raises(DetentError, match="needs the model's tokenizer"):
            perplexity(model, "w1 w2")

    def test_short_text(self) -> None:
        with pytest.raises(DetentError, match="my.txt has 1 tokens"):
            evaluation_ids(TextSource(["w1"], "my.txt"), make_tokenizer(beginning_of_text=False))

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_not_finite_names_the_window(self, tokens: Tensor, value: float) -> None:
        model = make_model(positions=16)
        poisoned = 5
        clean = torch.where(tokens == poisoned, 6, tokens)
        clean[16 * 2 + 3] = poisoned
        with torch.no_grad():
            model.model.embed_tokens.weight[poisoned] = value
        with pytest.raises(DetentError, match=r"window 3 \(tokens 32 to 47 of the text\)"):
            perplexity(model, clean, batch_size=2)

    def test_no_logits(self, tokens: Tensor) -> None:
        with pytest.raises(DetentError, match="LlamaModel gives no logits"):
            perplexity(make_model().model, tokens)

    def test_meaningless_model(self) -> None:
        class Sure(nn.Module):
            def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
                logits = torch.zeros(*input_ids.shape, 50)
                logits[..., 0] = 1e6
                return SimpleNamespace(logits=logits)

        with pytest.raises(DetentError, match="1e\\+06 nats a token: its outputs are meaningless"):
            perplexity(Sure(), torch.arange(1, 40))
