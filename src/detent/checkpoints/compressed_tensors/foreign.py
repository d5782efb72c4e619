"""Compressed-tensors from other tools: the formats, from config.json and the tensors that are there."""

from __future__ import annotations

import re
from typing import Any

import torch

from detent.checkpoints.compressed_tensors import schemes as ct
from detent.checkpoints.records import LayerFormats, ModelFormats
from detent.checkpoints.source import Source
from detent.errors import DetentError
from detent.formats import Format

_MARKS = ("weight_packed", "weight_scale", "input_scale", "output_scale")


def split(name: str) -> tuple[str, str]:
    """(module, parameter) of a tensor name."""
    module, _, part = name.rpartition(".")
    return module, part


def infer_formats(source: Source) -> ModelFormats:
    """The formats of a checkpoint whose writer left no description of them.

    Raises:
        DetentError: a format that Detent doesn't read, or a layer that no group of config.json targets.
    """
    config = source.config["quantization_config"]
    modules = dict.fromkeys(split(name)[0] for name in source if split(name)[1] in _MARKS)
    layers = {module: _infer_layer(source, config, module) for module in modules}
    kv_cache = None
    if config.get("kv_cache_scheme") is not None:
        dtypes = [info.dtype for name, info in source.tensors.items() if split(name)[1] == "k_scale"]
        where = f"{source.path}: kv_cache_scheme"
        kv_cache = ct.format_from_args(config["kv_cache_scheme"], dtypes[0] if dtypes else None, where)
    return ModelFormats(layers, kv_cache, tuple(config.get("ignore") or ()))


def refuse_what_is_not_read(source: Source, *, reordered: bool = False, transformed: bool = False) -> None:
    """Raise DetentError for parts of compressed-tensors that change what codes mean and that Detent doesn't read."""
    config = source.config["quantization_config"]
    if not transformed and (config.get("transform_config") or {}).get("config_groups"):
        raise DetentError(f"{source.path}: its weights are transformed (transform_config); Detent cannot read that")
    if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise DetentError(f"{source.path}: its weights are stored sparse (sparsity_config); Detent cannot read that")
    status = config.get("quantization_status")
    if status not in (None, "compressed"):
        raise DetentError(f"{source.path}: quantization_status is {status!r}; only compressed weights hold codes")
    for name in source:
        if name.endswith(".weight_g_idx") and not reordered:
            raise DetentError(f"{source.path}: {name}: weights reordered by activation are not read by Detent")


def _infer_layer(source: Source, config: dict[str, Any], module: str) -> LayerFormats:
    group = _group_of(source, config, module)

    def infer(side: str, key: str) -> Format | None:
        scale = source.tensors.get(f"{module}.{side}_scale")
        dtype: torch.dtype | None = scale.dtype if scale else None
        args = group.get(key)
        return ct.format_from_args(args, dtype, f"{source.path}: {module}") if args else None

    weight = infer("weight", "weights")
    return LayerFormats(
        shape=_infer_shape(source, module, weight),
        weight=weight,
        input=infer("input", "input_activations"),
        output=infer("output", "output_activations"),
    )


def _infer_shape(source: Source, module: str, fmt: Format | None) -> tuple[int, ...]:
    name = next(
        n for n in ("weight_shape", "weight_packed", "weight") if f"{module}.{n}" in source.tensors or n == "weight"
    )
    info = source.info(f"{module}.{name}")
    shape = info.shape
    if name == "weight_shape":
        if info.dtype not in (torch.int64, torch.int32) or shape != (2,):
            raise DetentError(
                f"{source.path / info.file}: {module}.weight_shape is {info.dtype} {shape}, not two integers"
            )
        shape = tuple(source.tensor(f"{module}.weight_shape").tolist())
    elif name == "weight_packed" and fmt is not None and len(shape) == 2:
        shape = (shape[0], shape[1] * 8 // fmt.element.bits)
    if len(shape) != 2 or min(shape) < 1:
        raise DetentError(f"{source.path}: {module}: a weight of shape {shape}; compressed-tensors holds matrices only")
    group = None if fmt is None else fmt.granularity.group_size
    if group is not None and shape[1] % group:
        raise DetentError(
            f"{source.path}: {module}: {shape[1]} input features in groups of {group}; compressed-tensors has no short"
            " last group, so the file is damaged"
        )
    return shape


def _group_of(source: Source, config: dict[str, Any], module: str) -> dict[str, Any]:
    """The config group of a module: by exact name, else by pattern, else by class name."""

    def rank(target: str) -> int | None:
        if target == module:
            return 0
        if target.startswith("re:"):
            return 1 if re.match(target[3:], module) else None
        return 2 if "." not in target else None

    found = [
        (order, number, group)
        for number, group in enumerate(config.get("config_groups", {}).values())
        for target in group.get("targets", [])
        if (order := rank(target)) is not None
    ]
    if not found:
        raise DetentError(f"{source.path}: {module} has scales, but no group of config.json targets it")
    group: dict[str, Any] = min(found, key=lambda item: item[:2])[2]
    return group
