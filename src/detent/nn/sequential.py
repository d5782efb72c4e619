"""`SequentialQuantizer`: several quantizers one after the other on one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from detent.config.attributes import QuantizerAttributeConfig
from detent.errors import DetentError
from detent.nn.tensor_quantizer import TensorQuantizer


class SequentialQuantizer(nn.Sequential):
    """Several quantizers one after the other on one tensor (int4, then FP8: the weights of W4A8).

    Args:
        quantizers: the `TensorQuantizer`s in the order of their application.


    Example:
        >>> import torch
        >>> from detent import SequentialQuantizer, TensorQuantizer
        >>> quantizer = SequentialQuantizer(TensorQuantizer({"num_bits": 4}), TensorQuantizer({"num_bits": (4, 3)}))
        >>> quantizer(torch.tensor([0.5, 7.0]))
        tensor([0., 7.])
    """

    def __init__(self, *quantizers: TensorQuantizer) -> None:
        super().__init__(*quantizers)

    @property
    def members(self) -> list[TensorQuantizer]:
        """The quantizers, first applied first."""
        return list(self)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        return self.members[0].name.removesuffix(".0") if len(self) else "tensor"

    @name.setter
    def name(self, value: str) -> None:
        for index, quantizer in enumerate(self.members):
            quantizer.name = f"{value}.{index}"

    @property
    def is_enabled(self) -> bool:
        """Whether any member is on."""
        return any(q.is_enabled for q in self.members)

    @property
    def needs_calibration(self) -> bool:
        return any(q.needs_calibration for q in self.members)

    @property
    def transforms(self) -> bool:
        """Whether calling it can change a tensor."""
        return any(q.transforms for q in self.members)

    def enable(self) -> None:
        for quantizer in self.members:
            quantizer.enable()

    def disable(self) -> None:
        for quantizer in self.members:
            quantizer.disable()

    def reset_amax(self) -> None:
        for quantizer in self.members:
            quantizer.reset_amax()

    def state_tensors(self) -> list[Tensor]:
        return [t for q in self.members for t in q.state_tensors()]

    def state_key(self) -> tuple[Any, ...]:
        return tuple(q.state_key() for q in self.members)

    def set_from_attribute_config(self, attributes: Sequence[QuantizerAttributeConfig | Mapping[str, Any]]) -> None:
        """Replace the members' attributes; the list must be as long as there are members."""
        if len(attributes) != len(self):
            raise DetentError(f"{self.name}: {len(self)} quantizers in sequence, but {len(attributes)} configurations")
        for quantizer, config in zip(self.members, attributes, strict=True):
            quantizer.set_from_attribute_config(config)


Quantizer = TensorQuantizer | SequentialQuantizer


def members_of(quantizer: Quantizer) -> list[TensorQuantizer]:
    """The single quantizers of one or of a sequence."""
    return quantizer.members if isinstance(quantizer, SequentialQuantizer) else [quantizer]
