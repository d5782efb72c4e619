"""What a checkpoint folder holds, tensor by tensor, from file headers and scales."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from detent.checkpoints import QuantizedCheckpoint, open_quantized, open_stored, quant_method
from detent.errors import DetentError


def contents(folder: str | Path) -> dict[str, Any]:
    """Every logical tensor: a quantized weight counts as one, with its codes, scales and zero points together.

    Returns:
        ``quant_method``, ``tensors`` (name, shape, format, bits per element, bytes, quantized) and ``totals``
        (quantized, kept, parameters, bytes, bits_per_parameter); JSON-able.

    Raises:
        DetentError: the folder isn't a readable checkpoint.
    """
    source = open_stored(folder)
    method = quant_method(source.config)
    tensors: list[dict[str, Any]] = []
    kept = list(source.tensors)
    if method is not None:
        checkpoint = open_quantized(folder)
        checkpoint.check()
        if not checkpoint.described:
            _check_shapes(checkpoint)
        kept = checkpoint.kept
        tensors += _quantized(checkpoint)
    for name in kept:
        info = source.info(name)
        tensors.append(_row(name, info.shape, str(info.dtype).removeprefix("torch."), info.nbytes, False))
    parameters = sum(math.prod(t["shape"]) for t in tensors)
    size = source.nbytes
    return {
        "quant_method": method,
        "tensors": tensors,
        "totals": {
            "quantized": sum(t["quantized"] for t in tensors),
            "kept": len(kept),
            "parameters": parameters,
            "bytes": size,
            "bits_per_parameter": size * 8 / max(1, parameters),
        },
    }


def _check_shapes(checkpoint: QuantizedCheckpoint) -> None:
    """Compare the shapes of another tool's file with those that its config.json calls for. Where the
    architecture is defined by code that comes with the checkpoint, nothing is compared."""
    from detent.pretrained.loading import load_config, model_on_meta

    try:
        model = model_on_meta(load_config(checkpoint.path))
    except DetentError:
        return
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, layer in checkpoint.formats.layers.items():
        wanted = shapes.get(f"{name}.weight", layer.shape)
        if layer.weight is not None and layer.shape != wanted:
            raise DetentError(
                f"{checkpoint.path}: {name} holds a weight of shape {layer.shape}, but config.json calls for {wanted}"
            )


def _quantized(checkpoint: QuantizedCheckpoint) -> list[dict[str, Any]]:
    """The quantized layers. What a layer stores besides its kept tensors belongs to its weight or activations."""
    kept, layers = set(checkpoint.kept), checkpoint.formats.layers
    sizes = dict.fromkeys(layers, 0)
    others = []
    for name in checkpoint.source.tensors:
        if name in kept:
            continue
        # <layer>.weight_scale in compressed-tensors, <layer>.weight.scale in Detent's own layout
        owner = next((part for part in (name.rpartition(".")[0], name.rsplit(".", 2)[0]) if part in layers), None)
        if owner is None:
            others.append(name)
        else:
            sizes[owner] += checkpoint.source.info(name).nbytes
    rows = []
    for layer, formats in layers.items():
        size = sizes[layer]
        words = [f"{side} {f}" for side, f in (("input", formats.input), ("output", formats.output)) if f is not None]
        if formats.weight is not None:
            rows.append(_row(f"{layer}.weight", formats.shape, "; ".join([str(formats.weight), *words]), size, True))
        else:
            rows.append(_row(f"{layer} (activations)", (), "; ".join(words), size, True))
    for name in others:
        info = checkpoint.source.info(name)
        rows.append(_row(name, info.shape, f"scale ({str(info.dtype).removeprefix('torch.')})", info.nbytes, False))
    return rows


def _row(name: str, shape: tuple[int, ...], fmt: str, size: int, quantized: bool) -> dict[str, Any]:
    bits = size * 8 / max(1, math.prod(shape))
    return {"name": name, "shape": list(shape), "format": fmt, "bits": bits, "bytes": size, "quantized": quantized}
