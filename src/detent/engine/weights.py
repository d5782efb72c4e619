"""What can be done with the weights of a quantized model: fold them, pack them, list them."""

from __future__ import annotations

import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

from detent.engine.conversion import named_quantizers
from detent.errors import DetentError
from detent.nn import QuantWeightBase, SequentialQuantizer, TensorQuantizer
from detent.progress import track

#: Where `print_quant_summary` writes inside the folder it is given.
SUMMARY_FILE = ".quant_summary.txt"


def quant_summary(model: nn.Module) -> str:
    """One line for each quantizer, with its state, and their number."""
    members = [(n, m) for n, m in model.named_modules() if isinstance(m, TensorQuantizer)]
    lines = [f"{name:80} {quantizer}" for name, quantizer in members]
    return "\n".join([*lines, f"{len(members)} TensorQuantizers found in model"])


def print_quant_summary(
    model: nn.Module, output_dir: str | Path | None = None, *, stream: TextIO | None = None
) -> None:
    """Show every quantizer of the model and its configuration.

    Args:
        model: a model with quantizers.
        output_dir: where given, the text goes to ``.quant_summary.txt`` in this folder instead of `stream`.
        stream: where the text goes; standard output by default. The one place outside the command line that prints,
            since printing is what it is called for.
    """
    text = quant_summary(model) + "\n"
    if output_dir is None:
        (stream or sys.stdout).write(text)
        return
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMMARY_FILE).write_text(text, encoding="utf-8")


@torch.no_grad()
def fold_weight(model: nn.Module, keep_attrs: bool = False) -> None:
    """Replace each weight by its quantized value and switch its weight quantizer off, so that forward passes are fast.

    The values are those that the forward pass used before, computed in float32 and rounded once to the weight's dtype.

    Args:
        model: a quantized model.
        keep_attrs: keep the calibrated ranges; otherwise they are dropped.

    Raises:
        DetentError: the model has no quantizers.
    """
    if not any(True for _ in named_quantizers(model)):
        raise DetentError("the model has no quantizers; call quantize() first")
    for module in model.modules():
        for child_name, quantizer in list(module.named_children()):
            if not isinstance(quantizer, (TensorQuantizer, SequentialQuantizer)) or not quantizer.is_enabled:
                continue
            parameter = module._parameters.get(child_name.removesuffix("_quantizer"))
            if parameter is None:
                continue
            if isinstance(module, QuantWeightBase):
                parameter.copy_(module.quantize_weight(parameter))
                module.refresh_weight()
            else:
                parameter.copy_(quantizer(parameter))
            _retire(quantizer, keep_attrs)


def _retire(quantizer: TensorQuantizer | SequentialQuantizer, keep_attrs: bool) -> None:
    """Switch a quantizer off whose work is done: its pre-quantization scale and rotation are in the weight now."""
    quantizer.disable()
    for member in quantizer.modules():
        if not isinstance(member, TensorQuantizer):
            continue
        member.pre_quant_scale = None
        member.attributes = member.attributes.model_copy(update={"rotate": False})
        if not keep_attrs:
            member.reset_amax()


@torch.no_grad()
def compress(model: nn.Module, config: dict[str, bool] | None = None) -> nn.Module:
    """Hold the quantized weights as codes and scales; they are dequantized when used.

    Args:
        model: a quantized and calibrated model.
        config: which modules, as {wildcard of the module's name: bool}, the last match winning; None for all.

    Returns:
        `model`, whose quantized weights take the memory of their codes. The forward pass computes what it did before,
        bit for bit. Such a model cannot be trained.

    Raises:
        DetentError: a pattern matches nothing; nothing can be packed.
    """
    given: Any = {"*": True} if config is None else config
    rules: dict[str, bool] = dict(given.get("compress", given))
    modules = [(n, m) for n, m in model.named_modules() if isinstance(m, QuantWeightBase) and m.packed_weight is None]
    for pattern in rules:
        if not any(fnmatchcase(name, pattern) for name, _ in modules):
            raise DetentError(f"compress: {pattern!r} matches no module with a quantized weight")
    packed = 0
    for name, module in track(modules, "Packing weights", len(modules)):
        chosen = [keep for pattern, keep in rules.items() if fnmatchcase(name, pattern)]
        if chosen and chosen[-1] and module.weight_quantizer.is_enabled and pack_module(module, name):
            packed += 1
    if not packed:
        raise DetentError("compress: no weight is quantized in a way that can be packed; call quantize() first")
    return model


def pack_module(module: QuantWeightBase, name: str) -> bool:
    """Pack one module's weight; False where it isn't a single plain format (a sequence, rotation, scale or bias)."""
    quantizer: Any = module.weight_quantizer
    if isinstance(quantizer, SequentialQuantizer):
        enabled = [q for q in quantizer if isinstance(q, TensorQuantizer) and q.is_enabled]
        raise DetentError(f"{name}: {len(enabled)} formats in sequence cannot be packed; use a progressive format")
    attributes = quantizer.attributes
    if quantizer.pre_quant_scale is not None or attributes.rotate or attributes.bias or attributes.backend:
        raise DetentError(f"{name}: a weight with rotation, bias, scale or backend in its quantizer cannot be packed")
    weight = module.weight
    module.pack_weight(quantizer.quantize_to_codes(module.to_output_first(weight, module)), weight.dtype)
    return True
