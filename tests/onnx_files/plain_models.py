"""Small models for tests of ONNX, and readers that aren't Detent's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

import detent


def mlp(config: Any, x: Tensor) -> nn.Module:
    """A ReLU after each layer: onnxruntime fuses it with what rounds next."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 256), nn.ReLU(), nn.Linear(256, 16)).eval()
    return detent.quantize(model, config, lambda m: m(x))


class Cnn(nn.Module):
    """Convolutions, one grouped and one transposed, batch norm, a pool and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = x + torch.relu(self.grouped(x))
        return self.head(self.pool(self.up(x)).flatten(1))


def run(path: Path | str, *inputs: Tensor, fused: bool = False) -> np.ndarray:
    """What onnxruntime computes; `fused`: with all its optimizations, as by default. Where there are integers these put
    kernels in that saturate on processors without VNNI, or round the inputs of weights that alone are rounded."""
    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if fused else levels.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})[0]


def types(path: Path | str) -> dict[str, int]:
    """Elements of the constant tensors by type, as the onnx package reads them."""
    found: dict[str, int] = {}
    for tensor in onnx.load(str(path)).graph.initializer:
        name = onnx.TensorProto.DataType.Name(tensor.data_type)
        found[name] = found.get(name, 0) + int(np.prod(tensor.dims))
    return found


def operators(path: Path | str) -> set[str]:
    return {node.op_type for node in onnx.load(str(path)).graph.node}
