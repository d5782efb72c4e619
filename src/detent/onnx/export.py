"""From a quantized model in memory to an ONNX file, proved before it takes its place."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detent.errors import DetentError
from detent.external.mistakes import as_detent_error, first_line
from detent.formats import E2M1
from detent.nn import TensorQuantizer
from detent.nn.onnx_constants import BLOCKS_OPSET, FP4_OPSET, STORED_AS, Target, made_for
from detent.nn.quant_module import check_module
from detent.onnx.check import check_onnx, library, run_in_onnxruntime

#: Tensors of more bytes together lie in a file of their own next to the model; ONNX ends at 2 GiB.
EXTERNAL_BYTES = 1 << 27
DIALECTS = ("standard", "tensorrt")
#: Relative error of results in onnxruntime. It sums in another order, so a rounded activation may take the next code.
TOLERANCE = 1e-2
#: Bytes of constants that no parameter accounts for: masks, tables, shapes.
SLACK = 1 << 20


@dataclass(frozen=True)
class OnnxReport:
    """What is known of a written file.

    Attributes:
        path: the file; above 128 MiB of tensors these are in ``<name>.data`` next to it.
        opset: version of the standard operators.
        dialect: ``standard`` or ``tensorrt``.
        types: bytes of the constant tensors by type.
        weights: bytes of the codes and scales of each quantized weight, by the name of its quantizer.
        not_run: why onnxruntime couldn't run it, with the operators that it hasn't got; None where it ran.
        difference: largest difference of its results there from those of the model; None where it didn't run.
        relative: the same as a relative error, norm by norm.
    """

    path: Path
    opset: int
    dialect: str
    types: dict[str, int] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    not_run: str | None = None
    difference: float | None = None
    relative: float | None = None

    def __str__(self) -> str:
        ran = (
            f"results in onnxruntime differ by {self.relative:.1g}, relative to their length"
            if self.relative is not None
            else f"onnxruntime on the CPU did not run it: {self.not_run}"
            if self.not_run
            else "not verified"
        )
        return f"ONNX: {self.path} (opset {self.opset}, {self.dialect} operators); {ran}"


def export_onnx(
    model: nn.Module,
    args: Tensor | Sequence[Any],
    path: str | Path,
    *,
    dialect: str = "standard",
    opset: int | None = None,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    verify: bool = True,
) -> OnnxReport:
    """Write a quantized model as ONNX, each weight as codes of its own number of bits.

    `torch.onnx.export` can be called directly as well. It writes opset 20, which has neither 4-bit types nor scales for
    blocks: there, 4-bit weights take 8 bits, and what is rounded in blocks is written as arithmetic.

    Args:
        model: quantized by Detent, in evaluation mode.
        args: what it is called with to trace it.
        path: the file to write; an existing one is replaced.
        dialect: ``standard``: QuantizeLinear and DequantizeLinear; ``tensorrt``: TensorRT's own operators (domain
            ``trt``) for FP8, INT4, NVFP4 and MXFP8, which nothing else runs.
        opset: version of the standard operators, 18 to 25; by default 21, which has 4-bit integers and blocks, or 23
            where there is FP4. onnxruntime on a CPU hasn't got FP4: with 21 such codes are stored in 8 bits and run.
        dynamic_shapes, input_names, output_names: as for `torch.onnx.export`.
        verify: read the file back, check it, and compare its results in onnxruntime with those of the model.

    Raises:
        DetentError: a package is missing; the model can't be exported; the file is wrong, and is then not put in place.

    Example:
        >>> import torch, detent
        >>> from tempfile import TemporaryDirectory
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8)).eval()
        >>> model = detent.quantize(model, detent.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
        >>> with TemporaryDirectory() as folder:
        ...     report = detent.export_onnx(model, torch.randn(2, 64), f"{folder}/model.onnx")
        >>> report.opset, report.weights  # 64 x 8 codes of 4 bits, and a float32 scale for each of 8 rows
        (21, {'0.weight_quantizer': 288})
        >>> report.difference < 1e-5
        True
    """
    ir, path = library("onnx_ir"), Path(path)
    library("onnxscript")
    inputs = (args,) if isinstance(args, Tensor) else tuple(args)
    if dialect not in DIALECTS:
        raise DetentError(f"unknown dialect {dialect!r}; known: {', '.join(DIALECTS)}")
    if check_module(model).training:
        raise DetentError("the model is in training mode, in which it computes something else; call model.eval() first")
    if not path.parent.is_dir():
        raise DetentError(f"{path.parent}: there is no such folder")
    target = Target(opset or _least_opset(model), dialect == "tensorrt")
    with (
        made_for(target),
        torch.no_grad(),
        _quiet(),
        as_detent_error(lambda error: _told(path, error), more=(Exception,)),
    ):
        program = torch.onnx.export(
            model,
            inputs,
            dynamo=True,
            opset_version=target.opset,
            dynamic_shapes=dynamic_shapes,
            input_names=input_names,
            output_names=output_names,
            verbose=False,
        )
    assert program is not None
    graph: Any = program.model
    _finish(graph, target.opset, ir)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        made = Path(folder) / path.name
        total = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
        data = f"{path.name}.data"
        ir.save(graph, str(made), external_data=data if total > EXTERNAL_BYTES else None)
        report = OnnxReport(path, target.opset, dialect, weights=dict(target.weights))
        if verify:
            report = _verified(report, made, model, inputs)
        for file in sorted(Path(folder).iterdir(), reverse=True):  # the data first
            file.replace(path.parent / file.name)
        if total <= EXTERNAL_BYTES:
            (path.parent / data).unlink(missing_ok=True)  # of a file that this one replaces
    return report


def _least_opset(model: nn.Module) -> int:
    """The first opset that has a type for every code."""
    quantizers = [m for m in model.modules() if isinstance(m, TensorQuantizer)]
    packed = [fmt for m in model.modules() if (fmt := m.__dict__.get("_packed_format")) is not None]
    formats = [q.format for q in quantizers if q.is_enabled] + packed
    return FP4_OPSET if any(fmt.element == E2M1 for fmt in formats) else BLOCKS_OPSET


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PyTorch's remarks on its own exporter."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _told(path: Path, error: BaseException) -> str:
    """What is behind an error of the exporter, which wraps it several times."""
    cause: BaseException = error
    while (inner := cause.__cause__ or cause.__context__) is not None and not isinstance(cause, DetentError):
        cause = inner
    if isinstance(cause, DetentError):
        return f"{path}: {cause}"
    return f"{path}: the model can't be exported: {type(cause).__name__}: {first_line(cause)}"


def _finish(model: Any, opset: int, ir: Any) -> None:
    """Give constants the types that PyTorch has no tensors for, and leave out what only debugging needs."""
    done: set[int] = set()
    for node in model.graph.all_nodes():
        kind = node.metadata_props.get(STORED_AS)
        for value in node.inputs if kind is not None else ():
            if value is None or value.const_value is None or id(value) in done:
                continue
            if value.const_value.dtype in (ir.DataType.INT8, ir.DataType.UINT8):
                done.add(id(value))
                stored = ir.DataType[kind]
                codes = value.const_value.numpy()
                codes = codes.view(stored.numpy()) if "FLOAT" in kind else codes.astype(stored.numpy())
                value.const_value = ir.tensor(codes, dtype=stored, name=value.name)
                value.dtype = stored
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.ir_version = max(model.ir_version, 11 if opset >= FP4_OPSET else 10)


@torch.no_grad()
def _verified(report: OnnxReport, made: Path, model: nn.Module, inputs: tuple[Any, ...]) -> OnnxReport:
    types = check_onnx(made)
    _check_size(sum(types.values()), report, model)
    flat = [x for x in torch.utils._pytree.tree_leaves(inputs) if isinstance(x, Tensor)]
    found = run_in_onnxruntime(made, flat)
    known: dict[str, Any] = {**vars(report), "types": types}
    if isinstance(found, str):
        return OnnxReport(**{**known, "not_run": found})
    expected = [y for y in torch.utils._pytree.tree_leaves(model(*inputs)) if isinstance(y, Tensor)]
    if [y.shape for y in expected] != [y.shape for y in found]:
        raise DetentError(f"{report.path}: its results in onnxruntime have other shapes than those of the model")
    wrong = [ours.double() - theirs.double() for ours, theirs in zip(expected, found, strict=True)]
    difference = max((float(error.abs().max()) for error in wrong if error.numel()), default=0.0)
    sizes = [float(y.double().norm().clamp_min(1e-30)) for y in expected]
    relative = max((float(error.norm()) / size for error, size in zip(wrong, sizes, strict=True)), default=0.0)
    if not relative <= TOLERANCE:  # NaN too
        raise DetentError(
            f"{report.path}: onnxruntime does not compute what the model does: the results differ by {relative:.2%}"
        )
    return OnnxReport(**{**known, "difference": difference, "relative": relative})


def _check_size(found: int, report: OnnxReport, model: nn.Module) -> None:
    """Refuse a file in which a quantized weight is in floating point as well."""
    quantized = {name.removesuffix("_quantizer") for name in report.weights}
    kept = {
        id(p): p.nbytes
        for name, p in (*model.named_parameters(), *model.named_buffers())
        if name not in quantized and "_packed_" not in name
    }
    most = sum(report.weights.values()) + sum(kept.values()) + SLACK
    if found > most:
        raise DetentError(
            f"{report.path}: its tensors take {found} bytes, more than the {most} that codes, scales and the parameters"
            " that stay ask for"
        )
