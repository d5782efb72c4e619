"""Attention whose module multiplies queries, keys, probabilities and values itself, or calls PyTorch's function for it.

While such a module runs, its own products are looked at: those of its class's code, not of the modules inside it. The
second factor of the product that a softmax follows is the keys, that of the next product after the softmax the values;
PyTorch's `scaled_dot_product_attention` names them. They are quantized on their way in, as [batch, heads, tokens,
channels]. What the module does otherwise stays as it is, and no source is touched.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dis import get_instructions
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from detent.errors import DetentError
from detent.nn.quant_module import QuantModule
from detent.nn.registry import once_a_class
from detent.nn.sequential import Quantizer
from detent.nn.tensor_quantizer import TensorQuantizer

#: Quantizers of queries, keys, values and probabilities; all see [batch, heads, tokens, ...].
QUANTIZERS = ("q_bmm_quantizer", "k_bmm_quantizer", "v_bmm_quantizer", "p_bmm_quantizer")
TOKEN_AXIS = 2
_FUSED = "scaled_dot_product_attention"
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
#: By function, its factors: as arguments, and by name.
_FACTORS = {"matmul": (0, "input", "other"), "bmm": (0, "input", "mat2"), "baddbmm": (1, "batch1", "batch2")}
_FACTORS["__matmul__"] = _FACTORS["matmul"]


def add_quantizers(module: nn.Module) -> None:
    """Give a module q/k/v/p quantizers, switched off, where it has none yet."""
    for name in QUANTIZERS:
        if not hasattr(module, name):
            quantizer = TensorQuantizer({"enable": False})
            quantizer.token_axis = TOKEN_AXIS
            quantizer.train(module.training)
            setattr(module, name, quantizer)


@once_a_class
def own_code(kind: type[nn.Module]) -> frozenset[CodeType]:
    """The code of a class's forward and of its methods that this calls, PyTorch's and Detent's apart."""
    found: set[CodeType] = set()
    pending = ["forward"]
    bases = [base for base in kind.__mro__ if not base.__module__.startswith(("torch.", "detent."))]
    while pending:
        name = pending.pop()
        function: Any = next((vars(base)[name] for base in bases if name in vars(base)), None)
        code = getattr(inspect.unwrap(getattr(function, "__func__", function)), "__code__", None)
        if code is not None and code not in found:
            found.add(code)
            pending.extend(code.co_names)
    return frozenset(found)


@once_a_class
def multiplies(kind: type[nn.Module]) -> bool:
    """Whether a class's own code computes attention: by PyTorch's function, or by products and a softmax."""
    names = {name for code in own_code(kind) for name in code.co_names}
    if _FUSED in names or not any(name.lower().strip("_") == "softmax" for name in names):
        return _FUSED in names
    return bool(names & _FACTORS.keys()) or any(
        instruction.opname == "BINARY_OP" and instruction.argrepr == "@"
        for code in own_code(kind)
        for instruction in get_instructions(code)
    )


