"""Quantizing a checkpoint without data: each weight is read, quantized as planned and passed on; no model is built."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from detent.algorithms.weight_ranges import calibrate_weight
from detent.checkpoints import Source
from detent.config import QuantizeAlgorithmConfig
from detent.formats import Scales, encode
from detent.nn import QuantWeightBase, TensorQuantizer
from detent.plan.plan import Plan
from detent.runs.simulate import SimulatedLayer, layer_as_quantized


class LayerStream:
    """The layers of a plan that `Plan.streams`, each quantized when it is asked for and then let go: a `Quantized`.

    The quantizers are those of the plan's skeleton, so that a layer gets the very bits that it would get in a model.

    Args:
        source: the checkpoint.
        plan: of it.
        dtype: that a model would be held in: weights are rounded to it first.
        device: where weights are quantized.
    """

    #: Nothing but the layers changes, and nothing is calibrated.
    values: Mapping[str, Tensor] = MappingProxyType({})
    kv: Mapping[str, tuple[Scales, ...]] = MappingProxyType({})
    untied = False

    def __init__(self, source: Source, plan: Plan, dtype: torch.dtype, device: str = "cpu") -> None:
        self.formats = plan.formats
        self._source, self._plan, self._dtype, self._device = source, plan, dtype, device
        #: {layer: largest magnitude of all the layers that share its scale of scales}
        self._common: dict[str, Tensor] = {}
        for group in plan.groups_with_common_scale:
            largest = torch.stack([self._weight(name).abs().amax().float() for name in group]).amax()
            self._common |= dict.fromkeys(group, largest)

    @torch.no_grad()
    def layer(self, name: str, *, measured: bool = True) -> SimulatedLayer:
        """Quantize one layer; `measured`: whether its error is wanted.

        Raises:
            DetentError: its weight can't be read, or holds NaN or infinity.
        """
        module = self._plan.skeleton.get_submodule(name)
        assert isinstance(module, QuantWeightBase)
        if self._plan.formats.layers[name].weight is None:
            return layer_as_quantized(name, module, self._plan, None)
        weight, quantizer = self._weight(name), module.weight_quantizer
        steps: list[QuantizeAlgorithmConfig | None] = [*self._plan.algorithms] or [None]
        for step in steps:
            calibrate_weight(f"{name}.weight", quantizer, weight, step)
        importance = self._plan.layout.importance(self._plan.names.layer(name) or name)
        if importance is not None:
            assert isinstance(quantizer, TensorQuantizer)
            quantizer.load_scales(encode(weight, quantizer.format, importance=importance.to(weight.device)).scales)
        if name in self._common:
            assert isinstance(quantizer, TensorQuantizer)
            quantizer.global_amax = self._common[name]
        simulated = layer_as_quantized(name, module, self._plan, weight, measured=measured)
        for member in quantizer.modules():
            if isinstance(member, TensorQuantizer):
                member.reset_amax()
        return simulated

    def _weight(self, name: str) -> Tensor:
        module: Any = self._plan.skeleton.get_submodule(name)
        weight = self._plan.weight(name, self._source).to(self._device, self._dtype)
        return module.to_output_first(weight, module).contiguous()  # type: ignore[no-any-return]
