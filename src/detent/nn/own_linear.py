"""Linear layers whose class has a forward of its own: subclasses of `nn.Linear` that compute what it does in another
way, and transformers' ``Conv1D`` (GPT-2), whose weight is [in, out]. They are called with the quantized weight in the
place of theirs, so that all else, the order of roundings in bfloat16 included, stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detent.nn.low_rank import add_low_rank
from detent.nn.modules import QuantLinear
from detent.nn.registry import QuantModuleRegistry, once_a_class

#: What checkpoints call a layer whose weight the model holds as [in, out].
TRANSPOSED = "Conv1D"


class QuantOwnLinear(QuantLinear):
    """A linear layer with a forward of its own, with quantized input, weight and output."""

    _made_of: tuple[type[nn.Module], type[nn.Module]]

    def forward(self, input: Tensor) -> Tensor:
        x = self.input_quantizer(input)
        self.__dict__["weight_in_use"] = self.quantized_weight()
        try:
            y = self._made_of[1].forward(self, x)  # that of the class it was converted from
        finally:
            del self.__dict__["weight_in_use"]
        out: Tensor = self.output_quantizer(add_low_rank(self, input, y))
        return out


class QuantTransposedLinear(QuantOwnLinear):
    """A linear layer whose weight is [in, out], with quantized input, weight and output."""

    @staticmethod
    def to_output_first(weight: Tensor, module: Any) -> Tensor:
        return weight.t()

    @staticmethod
    def from_output_first(weight: Tensor, module: Any) -> Tensor:
        return weight.t()

    @property
    def in_features(self) -> int:  # type: ignore[override]
        return int(self.weight.shape[0])

    @property
    def out_features(self) -> int:  # type: ignore[override]
        return int(self.weight.shape[1])


def kind_of(module: nn.Module) -> str:
    """What checkpoints call a module's class: one that multiplies as `nn.Linear` does is "Linear"."""
    if isinstance(module, QuantTransposedLinear):
        return TRANSPOSED
    return "Linear" if isinstance(module, nn.Linear) else type(module).__name__.removeprefix("Quant")


@torch.no_grad()
@once_a_class
def multiplies_alike(kind: type[nn.Module]) -> bool:
    """Whether a subclass of `nn.Linear` computes the same, found by calling it on a few numbers, with and without a
    bias, in training and evaluation. One that needs more than a weight and a bias doesn't."""
    if not issubclass(kind, nn.Linear):
        return False
    numbers = torch.linspace(-1, 1, 41, dtype=torch.float64).sin()
    weight, x = numbers[:6].reshape(2, 3), numbers[8:32].reshape(2, 4, 3)
    for bias, training in ((None, True), (numbers[6:8], True), (None, False), (numbers[6:8], False)):
        layer: Any = kind.__new__(kind)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features, layer.weight = 3, 2, nn.Parameter(weight)
        layer.bias = None if bias is None else nn.Parameter(bias)
        layer.training = training
        try:
            same = [torch.allclose(layer.forward(v), F.linear(v, weight, bias), 1e-12, 1e-12) for v in (x, x[0])]
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            return False
        if not all(same):
            return False
    return True


@once_a_class
def is_transposed(kind: type[nn.Module]) -> bool:
    """Whether a class is transformers' ``Conv1D``, or one derived from it with its forward."""
    found = next((base for base in kind.__mro__ if (base.__module__, base.__name__) == _CONV1D), None)
    return found is not None and kind.forward is vars(found)["forward"]


_CONV1D = ("transformers.pytorch_utils", "Conv1D")
QuantModuleRegistry.add_rule(is_transposed, QuantTransposedLinear)
QuantModuleRegistry.add_rule(multiplies_alike, QuantOwnLinear)