class QuantAttention(QuantModule):
    """A module that `multiplies`, with quantized queries, keys, values and probabilities."""

    def _setup(self) -> None:
        add_quantizers(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not any(quantizer.is_enabled for quantizer in quantizers_in(self)):
            return super().forward(*args, **kwargs)
        return self._looked_into(*args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiler can't follow who calls a product
    def _looked_into(self, *args: Any, **kwargs: Any) -> Any:
        hidden = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        with AttentionProducts(self, own_code(type(self)), 1 if hidden is None else len(hidden)) as products:
            result = super().forward(*args, **kwargs)
        products.check()
        return result


def quantizers_in(module: nn.Module) -> Iterator[Quantizer]:
    """The q/k/v/p quantizers of a module, where it has any."""
    return (quantizer for name in QUANTIZERS if (quantizer := getattr(module, name, None)) is not None)


class AttentionProducts(TorchFunctionMode):
    """While active, what `code` multiplies for attention goes through the quantizers of `module`.

    Args:
        module: with the quantizers.
        code: whose calls count.
        batch: the number of sequences, to take apart what is laid out as [batch * heads, tokens, channels].
        sides: which of queries, keys, values and probabilities are quantized here.

    Raises:
        DetentError: products that aren't those of attention, so that keys and values can't be told.
    """

    def __init__(self, module: nn.Module, code: frozenset[CodeType], batch: int, sides: str = "qkvp") -> None:
        super().__init__()
        self._quantizers: Any = module
        self._sides = sides
        self._code, self._batch, self._kind = code, batch, type(module).__name__.removeprefix("Quant")
        #: What comes next: the product of queries and keys, their softmax, or the product with values.
        self._next = "scores"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in (_FUSED, "softmax", *_FACTORS) or not self._called_from_code():
            return func(*args, **kwargs)
        if name == _FUSED:
            return self._fused(func, args, kwargs)
        if name == "softmax":
            self._next = "values" if self._next == "softmax" else self._next
            return func(*args, **kwargs)
        self.check()
        return self._product(func, name, list(args), kwargs)

    def check(self) -> None:
        """Raises DetentError where a product that is no product of queries and keys was taken for one."""
        if self._next == "softmax":
            raise DetentError(
                f"{self._quantizers.k_bmm_quantizer.name}: {self._kind} multiplies activations and doesn't take the"
                " softmax of that, so keys can't be told from the rest; leave its attention unquantized"
            )

    def _called_from_code(self) -> bool:
        """Whether PyTorch was called by `code`, and not by a module in between."""
        frame = sys._getframe(2)
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("torch."):
            frame = frame.f_back
        return frame.f_code in self._code

    def _product(self, func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        first, *names = _FACTORS[name]
        places = [(args, first + i) if first + i < len(args) else (kwargs, n) for i, n in enumerate(names)]
        left, right = (container[key] for container, key in places)  # type: ignore[index]
        if min(left.dim(), right.dim()) < 3 or isinstance(right, nn.Parameter):
            return func(*args, **kwargs)  # not of activations
        if self._next == "scores":
            left = self._through("q", left)
            right = self._through("k", right.transpose(-1, -2)).transpose(-1, -2)
        else:
            left, right = self._through("p", left), self._through("v", right)
        self._next = "softmax" if self._next == "scores" else "scores"
        for (container, key), value in zip(places, (left, right), strict=True):
            container[key] = value  # type: ignore[index]
        return func(*args, **kwargs)

    def _fused(self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
        given |= {name: self._through(name[0], given[name]) for name in _ARGUMENTS[:3]}
        quantizer = self._quantizers.p_bmm_quantizer
        return written_out(quantizer, **given)[0] if quantizer.is_enabled else func(**given)

    def _through(self, which: str, x: Tensor) -> Tensor:
        if which not in self._sides:
            return x
        quantizer = getattr(self._quantizers, f"{which}_bmm_quantizer")
        if x.dim() == 3 and x.shape[0] % self._batch == 0:
            split: Tensor = quantizer(x.unflatten(0, (self._batch, -1)))
            return split.flatten(0, 1)
        result: Tensor = quantizer(x)
        return result


def written_out(
    p_quantizer: Callable[[Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention in separate operations, for quantized probabilities: softmax(scale QK' + mask), quantized, times V.

    Args:
        p_quantizer: of probabilities.
        query, key, value: [batch, heads, tokens, channels], of keys and values as many heads or fewer.
        attn_mask: True for what is seen, or what is added to the scores.
        dropout_p, is_causal, scale, enable_gqa: as for PyTorch's `scaled_dot_product_attention`.

    Returns:
        The result, laid out as the query, and the probabilities before they are quantized.
    """
    repeat = query.shape[-3] // key.shape[-3]
    key, value = key.repeat_interleave(repeat, -3), value.repeat_interleave(repeat, -3)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is None and is_causal and query.shape[-2] > 1:
        rows, columns = scores.shape[-2:]
        attn_mask = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).tril(columns - rows)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout_p, dropout_p > 0)
    return p_quantizer(weights) @ value, weights
