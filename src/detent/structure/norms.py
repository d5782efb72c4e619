"""Whether a module without a weight matrix is a norm, and how its weight multiplies: found by trying."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detent.structure.values import householder, reflect

#: Relative to the largest value; norms add an epsilon below their root, and some compute in float32.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Scaling:
    """What is known of a module y = f(x) that gives a tensor of the shape of x.

    Attributes:
        fold: "norm" if f's parameters times a give a * y, "offset_norm" if (1 + weight) does, "" if neither.
        parameters: the parameters that take part, the weight first.
        axis: the channel axis, from the end.
        normalizes: f(a x) = f(x) for a > 0.
        centres: f(x + a) = f(x) as well.
        rotates: with its weight out of the way, f(x Q) = f(x) Q for orthogonal Q, as for RMSNorm.
    """

    fold: str
    parameters: tuple[str, ...]
    axis: int
    normalizes: bool
    centres: bool
    rotates: bool


def may_scale(module: nn.Module) -> bool:
    """Whether `describe` is worth trying: no modules inside, and parameters, if any, that are vectors of one length."""
    parameters = [p for p in module._parameters.values() if p is not None]
    if any(True for _ in module.children()) or any(p.dim() != 1 for p in parameters):
        return False
    sizes = {p.numel() for p in parameters}
    return not sizes or (len(sizes) == 1 and sizes != {1})


@torch.no_grad()
def describe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Scaling | None:
    """Try `module` out on tensors like ``args[0]``; None if it is neither a norm nor multiplies by a weight.

    The module itself isn't called: a copy with random parameters is.
    """
    x = args[0]
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.numel() == 0:
        return None
    twin = _twin(module)
    others = tuple(a.detach().double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args[1:])
    x = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(x.device)

    def f(x: Tensor) -> Any:
        return twin(x, *others, **kwargs)

    y = f(x)
    if not isinstance(y, Tensor) or y.shape != x.shape or not bool(y.isfinite().all()):
        return None
    names = tuple(n for n, p in twin._parameters.items() if p is not None)
    names = tuple(sorted(names, key=lambda n: n != "weight"))
    normalizes = _close(f(x * 8), y)
    fold, axis = _fold(twin, f, x, y, names)
    if not normalizes and not fold:
        return None
    centres = normalizes and _close(f(x + 2), y)
    rotates = normalizes and not centres and axis == -1 and _rotates(twin, f, x, fold, names)
    return Scaling(fold, names if fold else (), axis, normalizes, centres, rotates)


def _twin(module: nn.Module) -> nn.Module:
    """A copy on real memory with parameters, and floating-point buffers, drawn from [0.5, 1.5]."""
    memo: dict[int, Any] = {id(module.__dict__.get("forward")): None}
    twin = copy.deepcopy(module, memo)
    twin.__dict__.pop("forward", None)
    for hooks in (twin._forward_hooks, twin._forward_pre_hooks):
        hooks.clear()
    generator = torch.Generator().manual_seed(0)

    def drawn(tensor: Tensor) -> Tensor:
        device = torch.device("cpu") if tensor.is_meta else tensor.device
        if not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        return (torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5).to(device)

    for name, parameter in list(twin._parameters.items()):
        if parameter is not None:
            twin._parameters[name] = nn.Parameter(drawn(parameter), requires_grad=False)
    for name, buffer in list(twin._buffers.items()):
        if buffer is not None:
            twin._buffers[name] = drawn(buffer)
    return twin.eval()


def _fold(
    twin: nn.Module, f: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, names: tuple[str, ...]
) -> tuple[str, int]:
    """How the parameters multiply y, and along which axis."""
    if not names:
        return "", -1
    before = [p.detach().clone() for p in twin.parameters()]
    size = before[0].numel()
    factor = torch.rand(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(x.device) + 0.5
    for kind in ("norm", "offset_norm"):
        for name, parameter in twin.named_parameters():
            offset = 1.0 if kind == "offset_norm" and name == names[0] else 0.0
            parameter.copy_((parameter + offset) * factor - offset)
        changed = f(x)
        for parameter, value in zip(twin.parameters(), before, strict=True):
            parameter.copy_(value)
        for axis in range(-1, -x.dim() - 1, -1):
            if x.shape[axis] == size and _close(changed, y * factor.reshape(-1, *[1] * (-1 - axis))):
                return kind, axis
    return "", -1


def _rotates(twin: nn.Module, f: Callable[[Tensor], Tensor], x: Tensor, fold: str, names: tuple[str, ...]) -> bool:
    if names and not fold:
        return False
    for name, parameter in twin.named_parameters():
        parameter.fill_(1.0 if fold == "norm" and name == names[0] else 0.0)
    mirror = householder(x.shape[-1]).to(x.device)
    return _close(f(reflect(x, mirror)), reflect(f(x), mirror))


def _close(a: Any, b: Tensor) -> bool:
    return isinstance(a, Tensor) and a.shape == b.shape and bool((a - b).abs().max() <= _TOLERANCE * b.abs().max())
