"""What is looked at in an ONNX file: whether it is whole, valid and finite, and what onnxruntime makes of it."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detent.errors import DetentError
from detent.external.mistakes import as_detent_error, first_line


def library(name: str) -> Any:
    """One of the packages of the extra ``onnx``.

    Raises:
        DetentError: it isn't installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DetentError(f"{name} is needed for ONNX files: pip install 'detent[onnx]' ({error})") from None


def check_onnx(path: str | Path) -> dict[str, int]:
    """Open an ONNX file and look at all of it.

    Args:
        path: the file; tensors outside of it lie next to it.

    Returns:
        The bytes of its constant tensors by type, such as ``{"INT4": 4096, "FLOAT": 512}``.

    Raises:
        DetentError: it is damaged or isn't valid ONNX, a file of tensors is missing or too short or leads out of the
            folder, or a number in it is NaN or infinite.
    """
    onnx, ir, path = library("onnx"), library("onnx_ir"), Path(path)
    if not path.is_file():
        raise DetentError(f"{path}: there is no such file")
    decode_error = library("google.protobuf.message").DecodeError
    with as_detent_error(lambda error: f"{path}: not an ONNX file: {first_line(error)}", more=(decode_error,)):
        model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        _check_external(path, tensor, onnx)
    invalid = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError)
    with as_detent_error(lambda error: f"{path}: not valid ONNX: {first_line(error)}", more=invalid):
        onnx.checker.check_model(str(path), full_check=True)
    sizes: Counter[str] = Counter()
    for name, value in ir.load(str(path)).graph.initializers.items():
        tensor = value.const_value
        sizes[tensor.dtype.name] += tensor.nbytes
        numbers = tensor.numpy()
        if tensor.dtype.is_floating_point() and not bool((abs(numbers.astype("float32")) < float("inf")).all()):
            raise DetentError(f"{path}: {name} holds NaN or infinity")
    return dict(sizes)


def _check_external(path: Path, tensor: Any, onnx: Any) -> None:
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return
    told = {entry.key: entry.value for entry in tensor.external_data}
    place = path.parent / told.get("location", "")
    if path.parent.resolve() not in place.resolve().parents:
        raise DetentError(f"{path}: {tensor.name} is said to be in {place}, outside of the folder")
    if not place.is_file():
        raise DetentError(f"{path}: {tensor.name} is in {place}, which is missing; it belongs next to the file")
    with as_detent_error(lambda error: f"{path}: {tensor.name}: its place in {place.name} is {told}"):
        end = int(told.get("offset", 0)) + int(told["length"])
    if end > place.stat().st_size:
        raise DetentError(
            f"{place}: {tensor.name} ends at byte {end}, and the file at {place.stat().st_size}; copy it again"
        )


def unusual_operators(path: Path) -> list[str]:
    """The operators that aren't of the standard, or take FP4, as ``trt::TRT_FP8QuantizeLinear`` or
    ``DequantizeLinear(FLOAT4E2M1)``: those that onnxruntime on a CPU hasn't got."""
    found: dict[str, None] = {}
    for node in library("onnx_ir").load(str(path)).graph:
        kinds = {value.dtype.name for value in (*node.inputs, *node.outputs) if value is not None and value.dtype}
        if node.domain:
            found[f"{node.domain}::{node.op_type}"] = None
        elif "FLOAT4E2M1" in kinds:
            found[f"{node.op_type}(FLOAT4E2M1)"] = None
    return list(found)


def run_in_onnxruntime(path: Path, inputs: Sequence[Tensor]) -> list[Tensor] | str:
    """What onnxruntime computes on a CPU with its basic optimizations, or why it can't. Further ones put integer
    kernels in, which saturate on processors without VNNI or round what isn't rounded."""
    runtime = library("onnxruntime")
    lacking = library("onnxruntime.capi.onnxruntime_pybind11_state")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what it logs comes as an error too
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    cannot = (lacking.NotImplemented, lacking.InvalidGraph, lacking.Fail)
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except cannot as error:
        operators = unusual_operators(path)
        if not operators and not isinstance(error, lacking.NotImplemented):
            raise DetentError(f"{path}: onnxruntime can't load it: {first_line(error)}") from error
        which = ", ".join(operators) or first_line(error)
        return f"onnxruntime {runtime.__version__} on a CPU hasn't got {which}"
    names = [value.name for value in session.get_inputs()]
    arrays = [x.detach().cpu().numpy() for x in inputs]
    return [torch.from_numpy(y) for y in session.run(None, dict(zip(names, arrays, strict=True)))]
