"""PyTorch's own transformer layers, which can go around their linear layers.

In eval mode `nn.TransformerEncoderLayer` hands all its weights to one fused function and never calls ``linear1``; what
is quantized there would silently not be used. `nn.MultiheadAttention` does so with ``out_proj`` always.
"""

from __future__ import annotations

from torch import nn


def leave_fast_path(model: nn.Module) -> None:
    """Make encoder layers that have quantized parts call them, in eval mode as in training."""
    from detent.nn.quant_module import QuantModule

    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(isinstance(m, QuantModule) for m in module.modules()):
            module.activation_relu_or_gelu = 0  # the layer's own value where the fused function can't be used
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # only the fused function takes nested tensors


def weight_used_from_outside(model: nn.Module, name: str) -> bool:
    """Whether the parent of a module multiplies with the module's weight itself and never calls it."""
    parent = model.get_submodule(name.rpartition(".")[0]) if "." in name else model
    return name != "" and isinstance(parent, nn.MultiheadAttention)
