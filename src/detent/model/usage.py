"""Whether quantizers that are on take part when the model runs.

A quantizer can be set and never be called: a layer's parent multiplies with the weight itself, a fused function goes
around the layer, a patched forward computes in float. The result would be called quantized and isn't.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import nn

from detent.errors import DetentError
from detent.nn import QuantWeightBase, quantizers_of


@dataclass
class QuantizerUsage:
    """What happened to the quantizers that are on; filled in when the block ends.

    Attributes:
        bypassed: those whose module ran, or had its weight read by another one, without calling them.
        unreached: those of modules that never ran: experts without tokens, parts that the input has no use for.
    """

    bypassed: list[str] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raises DetentError where a quantizer was bypassed."""
        if self.bypassed:
            raise DetentError(
                f"{len(self.bypassed)} quantizers are on but the model computes without them (for instance"
                f" {', '.join(self.bypassed[:3])}): something uses the weight or the input of their layer without"
                " calling its forward, so it would stay in float; switch them off in the configuration, or see"
                " detent.register()"
            )


@contextmanager
def quantizer_usage(model: nn.Module, prefix: str = "") -> Iterator[QuantizerUsage]:
    """Watch which quantizers that are on are called by the forward passes inside the block.

    Args:
        model: quantized, and rounding: a pass in which it observes shows nothing about weights.
        prefix: of the names in it.

    Example:
        >>> import torch, detent
        >>> from detent.model.usage import quantizer_usage
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        >>> model = detent.quantize(model, detent.INT8_WEIGHT_ONLY_CFG)
        >>> with quantizer_usage(model) as usage:
        ...     _ = model[0](torch.zeros(1, 4))
        >>> usage.bypassed, usage.unreached
        ([], ['1.weight_quantizer'])
    """
    usage = QuantizerUsage()
    called: set[int] = set()
    on = {
        owner: found
        for owner in model.modules()
        if (found := [(name, quantizer) for name, quantizer in quantizers_of(owner) if quantizer.is_enabled])
    }
    with ExitStack() as stack:
        for owner, quantizers in on.items():
            _forget(owner)
            for module in (owner, *(quantizer for _, quantizer in quantizers)):
                hook = module.register_forward_pre_hook(lambda module, _: called.add(id(module)))
                stack.callback(hook.remove)
        yield usage
        names = {module: name for name, module in model.named_modules()}
        for owner, quantizers in on.items():
            packed = isinstance(owner, QuantWeightBase) and owner.is_packed
            for name, quantizer in quantizers:
                if id(quantizer) in called or (packed and name == "weight_quantizer"):
                    continue
                read = name == "weight_quantizer" and isinstance(owner, QuantWeightBase) and owner.weight_handed_out
                where = usage.bypassed if id(owner) in called or read else usage.unreached
                where.append(prefix + f"{names[owner]}.{name}".removeprefix("."))
            _forget(owner)


def _forget(owner: nn.Module) -> None:
    """A weight that is kept would be used again without calling its quantizer."""
    if isinstance(owner, QuantWeightBase):
        owner.refresh_weight()
        owner.weight_handed_out = False
