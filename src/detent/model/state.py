"""Saving a quantized model to one file and restoring it: weights and quantizers as safetensors, the rest as JSON
inside.

The JSON (under the metadata key ``detent_state``) holds, for each quantizer, its attributes and whether it is on, and
for each packed weight its format; tensors that share memory are stored once with their other names listed. No pickle is
involved.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detent.config import QuantizerAttributeConfig
from detent.errors import DetentError
from detent.formats import Format
from detent.model.conversion import is_quantized, named_quantizers, replace_quant_module
from detent.model.rollback import unchanged_on_failure
from detent.nn import QuantWeightBase, SequentialQuantizer, TensorQuantizer
from detent.nn.attention import route_attention
from detent.nn.sequential import Quantizer, members_of

#: What a weight can have been before it was packed.
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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
        described = [_describe(member) for member in members_of(quantizer)]
        quantizers[name] = described if isinstance(quantizer, SequentialQuantizer) else described[0]
    packed = {
        name: {
            "format": module._packed_format.to_dict(),
            "shape": list(module._packed_shape),
            "dtype": str(module._packed_dtype).removeprefix("torch."),
        }
        for name, module in model.named_modules()
        if isinstance(module, QuantWeightBase) and module.is_packed
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
        DetentError: the model is quantized already, or its modules aren't those that were saved. It is then as it was.
    """
    if is_quantized(model):
        raise DetentError("the model is quantized already; restore into a freshly built one")
    if not isinstance(state, dict) or state.get("version") != _VERSION:
        raise DetentError(f"not a state that this version of Detent can read (version {_VERSION} is)")
    try:
        with unchanged_on_failure(model):
            replace_quant_module(model)
            _restore_quantizers(model, state["quantizers"])
            _restore_packed(model, state["packed"])
    except (KeyError, AttributeError, TypeError) as error:
        raise DetentError(f"the saved state doesn't fit {type(model).__name__}: {error!r}") from error
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
        token_axis = members_of(getattr(owner, leaf))[0].token_axis
        if isinstance(description, list):
            quantizer: Quantizer = SequentialQuantizer(*(_rebuild(d) for d in description))
        else:
            quantizer = _rebuild(description)
        for member in members_of(quantizer):
            member.token_axis = token_axis
        quantizer.name = name
        setattr(owner, leaf, quantizer)


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
        dtype = _DTYPES[description["dtype"]]
        module.expect_packed(Format.from_dict(description["format"]), tuple(description["shape"]), dtype)


def save(model: nn.Module, path: str | Path) -> None:
    """Write the quantized model to one safetensors file, whole or not at all.

    Args:
        model: a quantized model, its weights float, folded or packed.
        path: the file; any suffix.

    Raises:
        DetentError: the model isn't quantized, or the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    state = detent_state(model)
    tensors, state["aliases"] = _without_aliases(model.state_dict())
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, temporary, metadata={_KEY: json.dumps(state)})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise DetentError(f"{path}: cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _without_aliases(state_dict: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, none sharing memory, and {other name: name} for those that are the same (tied weights)."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            raise DetentError(f"{name}: only tensors can be saved, not the extra state of a {type(tensor).__name__}")
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        storage = tensor.untyped_storage().data_ptr()
        plain = tensor.detach().contiguous()
        tensors[name] = plain.clone() if storage in storages or tensor.storage_offset() else plain
        storages.add(storage)
    return tensors, aliases


def restore(model: nn.Module | Callable[[], nn.Module], path: str | Path) -> nn.Module:
    """Rebuild a saved quantized model.

    Args:
        model: the same architecture, not quantized (its weights are replaced), or a function that builds it.
        path: a file that `save` wrote.

    Returns:
        The model with all weights, quantizers and ranges of the saved one.

    Raises:
        DetentError: the file is missing, damaged or not from `save`, or doesn't fit the model, which is then as it was.
    """
    if not isinstance(model, nn.Module):
        model = model()
    path = Path(path)
    tensors, state = _read(path)
    aliases = state.pop("aliases", {})
    missing = [name for name in aliases.values() if name not in tensors]
    if missing:
        raise DetentError(f"{path}: damaged: it holds no tensor {missing[0]!r}")
    tensors.update({alias: tensors[name] for alias, name in aliases.items()})
    with unchanged_on_failure(model):
        restore_from_detent_state(model, state)
        _check_ranges(path, state["quantizers"], tensors)
        _create_buffers(model, tensors)
        _check_fit(path, model, tensors)
        _load(model, tensors)
    return model


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the description of a file that `save` wrote."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DetentError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError) as error:
        raise DetentError(f"{path}: not a file that detent.save wrote, or damaged: {error}") from error
    if _KEY not in metadata:
        raise DetentError(f"{path}: holds no quantizer state; it was not written by detent.save")
    try:
        state = json.loads(metadata[_KEY])
    except json.JSONDecodeError as error:
        raise DetentError(f"{path}: damaged: its description is not JSON: {error}") from error
    if not isinstance(state, dict) or not isinstance(state.get("aliases", {}), dict):
        raise DetentError(f"{path}: damaged: its description is not that of a quantized model")
    return tensors, state


def _create_buffers(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Buffers that exist only once calibrated or packed, on the device of the module that they belong to."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, TensorQuantizer):
            parent = model.get_submodule(name.rpartition(".")[0])
            names = [n for n in TensorQuantizer._STATE if prefix + n in tensors]
        elif isinstance(module, QuantWeightBase) and module.is_packed:
            parent, names = module, [k.removeprefix(prefix) for k in tensors if k.startswith(prefix + module._PACKED)]
        else:
            continue
        device = next((t.device for t in parent.parameters()), next(model.parameters(), torch.empty(0)).device)
        for buffer in names:
            module.register_buffer(buffer, torch.empty_like(tensors[prefix + buffer], device=device))


def _check_ranges(path: Path, described: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Every range that a quantizer is described to have must be there: without it, it would go on as a dynamic one."""
    for name, description in described.items():
        members = enumerate(description) if isinstance(description, list) else [(None, description)]
        for index, member in members:
            prefix = name if index is None else f"{name}.{index}"
            lost = [b for b in member.get("buffers", []) if f"{prefix}.{b}" not in tensors]
            if lost:
                raise DetentError(f"{path}: damaged: it holds no tensor '{prefix}.{lost[0]}'")


def _check_fit(path: Path, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Everything that could make loading fail, before anything is loaded."""
    wanted = model.state_dict()
    missing, unexpected = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or unexpected:
        raise DetentError(
            f"{path}: doesn't fit {type(model).__name__}: missing {missing[:3]}, unexpected {unexpected[:3]}"
        )
    for name, tensor in wanted.items():
        if tensor.shape != tensors[name].shape:
            raise DetentError(
                f"{path}: doesn't fit {type(model).__name__}: {name} has shape {tuple(tensors[name].shape)} there and"
                f" {tuple(tensor.shape)} here"
            )
        if tensor.is_meta:
            raise DetentError(f"{name} has no memory yet (meta device); build the model on a real device to restore it")


def _load(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give parameters and buffers the saved dtype, then the saved values. Tied parameters stay tied."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for table in (module._parameters, module._buffers):
            for key, own in table.items():
                saved = tensors.get(prefix + key)
                if own is not None and saved is not None and own.dtype != saved.dtype:
                    own.data = own.data.to(saved.dtype)
    model.load_state_dict(tensors)


#: The names that the state has in ModelOpt's API.
modelopt_state = detent_state
restore_from_modelopt_state = restore_from_detent_state
