"""Quantizers inside attention: on queries, keys, values and probabilities, at the point where they are multiplied.

Attention modules of transformers 5 fetch the function that computes softmax(QK')V by name from a registry. Detent
registers ``detent_<name>`` for each name in use: it quantizes what it is given and calls the function of that name. So
keys are quantized after the rotary embedding, as the engines' caches hold them, and no model's source is touched. A
module belongs to this scheme when its ``forward`` uses the registry; nothing is listed per model.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from detent.errors import DetentError
from detent.nn.sequential import SequentialQuantizer
from detent.nn.tensor_quantizer import TensorQuantizer

_REGISTRY_NAME = "ALL_ATTENTION_FUNCTIONS"
_PREFIX = "detent_"
_QUANTIZERS = ("q_bmm_quantizer", "k_bmm_quantizer", "v_bmm_quantizer", "p_bmm_quantizer")
#: All four see [batch, heads, tokens, ...].
_TOKEN_AXIS = 2


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every module whose forward looks its attention function up by name."""
    for name, module in model.named_modules():
        forward = inspect.unwrap(type(module).forward)
        code = getattr(forward, "__code__", None)
        if code is not None and _REGISTRY_NAME in code.co_names and hasattr(module, "config"):
            yield name, module


def add_attention_quantizers(model: nn.Module) -> None:
    """Give every such module q/k/v/p quantizers, switched off, where it has none yet."""
    for _, module in attention_modules(model):
        for name in _QUANTIZERS:
            if not hasattr(module, name):
                quantizer = TensorQuantizer({"enable": False})
                quantizer.token_axis = _TOKEN_AXIS
                quantizer.train(module.training)
                setattr(module, name, quantizer)


def route_attention(model: nn.Module) -> None:
    """Send attention through the quantizers where any is on; where none is, back to the function it had."""
    for name, module in attention_modules(model):
        config: Any = module.config
        implementation = config._attn_implementation or "eager"
        original = implementation.removeprefix(_PREFIX)
        wanted = any(_is_on(getattr(module, q, None)) for q in _QUANTIZERS)
        if wanted and not implementation.startswith(_PREFIX):
            _register(original, name)
            config._attn_implementation_internal = _PREFIX + original
        elif not wanted and implementation.startswith(_PREFIX) and not _others_on(model, config):
            config._attn_implementation_internal = original


def _others_on(model: nn.Module, config: Any) -> bool:
    """Whether any attention module under this configuration object still has a quantizer on."""
    return any(
        _is_on(getattr(module, q, None))
        for _, module in attention_modules(model)
        if module.config is config
        for q in _QUANTIZERS
    )


def _is_on(quantizer: Any) -> bool:
    return isinstance(quantizer, (TensorQuantizer, SequentialQuantizer)) and quantizer.is_enabled


def _register(original: str, module_name: str) -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if original not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise DetentError(
            f"{module_name}: quantizing attention works with the implementations that have a mask function, not"
            f" {original!r}; load the model with attn_implementation='eager' or 'sdpa'"
        )
    ALL_ATTENTION_FUNCTIONS.register(_PREFIX + original, _quantized(original))
    ALL_MASK_ATTENTION_FUNCTIONS.register(_PREFIX + original, ALL_MASK_ATTENTION_FUNCTIONS[original])


def _quantized(original: str) -> Callable[..., Any]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        quantizers: Any = module
        if hasattr(module, "k_bmm_quantizer"):
            query = quantizers.q_bmm_quantizer(query)
            key = quantizers.k_bmm_quantizer(key)
            value = quantizers.v_bmm_quantizer(value)
            if quantizers.p_bmm_quantizer.is_enabled:
                return _explicit(module, query, key, value, attention_mask, **kwargs)
        return _function(original, module)(module, query, key, value, attention_mask, **kwargs)

    return attention


def _function(name: str, module: nn.Module) -> Callable[..., Any]:
    """The attention function called `name`; "eager" is the one that the module's own file defines."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found: Callable[..., Any]
    if name != "eager":
        found = ALL_ATTENTION_FUNCTIONS[name]
        return found
    for kind in type(module).__mro__:
        source = sys.modules.get(kind.__module__)
        if source is not None and hasattr(source, "eager_attention_forward"):
            found = source.eager_attention_forward
            return found
    raise DetentError(f"{type(module).__name__} has no eager attention; load the model with attn_implementation='sdpa'")


def _explicit(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, for quantized probabilities: softmax(scaling QK' + mask), quantized, times V."""
    unknown = [k for k in ("softcap", "s_aux", "sinks") if kwargs.get(k) is not None]
    if unknown:
        raise DetentError(
            f"quantized attention probabilities do not support {', '.join(unknown)} of {type(module).__name__}"
        )
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is None and query.shape[-2] > 1 and kwargs.get("is_causal", getattr(module, "is_causal", True)):
        rows, columns = scores.shape[-2:]
        visible = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).tril(columns - rows)
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    elif attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    quantizer: Any = module.p_bmm_quantizer
    return (quantizer(weights) @ value).transpose(1, 2).contiguous(), weights
