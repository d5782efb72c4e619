"""Perplexity of a causal language model: the exponential of its mean negative log-likelihood per token.

The text is run together and cut into windows that don't overlap; within a window each token is predicted from those
before it in the same window. This is how perplexities on WikiText-2 are usually stated, with one difference: what is
left over at the end of the text counts too, as a shorter window, each token with the same weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from detent.data.batches import MIN_TOKENS, check_at_least, encode
from detent.data.text import TextSource
from detent.engine.blocks import NoChain, record_chain, replaced_outputs
from detent.engine.calls import PassOver
from detent.engine.host import CannotStream, Host
from detent.errors import DetentError
from detent.model.scopes import evaluating
from detent.pretrained.facts import input_device, max_sequence_length, vocabulary_size
from detent.progress import track
from detent.threads import threads_by_size

#: Tokens in a window, where the model takes as many.
DEFAULT_WINDOW = 2048
#: The log-softmax is taken of this many float32 logits at a time (64 MiB), so that a large vocabulary needs no second
#: copy of all logits.
_CHUNK_LOGITS = 1 << 24


@dataclass(frozen=True)
class PerplexityResult:
    """A measured perplexity.

    Attributes:
        perplexity: ``exp(nll / tokens)``.
        nll: total negative log-likelihood, in nats.
        tokens: how many tokens were predicted (all but the first of each window).
        window: tokens in a window.
        windows: how many windows were read, a shorter last one included.
    """

    perplexity: float
    nll: float
    tokens: int
    window: int
    windows: int


def evaluation_ids(text: TextSource | Sequence[str] | str, tokenizer: Any) -> Tensor:
    """The token ids of an evaluation text, int64 [tokens]: its documents joined by blank lines and tokenized as one.

    Special tokens are added once, where the tokenizer adds them to a text.

    Raises:
        DetentError: there are fewer than two tokens.
    """
    if isinstance(text, TextSource):
        joined, name = text.joined_text(tokenizer), text.description
    else:
        joined, name = text if isinstance(text, str) else "\n\n".join(text), "the evaluation text"
    ids = encode(joined, tokenizer)
    if ids.numel() < MIN_TOKENS:
        raise DetentError(
            f"{name} has {ids.numel()} tokens: perplexity needs at least {MIN_TOKENS}; give a longer text"
        )
    return ids


def perplexity(
    model: nn.Module,
    text: Tensor | TextSource | Sequence[str] | str,
    tokenizer: Any = None,
    *,
    window: int = DEFAULT_WINDOW,
    max_windows: int | None = None,
    batch_size: int = 1,
    host: Host | None = None,
    blocks: Sequence[str] = (),
) -> PerplexityResult:
    """Measure the perplexity of a causal language model on a text.

    Args:
        model: a transformers causal language model, on any device and of any dtype; its mode is left as it was.
        text: token ids (int64, [tokens] or [1, tokens], from :func:`evaluation_ids`), or text for `tokenizer`.
        tokenizer: of the model; needed for text.
        window: tokens in a window; a model that takes fewer positions gets windows of as many as it takes.
        max_windows: read only this many windows, from the start.
        batch_size: windows run through the model at a time.
        host: where the blocks of the model are, if not in memory: then the whole text goes through one after the other.
        blocks: their names, with `host`.

    Returns:
        The perplexity, over all predicted tokens with equal weight. Log-likelihoods are taken in float32 whatever dtype
        the model computes in, and summed in float64.

    Raises:
        DetentError: a number is too small, the text is too short, an id is not in the model's vocabulary, the model
            gives no logits, or its likelihood of a window is not a finite number.
        CannotStream: with `host`: blocks hand on more than their outputs.
    """
    check_at_least("window", window, MIN_TOKENS)
    check_at_least("batch_size", batch_size, 1)
    if max_windows is not None:
        check_at_least("max_windows", max_windows, 1)
    if not isinstance(text, Tensor):
        if tokenizer is None:
            raise DetentError("measuring perplexity on text needs the model's tokenizer; without one, pass token ids")
        text = evaluation_ids(text, tokenizer)
    config = getattr(model, "config", None)
    window = min(window, max_sequence_length(config) or window)
    ids = _checked_ids(text, vocabulary_size(config))
    if max_windows is not None:
        ids = ids[: max_windows * window]

    nll, tokens, windows = 0.0, 0, 0
    batches = _window_batches(ids, window, batch_size)
    largest = max((p.numel() for p in model.parameters()), default=0)
    with (
        torch.no_grad(),
        evaluating(model),
        threads_by_size(min(ids.numel(), window * batch_size) * largest),
        nullcontext() if host is None else _blocks_done(model, host, blocks, batches),
    ):
        device = input_device(model)
        for batch in track(batches, "Measuring perplexity", len(batches)):
            for row_nll in _nll_of_rows(model, batch.to(device)):
                if not math.isfinite(row_nll):
                    raise DetentError(
                        f"the model's log-likelihood of window {windows + 1} (tokens {windows * window} to "
                        f"{min((windows + 1) * window, ids.numel()) - 1} of the text) is {-row_nll}: its outputs "
                        "there are not finite or infinitely wrong: its weights or activations overflow; "
                        "try bfloat16 or float32, or another scheme"
                    )
                nll += row_nll
                windows += 1
            tokens += batch.numel() - batch.shape[0]
    return PerplexityResult(_exp_mean(nll, tokens), nll, tokens, window, windows)


@contextmanager
def _blocks_done(model: nn.Module, host: Host, blocks: Sequence[str], batches: Sequence[Tensor]) -> Iterator[None]:
    """Take all batches through the blocks, each of which is read once. Inside, the model skips its blocks and goes on
    from what the last one gave, batch after batch, in this order."""

    def run(net: nn.Module) -> None:
        device = input_device(net)
        for batch in batches:
            with suppress(PassOver):
                net(input_ids=batch.to(device), use_cache=False)

    chain = record_chain(model, blocks, run, spill=host.states is not None, host=host)
    if isinstance(chain, NoChain):
        raise CannotStream(chain.reason)
    try:
        hidden = chain.inputs
        for index, name in enumerate(track(blocks, "Block by block", len(blocks))):
            given = chain.store()
            with host.block(name):
                for output in chain.run_all(index, hidden):
                    given.append(output)
            hidden.clear()
            hidden = given
        with host.outside(whole=True), replaced_outputs(chain, hidden):
            yield
    finally:
        chain.close()


def _checked_ids(ids: Tensor, vocabulary: int | None) -> Tensor:
    ids = ids.squeeze(0) if ids.ndim == 2 and ids.shape[0] == 1 else ids
    if ids.ndim != 1 or ids.numel() < MIN_TOKENS or ids.is_floating_point():
        raise DetentError(
            f"token ids must be integers of shape [tokens] or [1, tokens], with at least {MIN_TOKENS} tokens; "
            f"found {ids.dtype} of shape {list(ids.shape)}"
        )
    if vocabulary is not None and int(ids.max()) >= vocabulary:
        raise DetentError(
            f"the text has token id {int(ids.max())}, but the model has only {vocabulary} ids (0 to {vocabulary - 1}): "
            "the tokenizer belongs to another model; use the one that came with this model"
        )
    return ids.to(torch.int64)


def _window_batches(ids: Tensor, window: int, batch_size: int) -> list[Tensor]:
    """The windows in batches, [up to batch_size, window] each, and the rest as the last, [1, tokens left over]."""
    whole = ids.numel() // window
    batches = list(ids[: whole * window].view(whole, window).split(batch_size)) if whole else []
    rest = ids[whole * window :]
    # A single token left over has no preceding token to be predicted from.
    return [*batches, rest.unsqueeze(0)] if rest.numel() >= MIN_TOKENS else batches


def _nll_of_rows(model: nn.Module, batch: Tensor) -> list[float]:
    """Total negative log-likelihood, in nats, of each row of a batch [rows, tokens]."""
    logits = getattr(model(input_ids=batch, use_cache=False), "logits", None)
    if logits is None:
        raise DetentError(f"{type(model).__name__} gives no logits: perplexity needs a causal language model")
    step = max(1, _CHUNK_LOGITS // logits.shape[-1])
    totals = []
    for row, targets in zip(logits, batch.to(logits.device), strict=True):
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for predicted, target in zip(row[:-1].split(step), targets[1:].split(step), strict=True):
            losses = cross_entropy(predicted.float(), target, reduction="none")
            total += losses.double().sum()
        totals.append(total.item())
    return totals


def _exp_mean(nll: float, tokens: int) -> float:
    mean = nll / tokens
    # exp overflows at 709.8 nats a token. Guessing at random among a million tokens costs 14.
    if mean > 700:
        raise DetentError(
            f"the model's mean negative log-likelihood is {mean:.3g} nats a token: its outputs are meaningless"
        )
    return math.exp(mean)
