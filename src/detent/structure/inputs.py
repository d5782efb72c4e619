"""Small inputs for a model that nobody gave any for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from detent.errors import DetentError
from detent.pretrained.facts import input_device, vocabulary_size

#: How a model is called.
Run = Callable[[nn.Module], Any]


def runs(model: nn.Module, example: Any = None) -> tuple[Run, Run]:
    """Two ways of calling a model: with many sequences of one token, and with a few of several.

    Args:
        model: the model.
        example: a callable that calls the model it is given, a tensor, a tuple of arguments or a dictionary of keyword
            arguments (both ways are then the same); None makes inputs from a transformers model's configuration.

    Raises:
        DetentError: nothing says what the model takes.
    """
    if example is None:
        return _from_config(model, batch=10, tokens=1), _from_config(model, batch=2, tokens=5)
    if isinstance(example, Tensor):
        example = (example,)
    if isinstance(example, Mapping):
        keywords = dict(example)
        return (lambda m: m(**keywords),) * 2
    if isinstance(example, (tuple, list)):
        arguments = tuple(example)
        return (lambda m: m(*arguments),) * 2
    if callable(example):
        return example, example
    raise DetentError(
        f"example inputs are a tensor, a tuple of arguments, a dictionary of keyword arguments or a function that calls"
        f" the model, not {type(example).__name__}"
    )


def _from_config(model: nn.Module, batch: int, tokens: int) -> Run:
    config: Any = getattr(model, "config", None)
    accepted = set(inspect.signature(model.forward).parameters)
    device = input_device(model)
    inputs: dict[str, Any] = {}
    size = None if config is None else vocabulary_size(config)
    if "input_ids" in accepted and size is not None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(size, (batch, tokens), generator=generator).to(device)
        inputs["input_ids"] = ids
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
            inputs["decoder_input_ids"] = ids
    elif "pixel_values" in accepted and config is not None:
        vision = getattr(config, "vision_config", config)
        sides = getattr(vision, "image_size", 224)
        height, width = sides if isinstance(sides, (list, tuple)) else (sides, sides)
        inputs["pixel_values"] = torch.ones(2, getattr(vision, "num_channels", 3), height, width, device=device)
    elif "input_features" in accepted and hasattr(config, "num_mel_bins"):
        frames = 2 * getattr(config, "max_source_positions", 1500)
        inputs["input_features"] = torch.ones(1, config.num_mel_bins, frames, device=device)
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = torch.ones(1, tokens, dtype=torch.long, device=device)
    else:
        raise DetentError(
            f"{type(model).__name__}: nothing says what inputs it takes; pass example inputs, or a function that calls"
            " it"
        )
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return lambda m: m(**inputs)
