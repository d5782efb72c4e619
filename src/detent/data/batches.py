"""Calibration samples: sequences of token ids, made from text by stated rules, in batches.

No padding: a batch holds samples of one length, so nothing that is only padding can enter any statistics, whatever the
model does with its tokens (routes them to experts, mixes them along the sequence). Samples are mostly of one length
anyway, since longer documents are cut to it. ``padding="right"`` fills batches up instead and masks; see
:mod:`detent.padding`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from detent.data.documents import Document, is_blank, render
from detent.data.text import TextSource
from detent.errors import DetentError
from detent.external.mistakes import as_detent_error, first_line
from detent.padding import current_token_mask, drop_padding, token_mask
from detent.progress import report, track

__all__ = [
    "Batch",
    "CalibrationBatches",
    "check_vocabulary",
    "current_token_mask",
    "drop_padding",
    "encode",
    "token_batches",
    "token_mask",
]

#: ``input_ids`` and ``attention_mask``, both int64 [batch, seq].
Batch = dict[str, Tensor]

#: The shortest sequence that is useful with a language model: one token and the one that follows.
MIN_TOKENS = 2
#: Running text is tokenized in pieces of about this many characters, until there are samples enough.
_PIECE_CHARACTERS = 1 << 18


@dataclass(frozen=True)
class CalibrationBatches:
    """Batches of token ids that can be gone through any number of times.

    Attributes:
        samples: the sequences, int64 [tokens] each, in the order they were made.
        batch_size: the most samples in a batch.
        padding: ``"none"``: samples of unlike length never share a batch; ``"right"``: they do, filled up at the end,
            and `attention_mask` is 0 there.
        description: where the text is from.
        notices: messages for the user, such as that there were fewer samples than asked for.
    """

    samples: list[Tensor]
    batch_size: int = 1
    padding: Literal["none", "right"] = "none"
    description: str = ""
    notices: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """How many tokens all samples have together, padding not counted."""
        return sum(sample.numel() for sample in self.samples)

    def __len__(self) -> int:
        return len(self._groups())

    def __iter__(self) -> Iterator[Batch]:
        for group in self._groups():
            yield _collate(group)

    def _groups(self) -> list[list[Tensor]]:
        """The samples of each batch, long ones first: a batch that doesn't fit in memory fails at once."""
        ordered = sorted(self.samples, key=lambda sample: -sample.numel())
        groups: list[list[Tensor]] = []
        for sample in ordered:
            fits = groups and len(groups[-1]) < self.batch_size
            if fits and (self.padding == "right" or groups[-1][0].numel() == sample.numel()):
                groups[-1].append(sample)
            else:
                groups.append([sample])
        return groups


def _collate(samples: list[Tensor]) -> Batch:
    longest = max(sample.numel() for sample in samples)
    # Padding is id 0, which every model knows (a tokenizer's own padding token may be outside the vocabulary). What a
    # causal model computes for the tokens before it does not depend on it.
    input_ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, sample in enumerate(samples):
        input_ids[row, : sample.numel()] = sample
        attention_mask[row, : sample.numel()] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def token_batches(
    source: TextSource,
    tokenizer: Any,
    seq_len: int,
    batch_size: int = 1,
    num_samples: int = 512,
    *,
    seed: int = 0,
    padding: Literal["none", "right"] = "none",
) -> CalibrationBatches:
    """Make calibration samples from text, by the rule that `source.sampling` names.

    - ``documents``: the first `num_samples` texts of at least two tokens, each cut to `seq_len` tokens.
    - ``windows`` (running text): the texts joined by blank lines, cut into stretches of `seq_len` tokens; what is left
      over at the end is dropped, unless it is all there is.
    - ``short_documents``: the first `num_samples` texts of at most `seq_len` tokens, run together without anything
      between them and cut into stretches as above (the rule of AWQ's authors, so there are fewer samples than texts).
    - ``random_windows``: the texts joined by blank lines, and `num_samples` stretches of `seq_len` tokens that start
      anywhere, drawn with `seed` (the rule of GPTQ's authors).

    Special tokens are those that the tokenizer adds by itself: to each text where texts are samples, else once, at the
    start of the running text.

    Args:
        source: from :func:`detent.data.text.load_texts`.
        tokenizer: of the model, with the interface of transformers.
        seq_len: the most tokens in a sample, at least 2.
        batch_size: the most samples in a batch.
        num_samples: the most samples (texts, for ``short_documents``).
        seed: of the draw of ``random_windows``.
        padding: see :class:`CalibrationBatches`.

    Raises:
        DetentError: a number is too small, or no text gives a sample of two tokens.
    """
    check_at_least("seq_len", seq_len, MIN_TOKENS)
    check_at_least("batch_size", batch_size, 1)
    check_at_least("num_samples", num_samples, 1)
    match source.sampling:
        case "documents":
            samples = _document_samples(source, tokenizer, seq_len, num_samples)
        case "windows":
            samples = _windows(_running_ids(source, tokenizer, seq_len * num_samples), seq_len)[:num_samples]
        case "short_documents":
            samples = _short_document_samples(source, tokenizer, seq_len, num_samples)
        case "random_windows":
            samples = _random_windows(_running_ids(source, tokenizer, None), seq_len, num_samples, seed)
    if not samples:
        raise DetentError(
            f"no usable calibration text in {source.description}: it has {len(source.texts)} texts, and the tokenizer "
            f"makes fewer than {MIN_TOKENS} tokens of each; give longer texts"
        )
    notices = [source.notice] if source.notice else []
    if len(samples) < num_samples and source.sampling != "short_documents":
        notices.append(
            f"{source.description} is enough for {len(samples)} calibration samples of up to {seq_len} tokens; "
            f"{num_samples} were asked for"
        )
    return CalibrationBatches(samples, batch_size, padding, source.description, notices)


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise a DetentError unless the number called `name` is at least `least`."""
    if value < least:
        raise DetentError(f"{name} must be at least {least}, found {value}")


def check_vocabulary(batches: Iterable[Mapping[str, Tensor]], vocab_size: int) -> None:
    """Make sure that a model with `vocab_size` token ids knows every id in the batches.

    Raises:
        DetentError: an id is too large, so that the tokenizer cannot be the model's own.
    """
    for batch in batches:
        largest = int(batch["input_ids"].max())
        if largest >= vocab_size:
            raise DetentError(
                f"the tokenizer produced token id {largest}, but the model has only {vocab_size} ids "
                f"(0 to {vocab_size - 1}); the tokenizer belongs to another model: use the one that came with this one"
            )


def encode(text: str, tokenizer: Any, special_tokens: bool = True) -> Tensor:
    """The token ids of a text, int64 [tokens], never truncated, whatever the tokenizer's maximum length."""
    # verbose=False: no warning about that length. Cutting is left to the caller, because a fast tokenizer that was told
    # to truncate keeps that as a setting and would save it with the model.
    with as_detent_error(lambda error: f"the tokenizer fails on a text: {first_line(error)}; check its files"):
        ids = tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)


