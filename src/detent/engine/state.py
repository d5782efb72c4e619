"""Saving a quantized model to one file and restoring it: weights and quantizers as safetensors, the rest as JSON
inside.

The JSON (under the metadata key ``detent_state``) holds, for each quantizer, its attributes and whether it is on, and
for each packed weight its format; tensors that share memory are stored once with their other names listed. No pickle is
involved.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detent.config import QuantizerAttributeConfig
from detent.engine.conversion import is_quantized, named_quantizers, replace_quant_module
from detent.errors import DetentError
from detent.formats import Format
from detent.nn import QuantWeightBase, SequentialQuantizer, TensorQuantizer
from detent.nn.attention import route_attention

_KEY = "detent_state"
_VERSION = 1


def detent_state(model: nn.Module) -> dict[str, Any]:
    """What has to be known beside the `state_dict` to rebuild the quantized model: plain JSON.

    Raises:
        DetentError: the model isn't quantized.
    """
    if not is_quantized(model):
        raise DetentError("the model has no quantizers, so there is no state to save; call quantize() first")
    quantizers: dict[str, Any] = {}
    for name, quantizer in named_quantizers(model):
        members = list(quantizer) if isinstance(quantizer, SequentialQuantizer) else [quantizer]
        described = [_describe(m) for m in members if isinstance(m, TensorQuantizer)]
        quantizers[name] = described if isinstance(quantizer, SequentialQuantizer) else described[0]
    packed = {
        name: {
            "format": module._packed_format.to_dict(),
            "shape": list(module._packed_shape),
            "dtype": str(module._packed_dtype).removeprefix("torch."),
        }
        for name, module in model.named_modules()
        if isinstance(module, QuantWeightBase) and module.packed_weight is not None
    }
    return {"version": _VERSION, "quantizers": quantizers, "packed": packed}


def _describe(quantizer: TensorQuantizer) -> dict[str, Any]:
    return {
        "attributes": quantizer.attributes.to_dict(),
        "enabled": quantizer.is_enabled,
        "quant": quantizer._if_quant,
        "buffers": [n for n in TensorQuantizer._STATE if getattr(quantizer, n) is not None],
    }


def restore_from_detent_state(model: nn.Module, state: dict[str, Any]) -> nn.Module:
    """Give a plain model the quantizers and packed weights that `state` describes, their tensors still empty.

    Load the `state_dict` of the saved model afterwards.

    Raises:
        DetentError: the model is quantized already, or its modules aren't those that were saved.
    """
    if is_quantized(model):
        raise DetentError("the model is quantized already; restore into a freshly built one")
    if not isinstance(state, dict) or state.get("version") != _VERSION:
        raise DetentError(f"not a state that this version of Detent can read (version {_VERSION} is)")
    revert = replace_quant_module(model)
    try:
        _restore_quantizers(model, state["quantizers"])
        _restore_packed(model, state["packed"])
    except (KeyError, AttributeError, TypeError) as error:
        revert()
        raise DetentError(f"the saved state doesn't fit {type(model).__name__}: {error}") from error
    except DetentError:
        revert()
        raise
    route_attention(model)
    return model


def _restore_quantizers(model: nn.Module, described: dict[str, Any]) -> None:
    have = {name for name, _ in named_quantizers(model)}
    missing, extra = sorted(set(described) - have), sorted(have - set(described))
    if missing or extra:
        raise DetentError(
            f"the model's quantizers aren't those that were saved: missing {missing[:3]}, unexpected {extra[:3]};"
            " build the same model, and register the same custom modules, before restoring"
        )
    for name, description in described.items():
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        if isinstance(description, list):
            setattr(owner, leaf, SequentialQuantizer(*(_rebuild(d) for d in description)))
        else:
            setattr(owner, leaf, _rebuild(description))
        getattr(owner, leaf).name = name


def _rebuild(description: dict[str, Any]) -> TensorQuantizer:
    attributes = QuantizerAttributeConfig(**description["attributes"])
    quantizer = TensorQuantizer(attributes, if_quant=description["quant"])
    quantizer.enable() if description["enabled"] else quantizer.disable()
    return quantizer


def _restore_packed(model: nn.Module, packed: dict[str, Any]) -> None:
    for name, description in packed.items():
        module = model.get_submodule(name)
        if not isinstance(module, QuantWeightBase):
            raise DetentError(f"{name} held a packed weight, but is a {type(module).__name__} here")
        module._drop_float_weight()
        module._packed_format = Format.from_dict(description["format"])
        module._packed_shape = tuple(description["shape"])
        module._packed_dtype = getattr(torch, description["dtype"])


def save(model: nn.Module, path: str | Path) -> None:
    """Write the quantized model to one safetensors file, whole or not at all.

    Args:
        model: a quantized model, its weights float, folded or packed.
        path: the file; any suffix.

    Raises:
        DetentError: the model isn't quantized, or the file cannot be written.
    """
    from safetensors.torch import save_file

    state = detent_state(model)
    tensors, aliases = _without_aliases(model.state_dict())
    state["aliases"] = aliases
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, temporary, metadata={_KEY: json.dumps(state)})
        temporary.replace(path)
    except OSError as error:
        raise DetentError(f"{path}: cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _without_aliases(state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and {other name: name} for those that are the same memory (tied weights)."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in state_dict.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        tensors[name] = (
            tensor.detach().contiguous().clone() if tensor.storage_offset() else tensor.detach().contiguous()
        )
    return tensors, aliases


def restore(model: nn.Module | Callable[[], nn.Module], path: str | Path) -> nn.Module:
    """Rebuild a saved quantized model.

    Args:
        model: the same architecture, not quantized (its weights are replaced), or a function that builds it.
        path: a file that `save` wrote.

    Returns:
        The model with all weights, quantizers and ranges of the saved one.

    Raises:
        DetentError: the file is missing, damaged or not from `save`, or doesn't fit the model.
    """
    from safetensors import SafetensorError, safe_open

    if not isinstance(model, nn.Module):
        model = model()
    path = Path(path)
    if not path.is_file():
        raise DetentError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except SafetensorError as error:
        raise DetentError(f"{path}: not a file that detent.save wrote, or damaged: {error}") from error
    if _KEY not in metadata:
        raise DetentError(f"{path}: holds no quantizer state; it was not written by detent.save")
    state = json.loads(metadata[_KEY])
    aliases = state.pop("aliases", {})
    restore_from_detent_state(model, state)
    _create_packed_buffers(model, tensors)
    tensors.update({alias: tensors[name] for alias, name in aliases.items()})
    result = model.load_state_dict(tensors, strict=False)
    if result.missing_keys or result.unexpected_keys:
        raise DetentError(
            f"{path}: doesn't fit {type(model).__name__}: missing {result.missing_keys[:3]},"
            f" unexpected {result.unexpected_keys[:3]}"
        )
    return model


def _create_packed_buffers(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, module in model.named_modules():
        if isinstance(module, QuantWeightBase) and module.__dict__.get("_packed_format") is not None:
            prefix = f"{name}.{QuantWeightBase._PACKED}" if name else QuantWeightBase._PACKED
            for key in [k for k in tensors if k.startswith(prefix)]:
                module.register_buffer(key[len(name) + 1 if name else 0 :], torch.empty_like(tensors[key]))


#: The names that the state has in ModelOpt's API.
modelopt_state = detent_state
restore_from_modelopt_state = restore_from_detent_state
