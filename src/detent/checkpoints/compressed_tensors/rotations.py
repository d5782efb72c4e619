"""Hadamard rotations of inputs at run time, as compressed-tensors says them: ``transform_config``.

A group of layers whose inputs are turned in blocks of one size is named ``rotation_<size>``. vLLM has a fast kernel for
powers of two, and multiplies otherwise with the matrix of ones that each layer comes with, over the square root of the
size. transformers leaves all of this out, without an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from detent.checkpoints.records import LayerFormats
from detent.nn.hadamard import hadamard_transform

#: The largest matrix that layers come with, and the largest block of the kernel.
_LARGEST_MATRIX, _LARGEST_BLOCK = 1024, 1 << 15
_MODULE = re.compile(r"(.+)\.rotation_\d+_input")


def why_not(size: int) -> str | None:
    """None, or why inputs can't be rotated in blocks of `size`."""
    largest = _LARGEST_BLOCK if _is_power(size) else _LARGEST_MATRIX
    if size <= largest:
        return None
    return (
        f"an input that is rotated in blocks of {size}: powers of two up to {_LARGEST_BLOCK}, and others up to"
        f" {_LARGEST_MATRIX}; set rotation_size to a power of two that divides {size}"
    )


def transform_config(layers: Mapping[str, LayerFormats], targets: Callable[[str], list[str]]) -> dict[str, Any] | None:
    """What config.json says of the rotations of `layers`, whose `targets` name them; None where there are none."""
    groups: dict[str, Any] = {}
    for name, layer in layers.items():
        if layer.rotated:
            kind = "hadamard" if _is_power(layer.rotated) else "random-hadamard"
            apply = {"targets": [], "location": "input", "inverse": False, "ignore": []}
            group = {"type": kind, "apply": [apply], "head_dim": layer.rotated, "randomize": False}
            group = groups.setdefault(f"rotation_{layer.rotated}", group)
            group["apply"][0]["targets"] += targets(name)
    return {"config_groups": groups} if groups else None


def matrix(size: int) -> dict[str, Tensor]:
    """The tensors that go with a layer whose input is rotated: y = x H / sqrt(size)."""
    if size > _LARGEST_MATRIX:
        return {}
    ones = hadamard_transform(torch.eye(size)) * math.sqrt(size)
    return {f"rotation_{size}_input.weight": ones.round().to(torch.bfloat16)}


def rotated_module(module: str) -> str | None:
    """The layer that a module with such a matrix belongs to; None where it is another."""
    found = _MODULE.fullmatch(module)
    return None if found is None else found[1]


def _is_power(size: int) -> bool:
    return size & (size - 1) == 0
