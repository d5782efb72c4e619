"""Tokenizers in GGUF files: what is said of them, and that transformers makes the same ones of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from detent.checkpoints.gguf.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, vocabulary
from detent.errors import DetentError

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("gguf")

_TEXTS = ["a man, a plan, a canal: it's panama", "the cat sat on the mat", "the man ate 12 plums, the cat none"] * 4
_SPACE = "\u2581"


def saved(folder: Path, tokenizer: Any, **special: Any) -> int:
    """Save a tokenizer as transformers does; returns the number of its tokens."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return int(tokenizer.get_vocab_size())


def byte_level(pre_tokenizer: Any = None, **options: Any) -> Any:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizer or tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return tokenizer


def _split(pattern: str) -> Any:
    pre = tokenizers.pre_tokenizers
    cut = pre.Split(tokenizers.Regex(pattern), "isolated")
    return pre.Sequence([cut, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


#: The published rules of GPT-2, Qwen2 and Llama 3.
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


@pytest.mark.parametrize(
    ("pre_tokenizer", "ignore_merges", "name"),
    [
        (None, False, "gpt-2"),
        (_split(_QWEN2), False, "qwen2"),
        (_split(_LLAMA3), True, "llama-bpe"),
        (_split(_LLAMA3), False, "smaug-bpe"),
    ],
)
def test_the_way_text_is_cut_is_recognised(pre_tokenizer: Any, ignore_merges: bool, name: str, tmp_path: Path) -> None:
    size = saved(tmp_path, byte_level(pre_tokenizer, ignore_merges=ignore_merges), bos_token="<s>", eos_token="</s>")
    values, notes = vocabulary(tmp_path, size + 2)
    assert (values["tokenizer.ggml.model"], values["tokenizer.ggml.pre"], notes) == ("gpt2", name, [])
    assert (values["tokenizer.ggml.bos_token_id"], values["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert values["tokenizer.ggml.add_bos_token"] is False
    assert values["tokenizer.ggml.token_type"] == [CONTROL] * 2 + [NORMAL] * (size - 2) + [UNUSED] * 2
    assert values["tokenizer.ggml.tokens"][-1] == f"[PAD{size + 1}]"


def test_a_cut_that_llama_cpp_does_not_know_is_refused(tmp_path: Path) -> None:
    size = saved(tmp_path, byte_level(_split(r"[aeiou]+")))
    with pytest.raises(DetentError, match=r"cuts text by '\[aeiou\]\+', which llama.cpp doesn't do"):
        vocabulary(tmp_path, size)


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    size = saved(tmp_path, byte_level())
    with pytest.raises(DetentError, match=f"has token {size - 1}, but the embedding has {size - 3} rows"):
        vocabulary(tmp_path, size - 3)


def test_sentence_pieces_have_scores_by_which_the_same_pairs_are_joined(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": i + 3 for i in range(256)}}
    for piece in (_SPACE, "a", "b", "ab", _SPACE + "a", "abb", _SPACE + "ab"):
        vocab[piece] = len(vocab)
    merges = [("a", "b"), (_SPACE, "a"), ("ab", "b"), (_SPACE, "ab")]
    model = tokenizers.models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(model)
    norm = tokenizers.normalizers
    tokenizer.normalizer = norm.Sequence([norm.Prepend(_SPACE), norm.Replace(" ", _SPACE)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens([_SPACE + "extra"])
    size = saved(tmp_path, tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    values, _ = vocabulary(tmp_path, size)
    tokens, scores = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.scores"]
    types = values["tokenizer.ggml.token_type"]
    assert values["tokenizer.ggml.model"] == "llama"
    assert values["tokenizer.ggml.add_space_prefix"] is True
    assert types[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE]
    assert (tokens[-1], types[-1]) == (" extra", USER_DEFINED)
    by_score = sorted(("ab", _SPACE + "a", "abb", _SPACE + "ab"), key=lambda text: -scores[tokens.index(text)])
    assert by_score == ["".join(pair) for pair in merges]


def test_unigram_and_word_piece_models(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0), ("a", -1.5), (_SPACE, -2.0)]
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    unigram.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    values, _ = vocabulary(tmp_path / "u", saved(tmp_path / "u", unigram, unk_token="<unk>"))
    assert (values["tokenizer.ggml.model"], values["tokenizer.ggml.scores"]) == ("t5", [0.0, -1.5, -2.0])
    assert values["tokenizer.ggml.token_type"][0] == UNKNOWN
    words = tokenizers.models.WordPiece({"[UNK]": 0, "un": 1, "##able": 2}, unk_token="[UNK]")
    values, _ = vocabulary(tmp_path / "w", saved(tmp_path / "w", tokenizers.Tokenizer(words), unk_token="[UNK]"))
    assert values["tokenizer.ggml.model"] == "bert"
    assert values["tokenizer.ggml.tokens"][1:] == [_SPACE + "un", "able"]


def test_a_model_without_a_tokenizer_is_written_with_a_note(tmp_path: Path) -> None:
    values, notes = vocabulary(tmp_path, 10)
    assert values == {"tokenizer.ggml.model": "none"}
    assert "has no tokenizer" in notes[0]
