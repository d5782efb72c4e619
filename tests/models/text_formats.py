"""Tokenizers in the formats of published models, trained on a few words."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

WORDS = [f"w{i}" for i in range(60)]
#: Ids that every model here has room for.
VOCABULARY = 512


def _trained(special: list[str], *, bytes_as_letters: bool) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary, merges) of byte pairs: of letters that stand for bytes, as in GPT-2, or of the text's own letters
    with byte tokens for all others, as in SentencePiece."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    alphabet: list[str] = []
    if bytes_as_letters:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        special = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def save_bytes(folder: Path, kind: str = "Qwen2Tokenizer", special: tuple[str, ...] = ("<|endoftext|>",)) -> None:
    """Byte pairs over bytes: GPT-2, OPT, Phi-2, Qwen, Llama 3, ..."""
    import transformers

    vocabulary, merges = _trained(list(special), bytes_as_letters=True)
    names = dict.fromkeys(("eos_token", "unk_token", "bos_token", "pad_token"), special[0])
    build: Any = getattr(transformers, kind)
    build(vocab=vocabulary, merges=merges, **names).save_pretrained(folder)


def save_pieces(folder: Path, kind: str = "LlamaTokenizer") -> None:
    """Byte pairs over letters with a byte for what has none: Llama 2, Mistral, Phi-3, Gemma, ..."""
    import transformers

    vocabulary, merges = _trained(["<unk>", "<s>", "</s>"], bytes_as_letters=False)
    build: Any = getattr(transformers, kind)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    build(vocab=vocabulary, merges=merges, **names).save_pretrained(folder)


def tiktoken_file() -> bytes:
    """Tokens with their ranks, as tiktoken reads them."""
    letters = [bytes([byte]) for byte in range(256)]
    pairs = [b"w" + str(digit).encode() for digit in range(10)] + [b" w" + str(digit).encode() for digit in range(10)]
    tokens = [*letters, b" w", *pairs]
    return b"\n".join(base64.b64encode(token) + b" " + str(rank).encode() for rank, token in enumerate(tokens))


def word_list() -> str:
    """The words of a tokenizer, one a line."""
    return "\n".join(["<unk>", "</s>", "[gMASK]", "sop", *WORDS])
