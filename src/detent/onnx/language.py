"""A language model as the function that an ONNX file holds: token ids in, logits out, keys and values on the way."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from detent.errors import DetentError


class LanguageModelGraph(nn.Module):
    """A transformers model called with tensors alone.

    Args:
        model: a language model in evaluation mode.
        with_cache: take the keys and values of earlier tokens, and give those of all.

    Its inputs are ``input_ids`` [batch, tokens], ``attention_mask`` [batch, earlier tokens + tokens] and, where the
    model takes them, ``position_ids`` [batch, tokens], all int64; then, with a cache, ``past_key_values.N.key`` and
    ``.value`` [batch, heads, earlier tokens, channels] for each layer N. Its outputs are ``logits`` and
    ``present.N.key`` and ``.value``. All sizes but heads and channels are free; there may be no earlier tokens.

    Raises:
        DetentError: the model keeps something else than keys and values for each layer.
    """

    def __init__(self, model: nn.Module, *, with_cache: bool = True) -> None:
        super().__init__()
        self.model = model
        self._positions = "position_ids" in inspect.signature(model.forward).parameters
        self.with_cache = with_cache
        self._sample = self._make_sample()

    @torch.no_grad()
    def _make_sample(self, earlier: int = 4, tokens: int = 3) -> tuple[Any, ...]:
        device = next(self.model.parameters()).device
        generator = torch.Generator().manual_seed(0)
        config: Any = self.model.config
        count = config.get_text_config().vocab_size
        ids = torch.randint(count, (2, earlier + tokens), generator=generator).to(device)
        if not self.with_cache:
            earlier = 0
        mask = torch.ones_like(ids[:, : earlier + tokens])
        positions = torch.arange(earlier, earlier + tokens, device=device).expand(2, -1).contiguous()
        past = []
        if self.with_cache:
            net: Any = self.model
            cache = getattr(net(input_ids=ids[:, :earlier], use_cache=True), "past_key_values", None)
            past = _tensors_of(cache, type(self.model).__name__)
        inputs = ids[:, earlier : earlier + tokens].contiguous(), mask, *([positions] if self._positions else [])
        return (*inputs, past) if self.with_cache else inputs

    def sample(self) -> tuple[Any, ...]:
        """Inputs to trace it with."""
        return self._sample

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *more: Any) -> Any:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self._positions:
            inputs["position_ids"] = more[0]
        if not self.with_cache:
            return self.model(**inputs, use_cache=False).logits
        from transformers import DynamicCache

        past = more[-1]
        pairs = list(zip(past[0::2], past[1::2], strict=True))
        out = self.model(**inputs, past_key_values=DynamicCache(pairs), use_cache=True)
        return out.logits, *_tensors_of(out.past_key_values, type(self.model).__name__)

    def input_names(self) -> list[str]:
        """Of the file."""
        names = ["input_ids", "attention_mask", *(["position_ids"] if self._positions else [])]
        return names + (self._cache_names("past_key_values") if self.with_cache else [])

    def output_names(self) -> list[str]:
        """Of the file."""
        return ["logits", *(self._cache_names("present") if self.with_cache else [])]

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """The sizes that are free, for `torch.onnx.export`."""
        ids = {0: "batch", 1: "tokens"}
        mask = {0: "batch", 1: "all_tokens"} if self.with_cache else ids
        past = [{0: "batch", 2: "earlier_tokens"} for _ in self._sample[-1]] if self.with_cache else []
        more = (*([ids] if self._positions else []), *([past] if self.with_cache else []))
        return (ids, mask, more)

    def _cache_names(self, start: str) -> list[str]:
        return [f"{start}.{i // 2}.{('key', 'value')[i % 2]}" for i in range(len(self._sample[-1]))]


def _tensors_of(cache: Any, kind: str) -> list[Tensor]:
    """The keys and values of a cache, layer by layer."""
    layers = getattr(cache, "layers", None)
    tensors = [getattr(layer, part, None) for layer in layers or () for part in ("keys", "values")]
    if not tensors or any(not isinstance(t, Tensor) or t.dim() != 4 for t in tensors):
        raise DetentError(
            f"{kind} keeps something else than keys and values for each layer between tokens, so it can't be exported"
            " with its cache; export it without"
        )
    return tensors  # type: ignore[return-value]
