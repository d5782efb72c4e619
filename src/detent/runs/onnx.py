"""From a quantized checkpoint, or the simulated model of one, to a folder with an ONNX file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detent.checkpoints import LayerCheckpoint
from detent.checkpoints.folder import set_permissions
from detent.errors import DetentError
from detent.external.files import user_path
from detent.external.output import (
    MANIFEST_NAME,
    MARKER_NAME,
    Workspace,
    add_to_manifest,
    check_replaceable,
    check_target,
    write_manifest,
)
from detent.onnx import LanguageModelGraph, OnnxReport, export_onnx
from detent.report.run_report import REPORT_NAME as RUN_REPORT_NAME
from detent.runs.load import load_quantized, pack_weights
from detent.runs.options import ModelOptions

FILE_NAME, REPORT_NAME, FOLDER = "model.onnx", "onnx_report.json", "onnx"
#: Files of a checkpoint that hold weights, or describe how they are stored.
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".index.json")
_OWN = (MANIFEST_NAME, RUN_REPORT_NAME, MARKER_NAME)


def export_onnx_checkpoint(
    source: str | Path | nn.Module,
    out_dir: str | Path,
    *,
    records: Iterable[LayerCheckpoint] | None = None,
    files: str | Path | None = None,
    with_cache: bool = True,
    opset: int | None = None,
    dialect: str = "standard",
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    verify: bool = True,
    **loading: Any,
) -> OnnxReport:
    """Write a folder with ``model.onnx``, the configuration and the tokenizer of a quantized language model.

    Args:
        source: a quantized checkpoint; or the simulated model of one, as `load_quantized` gives it.
        out_dir: the folder to appear.
        records: with a model: the layers whose weights it holds decoded, by the names of its modules.
        files: with a model: the folder whose configuration and tokenizer go along.
        with_cache: whether keys and values of earlier tokens are inputs, and those of all outputs; see
            `detent.onnx.LanguageModelGraph`.
        opset, dialect, verify: as for `detent.export_onnx`.
        dtype: of what stays in floating point; onnxruntime on a CPU computes little in others than float32.
        overwrite: replace a folder that Detent wrote.
        loading: as for `load_quantized`.

    Raises:
        DetentError: the checkpoint can't be read, the model not be exported, or the folder not be written; nothing is
            left of it then.
    """
    target = Path(out_dir)
    folder = files if isinstance(source, nn.Module) else source
    if folder is None:
        raise DetentError("files: the folder of configuration and tokenizer is needed where a model is given")
    inside = target.parent == Path(folder)  # a part of the checkpoint
    check_target(target, source=None if inside else Path(folder), overwrite=overwrite)
    if isinstance(source, nn.Module):
        model = source
        pack_weights(model, records or (), dtype)
    else:
        model = load_quantized(Path(source), dtype=dtype, hold_codes=True, **loading)
    graph = LanguageModelGraph(model.eval(), with_cache=with_cache).eval()
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Workspace(target, "writing")
    try:
        report = export_onnx(
            graph,
            graph.sample(),
            work.path / FILE_NAME,
            dialect=dialect,
            opset=opset,
            dynamic_shapes=graph.dynamic_shapes(),
            input_names=graph.input_names(),
            output_names=graph.output_names(),
            verify=verify,
        )
        _copy_small_files(Path(folder), work.path)
        described = {**vars(report), "path": FILE_NAME}
        (work.path / REPORT_NAME).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        write_manifest(work.path)
        set_permissions(work.path)
        check_replaceable(target, overwrite=overwrite)
        if target.exists():
            shutil.rmtree(target)
        work.close()
        (work.path / MARKER_NAME).unlink()
        work.path.rename(target)
    finally:
        work.remove()
    return replace(report, path=target / FILE_NAME)


def add_onnx(folder: str | Path, *, with_cache: bool, model: ModelOptions) -> OnnxReport:
    """Put a folder ``onnx`` with what `export_onnx_checkpoint` writes into a quantized checkpoint.

    Args:
        folder: that Detent wrote.
        with_cache: see `export_onnx_checkpoint`.
        model: how the checkpoint is loaded.

    Raises:
        DetentError: as `export_onnx_checkpoint`; the checkpoint itself stays as it is.
    """
    out = user_path(folder)
    report = export_onnx_checkpoint(
        out, out / FOLDER, with_cache=with_cache, trust_remote_code=model.trust_remote_code, attention="eager"
    )
    add_to_manifest(out, *(f"{FOLDER}/{path.name}" for path in sorted((out / FOLDER).iterdir())))
    return report


def _copy_small_files(source: Path, out: Path) -> None:
    """The configuration, without how weights are stored in the checkpoint, and all that belongs to the tokenizer."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHTS) and path.name not in _OWN:
            shutil.copyfile(path, out / path.name)
    config = json.loads((out / "config.json").read_text("utf-8"))
    config.pop("quantization_config", None)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
