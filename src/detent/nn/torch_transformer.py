"""PyTorch's own transformer layers, which go around their linear layers.

In eval mode `nn.TransformerEncoderLayer` hands all its weights to one fused function and never calls ``linear1``; what
is quantized there would silently not be used. `nn.MultiheadAttention` does so with ``out_proj`` always.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detent.nn.quant_module import QuantModule, quantizers_of
from detent.nn.registry import QuantModuleRegistry
from detent.nn.tensor_quantizer import TensorQuantizer

_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@QuantModuleRegistry.register({nn.MultiheadAttention: "nn.MultiheadAttention"})
class QuantMultiheadAttention(QuantModule, nn.MultiheadAttention):
    """`nn.MultiheadAttention` with quantized inputs and weights; ``out_proj`` is a quantized linear layer inside."""

    def _setup(self) -> None:
        self.input_quantizer = TensorQuantizer()
        for name in _WEIGHTS:
            if getattr(self, name) is not None:
                setattr(self, f"{name}_quantizer", TensorQuantizer())

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        modules: tuple[nn.Module, ...] = (self, self.out_proj)
        if not any(quantizer.transforms for module in modules for _, quantizer in quantizers_of(module)):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        swap = self.batch_first and query.dim() == 3
        # A tensor that comes twice is quantized once and stays the same one: PyTorch then multiplies it once.
        inputs = {id(x): self.input_quantizer(x) for x in (query, key, value)}
        inputs = {which: x.transpose(0, 1) if swap else x for which, x in inputs.items()}
        q, k, v = (inputs[id(x)] for x in (query, key, value))
        weights = [None if (w := getattr(self, n)) is None else getattr(self, f"{n}_quantizer")(w) for n in _WEIGHTS]
        separate: dict[str, Any] = dict(zip(_WEIGHTS[1:], weights[1:], strict=True))
        # With the identity in the place of the output projection, which is called below as the layer that it is.
        identity = torch.eye(self.embed_dim, device=q.device, dtype=q.dtype)
        options = self.bias_k, self.bias_v, self.add_zero_attn, self.dropout, identity, None, self.training
        how = key_padding_mask, need_weights, attn_mask, weights[0] is None
        y, seen = F.multi_head_attention_forward(
            *(q, k, v, self.embed_dim, self.num_heads, weights[0], self.in_proj_bias, *options, *how),
            **separate,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return self.out_proj(y.transpose(0, 1) if swap else y), seen


def leave_fast_path(model: nn.Module) -> None:
    """Make encoder layers that have quantized parts call them, in eval mode as in training."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(isinstance(m, QuantModule) for m in module.modules()):
            module.activation_relu_or_gelu = 0  # the layer's own value where the fused function can't be used
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # only the fused function takes nested tensors


def weight_used_from_outside(model: nn.Module, name: str) -> bool:
    """Whether the parent of a module multiplies with the module's weight itself and never calls it."""
    parent = model.get_submodule(name.rpartition(".")[0]) if "." in name else model
    return name != "" and isinstance(parent, nn.MultiheadAttention) and not isinstance(parent, QuantMultiheadAttention)
