"""Quantizing what a checkpoint has beside the model: weight by weight from disk, without data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detent.algorithms.weight_ranges import calibrate_weight
from detent.checkpoints import ModelFormats, Source
from detent.formats import Scales
from detent.nn import TensorQuantizer
from detent.plan.plan import Plan
from detent.runs.simulate import Quantized, SimulatedLayer, layer_as_quantized


def with_carried(quantized: Quantized, source: Source, plan: Plan, dtype: torch.dtype, device: str) -> Quantized:
    """`quantized`, and the layers beside the model that the plan quantizes too."""
    return _WithCarried(quantized, source, plan, dtype, device) if plan.carried.formats else quantized


@dataclass(frozen=True)
class _WithCarried:
    """A `Quantized`."""

    inner: Quantized
    source: Source
    plan: Plan
    dtype: torch.dtype
    device: str

    @property
    def formats(self) -> ModelFormats:
        return replace(self.inner.formats, layers={**self.inner.formats.layers, **self.plan.carried.formats})

    @property
    def values(self) -> Mapping[str, Tensor]:
        return self.inner.values

    @property
    def kv(self) -> Mapping[str, tuple[Scales, ...]]:
        return self.inner.kv

    @property
    def untied(self) -> bool:
        return self.inner.untied

    @torch.no_grad()
    def layer(self, name: str, *, measured: bool = True) -> SimulatedLayer:
        carried = self.plan.carried
        if name not in carried.formats:
            return self.inner.layer(name, measured=measured)
        module, weight = carried.modules[name], self._weight(name)
        quantizer = module.weight_quantizer
        calibrate_weight(f"{name}.weight", quantizer, weight, None)
        group = next((group for group in carried.groups if name in group), ())
        if len(group) > 1 and isinstance(quantizer, TensorQuantizer) and quantizer.global_amax is not None:
            quantizer.global_amax = torch.stack([self._weight(n).abs().amax().float() for n in group]).amax()
        plan = replace(self.plan, formats=replace(self.plan.formats, layers=carried.formats))
        return layer_as_quantized(name, module, plan, weight, measured=measured)

    def _weight(self, name: str) -> Tensor:
        return self.source.tensor(f"{name}.weight").to(self.device, self.dtype)
