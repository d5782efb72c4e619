"""Formats inside models: the quantizer, the registry, and the quantized modules."""

from detent.nn import attention as _attention  # noqa: F401  these three register the built-in quantized modules
from detent.nn import modules as _modules  # noqa: F401
from detent.nn import own_linear as _own_linear  # noqa: F401
from detent.nn.backends import register_quant_backend, unregister_quant_backend
from detent.nn.modules import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
    QuantEmbedding,
    QuantLinear,
)
from detent.nn.quant_module import QuantInputBase, QuantLinearConvBase, QuantModule, QuantWeightBase, quantizers_of
from detent.nn.registry import QuantModuleRegistry, register, unregister
from detent.nn.sequential import SequentialQuantizer
from detent.nn.tensor_quantizer import TensorQuantizer

__all__ = [
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "QuantEmbedding",
    "QuantInputBase",
    "QuantLinear",
    "QuantLinearConvBase",
    "QuantModule",
    "QuantModuleRegistry",
    "QuantWeightBase",
    "SequentialQuantizer",
    "TensorQuantizer",
    "quantizers_of",
    "register",
    "register_quant_backend",
    "unregister",
    "unregister_quant_backend",
]
