"""Samples made from text by each rule, batches, and padding that no statistics see."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from detent.data.batches import (
    CalibrationBatches,
    check_vocabulary,
    current_token_mask,
    drop_padding,
    token_batches,
    token_mask,
)
from detent.data.documents import Conversation
from detent.data.text import TextSource
from detent.engine.data_loop import run_batches
from detent.errors import DetentError
from detent.model.scopes import evaluating
from detent.pretrained.facts import input_device, max_sequence_length, vocabulary_size
from detent.progress import use_reporter
from tiny_language_model import FIRST_WORD_ID, VOCABULARY, WORDS, ids, make_model, make_tokenizer, words

BOS = 1


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def lists(batches: CalibrationBatches) -> list[list[int]]:
    return [sample.tolist() for sample in batches.samples]


class TestDocuments:
    def test_first_texts_cut_to_length(self, tokenizer: Any) -> None:
        source = TextSource([words(1, 2), words(*range(9)), " ", words(5), words(6)], "x")
        batches = token_batches(source, tokenizer, seq_len=4, num_samples=3)
        assert lists(batches) == [[BOS, *ids(1, 2)], [BOS, *ids(0, 1, 2)], [BOS, *ids(5)]]
        assert batches.tokens == 9
        assert batches.notices == []

    def test_texts_of_one_token_are_no_samples(self) -> None:
        source = TextSource([words(1), words(2, 3)], "x")
        assert lists(token_batches(source, make_tokenizer(beginning_of_text=False), 4)) == [ids(2, 3)]

    def test_too_few_is_a_notice(self, tokenizer: Any) -> None:
        source = TextSource([words(1, 2)], "my.json", notice="be careful")
        notices = token_batches(source, tokenizer, 8, num_samples=5).notices
        assert notices[0] == "be careful"
        assert "my.json is enough for 1 calibration samples" in notices[1]
        assert "5 were asked for" in notices[1]

    def test_conversations_bring_their_own_special_tokens(self, tokenizer: Any) -> None:
        source = TextSource([Conversation((("user", words(1)), ("assistant", words(2))))], "x")
        assert lists(token_batches(source, tokenizer, 8)) == [[BOS, *ids(1, 2)]]
        templated = make_tokenizer()
        templated.chat_template = "{% for m in messages %}{{ m.content }} {{ eos_token }} {% endfor %}"
        assert lists(token_batches(source, templated, 8)) == [[*ids(1), 2, *ids(2), 2]]

    def test_the_tokenizer_keeps_no_setting(self, tokenizer: Any) -> None:
        before = tokenizer.backend_tokenizer.to_str()
        token_batches(TextSource([words(*range(40))], "x"), tokenizer, 4)
        assert tokenizer.backend_tokenizer.to_str() == before

    def test_progress_ends(self, tokenizer: Any) -> None:
        seen: list[tuple[str, int, int]] = []
        with use_reporter(lambda *event: seen.append(event)):
            token_batches(TextSource([words(1, 2), " ", words(3)], "x"), tokenizer, 4, num_samples=3)
        assert seen[0] == ("Tokenizing", 0, 3)
        assert seen[-1] == ("Tokenizing", 3, 3)


class TestRunningText:
    text = [words(0, 1, 2), words(3, 4), words(5, 6, 7, 8)]  # with <s>, ten tokens

    def test_windows(self, tokenizer: Any) -> None:
        source = TextSource(self.text, "x", sampling="windows")
        assert lists(token_batches(source, tokenizer, 4)) == [[BOS, *ids(0, 1, 2)], ids(3, 4, 5, 6)]
        assert lists(token_batches(source, tokenizer, 4, num_samples=1)) == [[BOS, *ids(0, 1, 2)]]

    def test_a_text_shorter_than_a_window_is_one_sample(self, tokenizer: Any) -> None:
        source = TextSource(self.text, "x", sampling="windows")
        assert lists(token_batches(source, tokenizer, 64)) == [[BOS, *ids(*range(9))]]

    def test_long_text_is_tokenized_in_pieces(self, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = lists(token_batches(TextSource(self.text, "x", sampling="windows"), tokenizer, 3))
        monkeypatch.setattr("detent.data.batches._PIECE_CHARACTERS", 5)
        assert lists(token_batches(TextSource(self.text, "x", sampling="windows"), tokenizer, 3)) == whole

    def test_random_windows(self, tokenizer: Any) -> None:
        text = words(*(i % 50 for i in range(99)))
        every = torch.tensor([BOS, *ids(*(i % 50 for i in range(99)))])
        draw = random.Random(0)
        starts = [draw.randint(0, 100 - 7 - 1) for _ in range(5)]
        source = TextSource([text], "x", sampling="random_windows")
        batches = token_batches(source, tokenizer, 7, num_samples=5)
        assert lists(batches) == [every[start : start + 7].tolist() for start in starts]
        assert lists(token_batches(source, tokenizer, 7, num_samples=5, seed=1)) != lists(batches)

    def test_short_documents(self, tokenizer: Any) -> None:
        source = TextSource([words(*range(9)), words(1, 2), words(3), words(4, 5)], "x", sampling="short_documents")
        batches = token_batches(source, tokenizer, 4, num_samples=3)
        # <s> 1 2 <s> | 3 <s> 4 5
        assert lists(batches) == [[BOS, *ids(1, 2), BOS], [*ids(3), BOS, *ids(4, 5)]]
        assert batches.notices == []


class TestErrors:
    @pytest.mark.parametrize("sampling", ["documents", "windows", "short_documents", "random_windows"])
    @pytest.mark.parametrize("texts", [[], [" "], ["w1"]])
    def test_no_usable_text(self, sampling: Any, texts: list[str]) -> None:
        source = TextSource(texts, "my.json", sampling=sampling)
        with pytest.raises(DetentError, match="no usable calibration text in my.json"):
            token_batches(source, make_tokenizer(beginning_of_text=False), 8)

    @pytest.mark.parametrize(
        ("numbers", "message"),
        [((1, 1, 1), "seq_len must be at least 2"), ((4, 0, 1), "batch_size"), ((4, 1, 0), "num_samples")],
    )
    def test_numbers(self, tokenizer: Any, numbers: tuple[int, int, int], message: str) -> None:
        with pytest.raises(DetentError, match=message):
            token_batches(TextSource([words(1, 2)], "x"), tokenizer, *numbers)

    def test_vocabulary(self, tokenizer: Any) -> None:
        batches = token_batches(TextSource([words(1, 59)], "x"), tokenizer, 8)
        check_vocabulary(batches, VOCABULARY)
        with pytest.raises(
            DetentError, match=f"token id {VOCABULARY - 1}, but the model has only {VOCABULARY - 1} ids"
        ):
            check_vocabulary(batches, VOCABULARY - 1)


class TestBatches:
    samples = [torch.arange(3, 3 + n) for n in (3, 5, 3, 2, 5, 3)]

    def test_no_padding(self) -> None:
        batches = CalibrationBatches(self.samples, batch_size=2)
        assert [batch["input_ids"].shape for batch in batches] == [(2, 5), (2, 3), (1, 3), (1, 2)]
        assert len(batches) == 4
        assert all(batch["attention_mask"].all() for batch in batches)

    def test_padding(self) -> None:
        batches = CalibrationBatches(self.samples, batch_size=4, padding="right")
        first, second = batches
        assert len(batches) == 2
        assert first["input_ids"].tolist() == [[3, 4, 5, 6, 7], [3, 4, 5, 6, 7], [3, 4, 5, 0, 0], [3, 4, 5, 0, 0]]
        assert first["attention_mask"].tolist() == [[1] * 5, [1] * 5, [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]
        assert second["input_ids"].tolist() == [[3, 4, 5], [3, 4, 0]]

    def test_again_and_again(self) -> None:
        batches = CalibrationBatches(self.samples, batch_size=2)
        first, second = list(batches), list(batches)
        assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True))


class TestDropPadding:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])

    def test_leading_dimensions(self) -> None:
        x = torch.arange(12.0).view(2, 3, 2)
        real = torch.tensor([[0.0, 1.0], [2.0, 3.0], [6.0, 7.0]])
        with token_mask(self.mask):
            assert torch.equal(drop_padding(x), real.unsqueeze(0))
            assert torch.equal(drop_padding(x.view(6, 2)), real)
            assert torch.equal(drop_padding(x[..., 0]), real[:, 0].unsqueeze(0))

    def test_unrelated_shapes_stay(self) -> None:
        with token_mask(self.mask):
            for x in (torch.ones(4, 2), torch.ones(2, 4, 3), torch.tensor(1.0)):
                assert drop_padding(x) is x

    def test_no_mask(self) -> None:
        x = torch.ones(2, 3)
        assert drop_padding(x) is x
        for nothing in (None, torch.ones(2, 3, dtype=torch.int64)):
            with token_mask(nothing):
                assert current_token_mask() is None
                assert drop_padding(x) is x

    def test_mask_is_gone_afterwards_and_masks_nest(self) -> None:
        with token_mask(self.mask):
            with token_mask(None):
                assert current_token_mask() is None
            assert current_token_mask() is not None
        assert current_token_mask() is None


def observed(model: Any, batches: CalibrationBatches) -> dict[str, tuple[float, int]]:
    """Largest absolute input and number of input rows of every linear layer."""
    seen: dict[str, tuple[float, int]] = {}

    def observer(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def look(_: Any, args: tuple[Tensor, ...]) -> None:
            x = drop_padding(args[0])
            amax, rows = seen.get(name, (0.0, 0))
            seen[name] = (max(amax, x.abs().max().item()), rows + x[..., 0].numel())

        return look

    hooks = [
        module.register_forward_pre_hook(observer(name))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    run_batches(model, batches)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("padding", ["none", "right"])
def test_batch_size_changes_no_statistics(tokenizer: Any, padding: Any) -> None:
    draw = random.Random(3)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(2, 30))) for _ in range(13)]
    model = make_model()
    source = TextSource(texts, "x")
    alone = token_batches(source, tokenizer, 24, batch_size=1)
    together = token_batches(source, tokenizer, 24, batch_size=4, padding=padding)
    assert any(batch["input_ids"].shape[0] > 1 for batch in together)
    expected, found = observed(model, alone), observed(model, together)
    assert set(found) == set(expected)
    for name, (amax, rows) in expected.items():
        assert found[name][0] == pytest.approx(amax, rel=1e-5), name
        assert found[name][1] == rows == alone.tokens, name


def test_padding_would_be_seen_without_the_mask(tokenizer: Any) -> None:
    """The check above can fail: id 0 given an enormous embedding shows wherever padding is counted."""
    model = make_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 1e6
    source = TextSource([words(1, 2, 3, 4, 5), words(6, 7)], "x")
    batches = token_batches(source, tokenizer, 8, batch_size=2, padding="right")
    embedded: list[float] = []

    def look(_: Any, __: Any, output: Tensor) -> None:
        embedded.extend([output.abs().max().item(), drop_padding(output).abs().max().item()])

    hook = model.model.embed_tokens.register_forward_hook(look)
    run_batches(model, batches)
    hook.remove()
    assert embedded[0] == 1e6
    assert embedded[1] < 1e3


class TestModelInputs:
    def test_run_batches_leaves_the_mode(self, tokenizer: Any) -> None:
        model = make_model().train()
        model.model.layers[0].eval()
        before = {name: module.training for name, module in model.named_modules()}
        modes: list[bool] = []
        model.lm_head.register_forward_pre_hook(lambda module, _: modes.append(module.training))
        run_batches(model, token_batches(TextSource([words(1, 2)], "x"), tokenizer, 4))
        assert modes == [False]
        assert {name: module.training for name, module in model.named_modules()} == before

    def test_evaluating_restores_after_an_error(self) -> None:
        model = torch.nn.Sequential(torch.nn.Linear(2, 2)).train()
        modes: list[bool] = []

        def fail(module: torch.nn.Module, _: object) -> None:
            modes.append(module.training)
            raise ZeroDivisionError

        model[0].register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError), evaluating(model):
            model(torch.ones(1, 2))
        assert modes == [False]
        assert model[0].training

    def test_sizes(self) -> None:
        from transformers import GPT2Config, LlamaConfig

        assert max_sequence_length(LlamaConfig(max_position_embeddings=77)) == 77
        assert max_sequence_length(GPT2Config(n_positions=55)) == 55
        assert max_sequence_length(object()) is None
        assert vocabulary_size(LlamaConfig(vocab_size=99)) == 99
        assert vocabulary_size(None) is None

        class Several:
            text_config = LlamaConfig(max_position_embeddings=33, vocab_size=11)

        assert max_sequence_length(Several()) == 33
        assert vocabulary_size(Several()) == 11

    def test_device(self) -> None:
        assert input_device(make_model()) == torch.device("cpu")
        assert input_device(torch.nn.ReLU()) == torch.device("cpu")


def test_word_ids_match_the_tokenizer(tokenizer: Any) -> None:
    assert tokenizer(words(0, 59))["input_ids"] == [BOS, FIRST_WORD_ID, VOCABULARY - 1]
