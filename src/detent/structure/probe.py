"""A run of a model in which no weight is used: what a model's structure is does not depend on its weights.

Every operation with a weight matrix (linear, convolution, embedding lookup, fused experts) is *cut*: its input is
noted, and instead of its product random numbers of the product's shape go on. Norms, and modules that multiply by a
vector, are cut too. So between two cuts there are only activation functions, attention, gates and sums, and

* a run costs no matrix products and works on the meta device, whatever the size of the model;
* what a cut's input depends on is exactly the few *leaves* (outputs of cuts) that autograd's graph leads to;
* a change of one leaf is seen exactly where the real change of that weight's output would be seen first.

Invariant: with all inputs of cuts equal, two models of the same weights compute the same function. Hence a fold is
proved where scaled leaves times the scale of the columns that read them give the inputs that the unscaled run had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from detent.nn import TensorQuantizer
from detent.nn.experts import StandIn
from detent.nn.walk import walk
from detent.structure.attention import plain_attention
from detent.structure.norms import Scaling, describe, may_scale
from detent.structure.operations import (
    ADDEND,
    CASTS,
    CHOICES,
    PRODUCTS,
    SUMS,
    VIEWS,
    mixed,
    operands_of,
    outputs_of,
    result_shape,
    tensors_in,
)
from detent.structure.trace import Leaf, Producer, Reading, Trace
from detent.structure.values import combinations, positive
from detent.structure.weights import DrawnWeights, memory, prepared


class Probe(TorchFunctionMode):
    """Cuts a model's operations while it is active.

    Args:
        model: the model.
        draw: gives the numbers of a leaf from its shape and its number in the run, float64.
        change: by producer, what its leaves go on as.
        look: called with each reading while its graph is still there.
        dtype: of the activations.
    """

    def __init__(
        self,
        model: nn.Module,
        draw: Callable[[torch.Size, int], Tensor],
        *,
        change: dict[str, Callable[[Tensor, int], Tensor]] | None = None,
        look: Callable[[Reading], None] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        self.trace = Trace()
        self._model, self._draw, self._change, self._look, self._dtype = model, draw, change or {}, look, dtype
        self._weights = DrawnWeights(model)
        self._leaves: Any = WeakTensorKeyDictionary()
        self._drawn = 0
        self._running: list[str] = []
        self._scalings: dict[Any, Scaling | None] = {}
        self._sources: dict[str, set[str]] = {}
        self._product: tuple[Tensor, Tensor] | None = None
        self._scores: set[str] | None = None
        self._real: dict[Any, Tensor] = {}

    @property
    def _current(self) -> str:
        """The innermost running module that has a weight matrix."""
        return self._running[-1] if self._running else ""

    # ---- operations -------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        stand_in = next((arg for arg in args if isinstance(arg, StandIn)), None)
        if stand_in is not None:  # calls the layers of an expert, whose operations are to be seen
            with self:
                return stand_in.__torch_function__(func, types, args, kwargs)
        cut = self._cut(func, name, args, kwargs)
        if cut is not None:
            return cut
        if name not in VIEWS:
            self._note(name, args, kwargs)
            if self._current not in self._weights.computing:
                used = (self._weights.find(v, self._current) for v in tensors_in(args))
                self.trace.used.update(weight for weight in used if weight is not None)
        if any(v.is_meta for v in tensors_in((args, *kwargs.values()))):
            if name == "__get__" and func == torch.Tensor.device.__get__:
                return torch.device("cpu")
            if name in VIEWS:
                return func(*args, **kwargs)
            args, kwargs = self._realised(args), {k: self._realised(v) for k, v in kwargs.items()}
        return mixed(func, args, kwargs)

    def _cut(self, func: Any, name: str, args: Any, kwargs: Any) -> Tensor | None:
        """The result put in place of an operation with a weight; None for any other operation."""
        if name in CASTS and (weight := self._weights.find(args[0], self._current)) is not None:
            dtypes = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.dtype)]
            cast: Tensor = args[0].to(dtypes[0]) if args[0].is_meta and dtypes else func(*args, **kwargs)
            self._weights.cast(cast, weight)
            return cast
        if name == "embedding":
            return self._lookup(args, kwargs)
        if name in PRODUCTS:
            return self._weighted(func, PRODUCTS[name], args, kwargs)
        if name in SUMS and len(args) > 1:
            return next((a for a, b in (args[:2], args[1::-1]) if self._absorbs(a, b)), None)
        return None

    def _weighted(self, func: Any, product: tuple[int, int, int], args: Any, kwargs: Any) -> Tensor | None:
        position, columns, rows = product
        operands = operands_of(args, kwargs)
        if len(operands) <= position:
            return None
        weight, x = operands[position], operands[position - 1]
        axis = -1
        name = self._weights.find(weight, self._current)
        if name is None and "matmul" in func.__name__:
            name = self._weights.find(x, self._current)
            if name is not None:  # W @ x: channels of x and of the product are on the last axis but one
                weight, x, columns, rows, axis = x, weight, -1, -2, -2
        computed = name is None and self._current in self._weights.computing and getattr(weight, "ndim", 0) >= 2
        if not isinstance(x, Tensor) or (name is None and not computed):
            return None
        convolution = func.__name__.startswith("conv")
        if convolution:
            axis = 1 - weight.dim()
        if name is not None:
            if name != self._current:
                self.trace.taken[name] = None
            axes, whole, all_rows = self._weights.axes(name, weight, columns, rows)
            parts = 0 if convolution else self._weights.parts(name, weight)
            if self._weights.parameters[name].dim() == 3 and not convolution:
                self.trace.fused[name] = (self._weights.parameters[name].shape[0], False)
                axes = (axes[0] - 3, axes[1] - 3)
            elif parts > 1:
                self.trace.fused[name] = (parts, True)
        else:
            name, axes, whole, all_rows = self._current, (columns % weight.dim(), rows % weight.dim()), True, True
        self._read("weight", name, x, axis, column_axis=axes[0], whole=whole)
        addend = operands[ADDEND.get(func.__name__, 2)] if len(operands) > 2 else None
        bias = self._weights.attribute_of(name, addend) if isinstance(addend, Tensor) else None
        if name not in self.trace.producers:
            self.trace.producers[name] = self._producer(name, axes[1], all_rows, bias)
        self._product = None
        leaf = self._leaf(name, "rows", result_shape(func, args, kwargs), axis, x.device)
        return leaf + addend if isinstance(addend, Tensor) and bias is None and not computed else leaf

    def _producer(self, name: str, axis: int, usable: bool, bias: str | None) -> Producer:
        attribute = self._weights.attributes.get(name)
        module = name if attribute in (None, "weight") else name.rpartition(".")[0]
        if attribute is None or not usable:
            return Producer("rows", module, (), axis)
        return Producer("rows", module, (attribute, *([bias] if bias else [])), axis)

    def _absorbs(self, a: Any, b: Any) -> bool:
        """Whether `a` comes straight from a cut and `b` is the bias that its module adds: a part of the cut."""
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or type(a.grad_fn).__name__ != "CloneBackward0":
            return False
        variable = getattr(a.grad_fn.next_functions[0][0], "variable", None)  # type: ignore[union-attr]
        leaf = None if variable is None else self._leaves.get(variable)
        if leaf is None or b.shape[-1:] != a.shape[-1:] or leaf.axis != -1:
            return False
        bias = self._weights.attribute_of(leaf.producer, b)
        producer = self.trace.producers[leaf.producer]
        if bias is None or not producer.parameters or len(producer.parameters) > 2:
            return False
        if bias not in producer.parameters:
            self.trace.producers[leaf.producer] = replace(producer, parameters=(*producer.parameters, bias))
        return True

    def _lookup(self, args: Any, kwargs: Any) -> Tensor | None:
        ids, table = (*args, *kwargs.values())[:2]
        name = self._weights.find(table, self._current)
        if name is None:
            return None
        self.trace.embeddings[name] = None
        self.trace.producers[name] = Producer("embedding", name, (), 1)
        return self._leaf(name, "embedding", torch.Size((*ids.shape, table.shape[1])), -1, ids.device)

    def _note(self, name: str, args: Any, kwargs: Any) -> None:
        """Remember which leaves make keys and values, and which choose among experts.

        PyTorch's own attention names its key and value. Attention spelled out is recognised by three operations,
        in this order; neither of its products has a weight::

            q @ k^T        a product of two activations: kept in `_product`
            softmax        of something that depends on all that q and k depend on: k is a key, and `_scores` are
                           the leaves that the softmax depends on
            scores @ v     the next product whose left factor depends on all of `_scores`: v is a value

        Experts are chosen by a top-k, sort or maximum of a weight's output.
        """
        if name == "scaled_dot_product_attention":
            tensors = (*args, *(kwargs[k] for k in ("query", "key", "value") if k in kwargs))
            self.trace.keys.update(dict.fromkeys(self._makers(tensors[1])))
            self.trace.values.update(dict.fromkeys(self._makers(tensors[2])))
        elif name in PRODUCTS and len(operands := operands_of(args, kwargs)) > (second := PRODUCTS[name][0]):
            a, b = operands[second - 1 : second + 1]
            # Other products may come between the softmax and this one; they leave `_scores` as it is.
            if self._scores is not None and self._scores <= {leaf.producer for leaf in self.leaves_of(a)}:
                self.trace.values.update(dict.fromkeys(self._makers(b)))
                self._scores, self._product = None, None
            else:
                self._product = (a, b)
        elif name == "softmax" and self._product is not None:
            a, b = self._product
            scores = {leaf.producer for leaf in self.leaves_of(args[0])}
            if scores and scores >= {leaf.producer for leaf in (*self.leaves_of(a), *self.leaves_of(b))}:
                self.trace.keys.update(dict.fromkeys(self._makers(b)))
                self._scores = scores
            self._product = None
        elif name in CHOICES and args and (name != "max" or len(args) > 1 or "dim" in kwargs):
            sizes = {leaf.producer: leaf.size for leaf in self.leaves_of(args[0])}
            self.trace.choosers.update({maker: sizes.get(maker, 0) for maker in self._makers(args[0])})

    # ---- cuts -------------------------------------------------------------------------------------------------------

    def _leaf(self, producer: str, kind: str, shape: torch.Size, axis: int, device: torch.device) -> Tensor:
        self._drawn += 1
        value = self._draw(shape, self._drawn).to(device, self._dtype)
        if producer in self._change:
            value = self._change[producer](value, axis)
        value.requires_grad_()
        self._leaves[value] = Leaf(producer, kind, axis, shape[axis])
        return value.clone()  # a leaf of autograd's can't be changed in place

    def _read(self, kind: str, name: str, x: Tensor, axis: int, *, column_axis: int = 0, whole: bool = True) -> Reading:
        if not x.is_floating_point() or x.is_meta:
            x = torch.zeros(x.shape, dtype=self._dtype)
        flat = x.movedim(axis, -1) if axis != -1 and x.dim() > 1 else x
        flat = flat.reshape(-1, flat.shape[-1] if flat.dim() else 1).clone()
        with torch.no_grad():
            sums = (combinations(flat.shape[0]).to(flat.device) @ flat.double()).cpu()
        reading = Reading(kind, name, flat, self.leaves_of(x), sums, flat.shape[0], column_axis, whole)
        if self._look is not None:
            self._look(reading)
        reading.tensor, reading.leaves = None, dict.fromkeys(reading.leaves, sums[:0])
        self.trace.readings.append(reading)
        return reading

    def leaves_of(self, tensor: Any) -> dict[Leaf, Tensor]:
        """The leaves that a tensor was computed from, with their values."""
        if not isinstance(tensor, Tensor):
            return {}
        found: dict[Leaf, Tensor] = {}
        seen, pending = set(), [tensor.grad_fn]
        while pending:
            node: Any = pending.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)
            leaf = None if variable is None else self._leaves.get(variable)
            if leaf is not None and variable is not None:
                found[leaf] = variable
            pending.extend(edge[0] for edge in node.next_functions)
        return found

    def _makers(self, tensor: Any) -> list[str]:
        """The weights whose outputs a tensor is made of, looking through norms (of queries and keys)."""
        made: dict[str, None] = {}
        for leaf in self.leaves_of(tensor):
            if leaf.kind == "rows":
                made[leaf.producer] = None
            elif len(sources := self._sources.get(leaf.producer, ())) <= 2:
                made.update(dict.fromkeys(sources))
        return list(made)

    def _scaled(self, name: str, module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        """A forward that cuts a module which turns out to be a norm or to multiply by a vector."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not args and kwargs:
                first = next(iter(kwargs))
                args = (kwargs.pop(first),)
            if not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
                return original(*args, **kwargs)
            key = (type(module), tuple(p.shape for p in module.parameters()), args[0].dim(), len(args), repr(module))
            if key not in self._scalings:
                self._scalings[key] = describe(module, args, kwargs)
            scaling = self._scalings[key]
            if scaling is None:
                return original(*args, **kwargs)
            for x in (*args, *kwargs.values()):
                if isinstance(x, Tensor) and x.is_floating_point():
                    reading = self._read("norm", name, x, scaling.axis)
                    self._sources[name] = {leaf.producer for leaf in reading.leaves}
            self.trace.producers[name] = Producer("norm", name, scaling.parameters, 0, scaling)
            return self._leaf(name, "norm", args[0].shape, scaling.axis, args[0].device)

        return forward

    # ---- a run ------------------------------------------------------------------------------------------------------

    def run(self, call: Callable[[nn.Module], Any]) -> Trace:
        """Run the model under the probe; its outputs are the last readings."""
        with prepared(self._model), self._forwards():
            with self:
                output = call(self._model)
            for name, tensor in outputs_of(output):
                self._read("output", name, tensor, -1)
        return self.trace

    @contextmanager
    def _forwards(self) -> Iterator[None]:
        """Note which module with a matrix runs, and replace the forward of those that may be norms."""
        handles: list[Any] = []
        forward: Callable[..., Any] | None
        replaced: list[tuple[nn.Module, Any]] = []
        owners = self._weights.parameters
        try:
            for name, module in walk(self._model):
                if isinstance(module, TensorQuantizer) or not name:
                    continue
                own = name in owners or any(f"{name}.{p}" in owners for p in module._parameters)
                if own or name in self._weights.computing:
                    handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._running.append(name)))
                    handles.append(
                        module.register_forward_hook(lambda *_: (self._running.pop(), None)[1], always_call=True)
                    )
                forward = plain_attention(module)
                if forward is None and not own and name not in self._weights.computing and may_scale(module):
                    forward = self._scaled(name, module, module.forward)
                if forward is not None:
                    replaced.append((module, module.__dict__.get("forward")))
                    module.forward = forward
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, before in replaced:
                if before is None:
                    del module.__dict__["forward"]
                else:
                    module.forward = before

    def _realised(self, value: Any) -> Any:
        """Tensors on the meta device as tensors that hold some numbers."""
        if isinstance(value, (list, tuple)):
            return type(value)(self._realised(v) for v in value)
        if not isinstance(value, Tensor) or not value.is_meta:
            return value
        key = (memory(value), value.storage_offset(), value.shape, value.stride())
        if key not in self._real:
            if value.is_floating_point():
                small = value.numel() < 1 << 24
                number = positive(value.shape if small else torch.Size([1] * value.dim()), seed=value.numel())
                real = number.to(value.dtype).expand(value.shape)
            else:
                real = torch.full(value.shape, value.dtype == torch.bool, dtype=value.dtype)
            self._real[key] = real
        return self._real[key]
