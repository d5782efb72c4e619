"""What can be done with the weights of a quantized model: fold them, pack them, list them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

from detent.config import RotateConfig
from detent.config.base import shown
from detent.errors import DetentError
from detent.model import edit
from detent.model.conversion import named_quantizers
from detent.nn import QuantWeightBase, TensorQuantizer, quantizers_of
from detent.nn.quant_module import check_module
from detent.nn.sequential import Quantizer, members_of
from detent.progress import track

#: Where `print_quant_summary` writes inside the folder it is given.
SUMMARY_FILE = ".quant_summary.txt"


def quant_summary(model: nn.Module) -> str:
    """One line for each quantizer, with its state, and their number."""
    members = [(n, m) for n, m in check_module(model).named_modules() if isinstance(m, TensorQuantizer)]
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


    Example:
        >>> import torch, detent
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = detent.quantize(model, detent.INT8_WEIGHT_ONLY_CFG)
        >>> detent.print_quant_summary(model)
        0.input_quantizer                   TensorQuantizer(disabled)
        0.weight_quantizer                  TensorQuantizer(int8 per_channel(0), ... fake quant)
        0.output_quantizer                  TensorQuantizer(disabled)
        3 TensorQuantizers found in model
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
    A weight that is tied to another module gets its own memory: its twin stays as it is.

    Args:
        model: a quantized model.
        keep_attrs: keep the calibrated ranges; otherwise they are dropped.

    Raises:
        DetentError: the model has no quantizers; a weight is computed from other parameters. Nothing is folded then.


    Example:
        >>> import torch, detent
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = detent.quantize(model, detent.INT8_WEIGHT_ONLY_CFG)
        >>> before = model(torch.eye(4))
        >>> detent.fold_weight(model)
        >>> torch.equal(model(torch.eye(4)), before), model[0].weight_quantizer.is_enabled
        (True, False)
    """
    if not any(True for _ in named_quantizers(model)):
        raise DetentError("the model has no quantizers; call quantize() first")
    foldable = list(_foldable(model))
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    values = [
        module.quantize_weight(p) if isinstance(module, QuantWeightBase) and name == "weight" else quantizer(p)
        for module, name, quantizer, p in foldable
    ]
    for (module, name, quantizer, parameter), value in zip(foldable, values, strict=True):
        edit.put(module, name, value, untie=uses[id(parameter)] > 1)
        _retire(quantizer, keep_attrs)


def _foldable(model: nn.Module) -> Iterator[tuple[nn.Module, str, Quantizer, nn.Parameter]]:
    """(module, name of the parameter, its quantizer, the parameter)."""
    for module_name, module in model.named_modules():
        for child_name, quantizer in quantizers_of(module):
            name = child_name.removesuffix("_quantizer")
            if not quantizer.is_enabled or name == child_name:
                continue
            parameter = module._parameters.get(name)
            if parameter is not None:
                yield module, name, quantizer, parameter
            elif isinstance(module, QuantWeightBase) and name == "weight" and not module.is_packed:
                raise DetentError(f"{module_name}: {_COMPUTED}")


#: Why a weight that weight norm, pruning or a parametrization computes cannot be replaced.
_COMPUTED = "the weight is computed from other parameters; remove the parametrization (weight norm, pruning) first"


def _retire(quantizer: Quantizer, keep_attrs: bool) -> None:
    """Switch a quantizer off whose work is done: its pre-quantization scale and rotation are in the weight now."""
    quantizer.disable()
    for member in members_of(quantizer):
        member.pre_quant_scale = None
        member.attributes = member.attributes.model_copy(update={"rotate": False})
        if not keep_attrs:
            member.reset_amax()


@torch.no_grad()
def compress(model: nn.Module, config: Mapping[str, Any] | None = None) -> nn.Module:
    """Hold the quantized weights as packed codes and scales; they are dequantized when used.

    Codes take the bits that their format has: four for int4. Where several formats follow each other (W4A8), the codes
    of the last one are held.

    Args:
        model: a quantized and calibrated model.
        config: which modules, as {wildcard of the module's name: bool}, the last match winning; None for all.

    Returns:
        `model`, whose quantized weights take the memory of their codes. The forward pass computes what it did before,
        bit for bit. Such a model cannot be trained.

    Raises:
        DetentError: a pattern matches nothing; nothing can be packed; a weight that is chosen cannot be. Nothing is
            packed then.


    Example:
        >>> import torch, detent
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = detent.quantize(model, detent.INT8_WEIGHT_ONLY_CFG)
        >>> before = model(torch.eye(4))
        >>> model = detent.compress(model)
        >>> torch.equal(model(torch.eye(4)), before), model[0].is_packed
        (True, True)
    """
    given: Any = {"*": True} if config is None else config
    rules = given["compress"] if isinstance(given, Mapping) and isinstance(given.get("compress"), Mapping) else given
    if not isinstance(rules, Mapping) or not all(isinstance(v, bool) for v in rules.values()):
        raise DetentError(f"compress: a dictionary {{wildcard of module names: True or False}}, not {shown(config)}")
    modules = [(n, m) for n, m in check_module(model).named_modules() if isinstance(m, QuantWeightBase)]
    for pattern in rules:
        if not isinstance(pattern, str) or not any(fnmatchcase(name, pattern) for name, _ in modules):
            raise DetentError(f"compress: {shown(pattern)} matches no module with a quantized weight")
    chosen = []
    for name, module in modules:
        last = [wanted for pattern, wanted in rules.items() if fnmatchcase(name, pattern)][-1:]
        if last == [True] and not module.is_packed and module.weight_quantizer.is_enabled:
            check_packable(name, module)
            chosen.append((name, module))
    if not chosen:
        raise DetentError("compress: no weight is quantized in a way that can be packed; call quantize() first")
    for _, module in track(chosen, "Packing weights", len(chosen)):
        pack_module(module)
    return model


def check_packable(name: str, module: QuantWeightBase) -> None:
    """Refuse a weight that isn't the value of codes: raises DetentError with the reason."""
    last = members_of(module.weight_quantizer)[-1]
    attributes = last.attributes
    if module.weight_parameter is None:
        raise DetentError(f"{name}: {_COMPUTED}")
    rotated_back = isinstance(attributes.rotate, RotateConfig) and attributes.rotate.mode == "rotate_back"
    if rotated_back or attributes.bias or attributes.backend is not None:
        raise DetentError(
            f"{name}: a weight that is rotated back, has a bias or goes through a backend after quantization isn't the"
            " value of its codes and cannot be packed; leave it out: compress(model, {'*': True, '"
            + name
            + "': False})"
        )


def pack_module(module: QuantWeightBase) -> None:
    """Pack the weight of one module that `check_packable` lets through."""
    parameter = module.weight_parameter
    assert parameter is not None
    weight = module.to_output_first(parameter.detach(), module)
    *earlier, last = [q for q in members_of(module.weight_quantizer) if q.transforms]
    for quantizer in earlier:
        weight = quantizer(weight)
    module.pack_weight(last.quantize_to_codes(last.transform(weight)), parameter.dtype)