def _encode_document(document: Document, tokenizer: Any) -> Tensor:
    text, special_tokens = render(document, tokenizer)
    return encode(text, tokenizer, special_tokens)


def _encoded_documents(source: TextSource, tokenizer: Any) -> Iterator[Tensor]:
    """The token ids of each text that has two or more."""
    for document in source.texts:
        if not is_blank(document):
            ids = _encode_document(document, tokenizer)
            if ids.numel() >= MIN_TOKENS:
                yield ids


def _document_samples(source: TextSource, tokenizer: Any, seq_len: int, num_samples: int) -> list[Tensor]:
    encoded = _encoded_documents(source, tokenizer)
    return [ids[:seq_len] for ids in _first(encoded, min(num_samples, len(source.texts)))]


def _short_document_samples(source: TextSource, tokenizer: Any, seq_len: int, num_samples: int) -> list[Tensor]:
    short = (ids for ids in _encoded_documents(source, tokenizer) if ids.numel() <= seq_len)
    kept = _first(short, min(num_samples, len(source.texts)))
    return _windows(torch.cat(kept), seq_len) if kept else []


def _first(encoded: Iterator[Tensor], wanted: int) -> list[Tensor]:
    kept = list(track(islice(encoded, wanted), "Tokenizing", wanted))
    report("Tokenizing", wanted, wanted)  # There may have been fewer.
    return kept


def _running_ids(source: TextSource, tokenizer: Any, enough: int | None) -> Tensor:
    """The token ids of the texts joined by blank lines: all, or the first pieces that have `enough` of them."""
    encoded: list[Tensor] = []
    for piece in _pieces(source, tokenizer):
        # Only the first piece begins the text: there the tokenizer may put its beginning-of-text token.
        encoded.append(encode(piece, tokenizer, special_tokens=not encoded))
        if enough is not None and sum(ids.numel() for ids in encoded) >= enough:
            break
    return torch.cat(encoded) if encoded else torch.empty(0, dtype=torch.int64)


def _pieces(source: TextSource, tokenizer: Any) -> Iterator[str]:
    """The joined text, in pieces that end where one of its texts does."""
    piece = ""
    for document in source.texts:
        piece += render(document, tokenizer)[0] + "\n\n"
        if len(piece) >= _PIECE_CHARACTERS:
            yield piece
            piece = ""
    if piece:
        yield piece.removesuffix("\n\n")


def _windows(ids: Tensor, seq_len: int) -> list[Tensor]:
    if ids.numel() < seq_len:
        return [ids] if ids.numel() >= MIN_TOKENS else []
    return list(ids[: ids.numel() // seq_len * seq_len].split(seq_len))


def _random_windows(ids: Tensor, seq_len: int, num_samples: int, seed: int) -> list[Tensor]:
    if ids.numel() <= seq_len:
        return _windows(ids, seq_len)
    draw = random.Random(seed)
    starts = [draw.randint(0, ids.numel() - seq_len - 1) for _ in range(num_samples)]
    return [ids[start : start + seq_len] for start in starts]
