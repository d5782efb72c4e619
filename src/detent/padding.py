"""Which tokens of the batch running through a model are padding, for the observers inside it.

Code that runs a padded batch does so inside ``with token_mask(mask):``; code that gathers statistics of an activation
passes it through :func:`drop_padding` first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_token_mask: ContextVar[Tensor | None] = ContextVar("detent_token_mask", default=None)


def current_token_mask() -> Tensor | None:
    """The mask of the batch that is running: bool [batch, seq], True for real tokens; None where nothing is padding."""
    return _token_mask.get()


@contextmanager
def token_mask(mask: Tensor | None) -> Iterator[None]:
    """Set which tokens are real while a batch runs.

    Args:
        mask: [batch, seq], nonzero for real tokens, as an `attention_mask` is; None for a batch without padding. A mask
            without a zero counts as None.
    """
    real = None if mask is None else mask.bool()
    token = _token_mask.set(None if real is None or bool(real.all()) else real)
    try:
        yield
    finally:
        _token_mask.reset(token)


def drop_padding(x: Tensor) -> Tensor:
    """Leave out of an activation what belongs to padding tokens, so that statistics don't see it.

    With a mask of [batch, seq], an activation [batch, seq, ...] becomes [1, real tokens, ...] and one of
    [batch * seq, ...] becomes [real tokens, ...]: the rank stays, so that an axis means the same as before. Without a
    mask, or where the leading dimensions are neither, `x` is returned unchanged: the mask cannot say which of its rows
    are padding. That is so for tokens routed to an expert and for attention heads [batch, heads, seq, ...]; batches
    without padding, which :func:`detent.data.batches.token_batches` makes, are exact there too.
    """
    mask = _token_mask.get()
    if mask is None or x.ndim == 0:
        return x
    if x.shape[:2] == mask.shape:
        return x[mask.to(x.device)].unsqueeze(0)
    if x.shape[0] == mask.numel():
        return x[mask.flatten().to(x.device)]
    return x
