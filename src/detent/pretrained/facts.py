"""What a Hugging Face model says about the token ids it takes, and the state it reads them in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

#: Names under which configurations state how many positions the model has; the usual one first.
_POSITION_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")


def max_sequence_length(config: Any) -> int | None:
    """The longest sequence that a model with this configuration takes, or None where it doesn't say."""
    for part in _text_configs(config):
        for field in _POSITION_FIELDS:
            value = getattr(part, field, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def vocabulary_size(config: Any) -> int | None:
    """How many token ids a model with this configuration knows, or None where it doesn't say."""
    for part in _text_configs(config):
        value = getattr(part, "vocab_size", None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def input_device(model: nn.Module) -> torch.device:
    """The device that a model takes its token ids on: that of its embedding, else of its first parameter or buffer."""
    get_embedding = getattr(model, "get_input_embeddings", None)
    modules = [model] if get_embedding is None else [get_embedding(), model]
    for module in modules:
        if isinstance(module, nn.Module):
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.device.type != "meta":
                    return tensor.device
    return torch.device("cpu")


def is_multimodal(model: nn.Module) -> bool:
    """Whether a model's configuration has a part of its own for text."""
    config: Any = getattr(model, "config", None)
    get_text: Any = getattr(config, "get_text_config", None)
    return get_text is not None and get_text() is not config


def outside_language(model: nn.Module) -> Callable[[str], bool]:
    """A function that says whether a module's name is outside the language part of a model of several modalities."""
    get_decoder: Any = getattr(model, "get_decoder", None)
    if get_decoder is None or not is_multimodal(model):
        return lambda name: False
    decoder = get_decoder()
    inside = next((name for name, module in model.named_modules() if module is decoder), "")
    return lambda name: bool(inside) and not name.startswith(f"{inside}.")


def is_beside(model: nn.Module, name: str) -> bool:
    """Whether a name in a checkpoint lies in a part that the model's class doesn't have: beside its own parts, or
    behind its last block, where layers that predict several tokens at once are."""
    module = model
    for part in name.split("."):
        child = module._modules.get(part)
        if child is None:
            return module is model or (
                isinstance(module, nn.ModuleList) and part.isdigit() and int(part) >= len(module)
            )
        module = child
    return False


def _text_configs(config: Any) -> list[Any]:
    """The configuration and, for a model of several modalities, that of its language model first."""
    text = getattr(config, "text_config", None)
    return [config] if text is None else [text, config]
