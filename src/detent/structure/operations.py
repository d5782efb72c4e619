"""What a probe knows about PyTorch's operations: which take a weight, which only show another view of a tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

#: Operations with a weight operand: its position, and the axes (from the end) of its columns and rows.
PRODUCTS: dict[str, tuple[int, int, int]] = {
    "linear": (1, -1, -2),
    "matmul": (1, -2, -1),
    "__matmul__": (1, -2, -1),
    "mm": (1, -2, -1),
    "bmm": (1, -2, -1),
    "addmm": (2, -2, -1),
    "baddbmm": (2, -2, -1),
    "conv1d": (1, -2, -3),
    "conv2d": (1, -3, -4),
    "conv3d": (1, -4, -5),
    "conv_transpose1d": (1, -3, -2),
    "conv_transpose2d": (1, -4, -3),
    "conv_transpose3d": (1, -5, -4),
}
#: Where an operation takes what it adds to the product, if not third.
ADDEND = {"addmm": 0, "baddbmm": 0}
#: What leaves a tensor without memory as it is, because the result still shows which weight it is part of.
VIEWS = {
    *("__getitem__", "t", "transpose", "permute", "swapaxes", "view", "view_as", "reshape", "flatten", "unflatten"),
    *("unsqueeze", "squeeze", "expand", "chunk", "split", "unbind", "select", "narrow", "contiguous", "detach"),
    *("__get__", "size", "dim", "numel", "stride", "storage_offset", "data_ptr", "untyped_storage", "element_size"),
    *("is_contiguous", "is_floating_point", "requires_grad_", "__len__", "__iter__"),
}
#: What gives a weight's values in another dtype or place.
CASTS = {"to", "type", "float", "double", "half", "bfloat16", "clone", "type_as", "cuda", "cpu"}
SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
CHOICES = {"topk", "argmax", "sort", "argsort", "max"}


def operands_of(args: Any, kwargs: Any) -> list[Any]:
    """The tensors of an operation in order, given by position or by name."""
    named = ("input", "batch1", "mat1", "other", "tensor2", "batch2", "mat2", "weight", "bias")
    return [*args, *(kwargs[name] for name in named if name in kwargs)]


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among values, and in lists and dictionaries of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)
        elif isinstance(value, dict):
            yield from tensors_in(value.values())


def mixed(func: Any, args: Any, kwargs: Any) -> Any:
    """Call an operation; where it refuses float64 mixed with the model's own dtype, with everything in float64."""
    try:
        return func(*args, **kwargs)
    except RuntimeError:
        kinds = {v.dtype for v in tensors_in((args, *kwargs.values())) if v.is_floating_point()}
        if len(kinds) < 2 or torch.float64 not in kinds:
            raise

    def wide(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(wide, value))
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return func(*map(wide, args), **{k: wide(v) for k, v in kwargs.items()})


def result_shape(func: Any, args: Any, kwargs: Any) -> torch.Size:
    """The shape of an operation's result, computed without memory."""

    def empty(value: Any) -> Any:
        return torch.empty(value.shape, device="meta") if isinstance(value, Tensor) else value

    shape: torch.Size = func(*map(empty, args), **{k: empty(v) for k, v in kwargs.items()}).shape
    return shape


def outputs_of(output: Any) -> list[tuple[str, Tensor]]:
    """What counts as the model's function: ``logits`` where there are any, else every tensor."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return [("logits", logits)]
    found: list[tuple[str, Tensor]] = []

    def collect(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            if value.is_floating_point():
                found.append((name, value))
        elif isinstance(value, dict) or hasattr(value, "items"):
            for key, item in value.items():
                collect(str(key), item)
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                collect(f"{name}[{index}]", item)

    collect("output", output)
    return found
