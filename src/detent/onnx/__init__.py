"""ONNX files of quantized models: written through PyTorch's exporter, read back and run."""

from detent.onnx.check import check_onnx
from detent.onnx.export import OnnxReport, export_onnx
from detent.onnx.language import LanguageModelGraph

__all__ = ["LanguageModelGraph", "OnnxReport", "check_onnx", "export_onnx"]
