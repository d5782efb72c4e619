"""Saving a quantized model to one file and restoring it: weights and quantizers as safetensors, the rest as JSON
inside.

The JSON (under the metadata key ``detent_state``) holds, for each quantizer, its attributes and whether it is on, and
for each packed weight its format; tensors that share memory are stored once with their other names listed. No pickle is
involved.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detent.config import QuantizerAttributeConfig
from detent.errors import DetentError
from detent.external.files import check_as, is_file, parse_json, unreadable, user_path
from detent.external.schemas import SavedState
from detent.formats import Format, Scales
from detent.formats.stored import check_scales, check_stored, scales_layout
from detent.model.conversion import is_quantized, named_quantizers, replace_quant_module
from detent.model.rollback import unchanged_on_failure
from detent.nn import QuantWeightBase, SequentialQuantizer, TensorQuantizer
from detent.nn.attention import route_attention
from detent.nn.packed_weight import packed_layout, unpack_codes
from detent.nn.quant_module import check_module
from detent.nn.sequential import Quantizer, members_of

#: What a weight can have been before it was packed.
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KEY = "detent_state"
_VERSION = 1


def detent_state(model: nn.Module) -> dict[str, Any]:
    """What must be known besides the `state_dict` to rebuild the quantized model: plain JSON.

    Raises:
        DetentError: the model isn't quantized.

    Example:
        >>> import torch, detent
        >>> cfg = {"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "axis": 0}}, "algorithm": "max"}
        >>> model = detent.quantize(torch.nn.Sequential(torch.nn.Linear(4, 4)), cfg)
        >>> import json
        >>> state = json.loads(json.dumps(detent.detent_state(model)))
        >>> sorted(state)
        ['packed', 'quantizers', 'version']
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
        "quant": quantizer.is_quantizing,
        "buffers": [n for n in TensorQuantizer._STATE if getattr(quantizer, n) is not None],
    }


def restore_from_detent_state(model: nn.Module, state: dict[str, Any]) -> nn.Module:
    """Give a plain model the quantizers and packed weights that `state` describes, their tensors still empty.

    Load the `state_dict` of the saved model afterwards.

    Raises:
        DetentError: the model is quantized already, or its modules aren't those that were saved. It is then as it was.

    Example:
        >>> import torch, detent
        >>> cfg = {"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "axis": 0}}, "algorithm": "max"}
        >>> model = detent.quantize(torch.nn.Sequential(torch.nn.Linear(4, 4)), cfg)
        >>> plain = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> again = detent.restore_from_detent_state(plain, detent.detent_state(model))
        >>> again.load_state_dict(model.state_dict())
        <All keys matched successfully>
    """
    if is_quantized(model):
        raise DetentError("the model is quantized already; restore into a freshly built one")
    state = _checked(state, "the saved state")
    try:
        with unchanged_on_failure(model):
            owners = {name.rpartition(".")[0] for name in state["quantizers"]}
            replace_quant_module(model, adapters=owners)
            _restore_quantizers(model, state["quantizers"])
            _restore_packed(model, state["packed"])
    except (AttributeError, TypeError) as error:
        raise DetentError(f"the saved state doesn't fit {type(model).__name__}: {error!r}") from error
    route_attention(model)
    return model


def _checked(state: Any, where: str) -> dict[str, Any]:
    """A state as plain JSON, once it is known to be one."""
    try:
        state = json.loads(json.dumps(state))
    except (TypeError, ValueError, RecursionError) as error:
        raise DetentError(f"{where} is not the JSON that detent_state gives: {error}") from error
    if not isinstance(state, dict) or state.get("version") != _VERSION:
        raise DetentError(f"{where} is not one that this version of Detent can read (version {_VERSION} is)")
    check_as(SavedState, state, where)
    return state


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
        parameter, shape = module.weight_parameter, tuple(description["shape"])
        own = None if parameter is None else tuple(module.to_output_first(parameter, module).shape)
        if shape != own:
            raise DetentError(f"{name} held a packed weight of shape {shape}, but its weight has shape {own} here")
        module.expect_packed(Format.from_dict(description["format"]), shape, _DTYPES[description["dtype"]])


def save(model: nn.Module, path: str | Path) -> None:
    """Write the quantized model to one safetensors file, atomically.

    Args:
        model: a quantized model, its weights float, folded or packed.
        path: the file; any suffix.

    Raises:
        DetentError: the model isn't quantized, or the file cannot be written.

    Example:
        >>> import torch, detent
        >>> cfg = {"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "axis": 0}}, "algorithm": "max"}
        >>> model = detent.quantize(torch.nn.Sequential(torch.nn.Linear(4, 4)), cfg)
        >>> detent.save(model, "model.safetensors")
        >>> again = detent.restore(torch.nn.Sequential(torch.nn.Linear(4, 4)), "model.safetensors")
        >>> torch.equal(again(torch.eye(4)), model(torch.eye(4)))
        True
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    state = detent_state(model)
    tensors, state["aliases"] = _without_aliases(model.state_dict())
    path = user_path(path)
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

    Example:
        >>> import torch, detent
        >>> cfg = {"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "axis": 0}}, "algorithm": "max"}
        >>> model = detent.quantize(torch.nn.Sequential(torch.nn.Linear(4, 4)), cfg)
        >>> detent.save(model, "model.safetensors")
        >>> again = detent.restore(lambda: torch.nn.Sequential(torch.nn.Linear(4, 4)), "model.safetensors")
        >>> torch.equal(again[0].weight, model[0].weight)
        True
    """
    path = user_path(path)
    if not isinstance(model, nn.Module):
        model = check_module(model() if callable(model) else model)
    tensors, state = _read(path)
    aliases = state.get("aliases", {})
    missing = [name for name in aliases.values() if name not in tensors]
    if missing:
        raise DetentError(f"{path}: damaged: it holds no tensor {missing[0]!r}")
    tensors.update({alias: tensors[name] for alias, name in aliases.items()})
    with unchanged_on_failure(model):
        restore_from_detent_state(model, state)
        _create_buffers(path, model, state["quantizers"], tensors)
        _check_fit(path, model, tensors)
        _check_values(path, model, tensors)
        _load(model, tensors)
    return model


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the description of a file that `save` wrote."""
    from safetensors import SafetensorError, safe_open

    if not is_file(path):
        raise DetentError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if _KEY not in metadata:
                raise DetentError(f"{path}: holds no quantizer state; it was not written by detent.save")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except OSError as error:
        raise unreadable(path, error) from error
    except SafetensorError as error:
        raise DetentError(f"{path}: not a file that detent.save wrote, or damaged: {error}") from error
    return tensors, _checked(parse_json(metadata[_KEY], f"{path}: its description"), f"{path}: its description")


def _create_buffers(path: Path, model: nn.Module, described: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Buffers that exist only once calibrated or packed: those that the description and the formats ask for, on the
    device of the module that they belong to."""
    buffers = _described_buffers(described)
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if isinstance(module, TensorQuantizer):
            parent = model.get_submodule(name.rpartition(".")[0])
            for buffer in buffers.get(name, []):
                if buffer not in TensorQuantizer._STATE or prefix + buffer not in tensors:
                    raise DetentError(f"{path}: damaged: it holds no tensor {prefix + buffer!r}")
                tensor = tensors[prefix + buffer]
                wanted[buffer] = (tuple(tensor.shape), _dtype_of(module, buffer, tensor))
        elif isinstance(module, QuantWeightBase) and module.is_packed:
            parent, layout = module, packed_layout(module._packed_format, module._packed_shape)
            wanted = {module._PACKED + field: what for field, what in layout.items()}
        device = (
            next((t.device for t in parent.parameters()), next(model.parameters(), torch.empty(0)).device)
            if wanted
            else None
        )
        for buffer, (shape, dtype) in wanted.items():
            found = tensors.get(prefix + buffer)
            if found is None or tuple(found.shape) != shape or found.dtype != dtype:
                here = "missing" if found is None else f"{found.dtype} {tuple(found.shape)}"
                raise DetentError(
                    f"{path}: damaged: {prefix + buffer} is {here}, not {dtype} {shape} as its format requires"
                )
            module.register_buffer(buffer, torch.empty_like(found, device=device))


def _described_buffers(described: dict[str, Any]) -> dict[str, list[str]]:
    """The names of the calibrated tensors of each quantizer, those in sequences one by one. Without a range that it had
    a quantizer would go on as a dynamic one."""
    found: dict[str, list[str]] = {}
    for name, description in described.items():
        members = enumerate(description) if isinstance(description, list) else [(None, description)]
        for index, member in members:
            found[name if index is None else f"{name}.{index}"] = member.get("buffers", [])
    return found


def _dtype_of(quantizer: TensorQuantizer, buffer: str, tensor: Tensor) -> torch.dtype:
    """What dtype a calibrated tensor has; those that follow the model's may have any floating-point one."""
    fmt = quantizer.format
    known = dict.fromkeys(("_amax", "_low", "_high", "_global_amax", "_outer_scale"), torch.float32)
    known |= {f"_{name}": dtype for name, (_, dtype) in scales_layout(fmt, (1,)).items()}
    known["_fused_rotation"] = torch.int32
    free = tensor.dtype if tensor.is_floating_point() and tensor.element_size() > 1 else torch.float32
    return known.get(buffer, free)


def _check_values(path: Path, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Refuse values that cannot have been saved: NaN, infinite weights, ranges and scales that are none."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = (float(v) for v in torch.aminmax(tensor.float()))
            if low != low or (name in parameters and not (math.isfinite(low) and math.isfinite(high))):
                raise DetentError(f"{path}: damaged: {name} holds NaN or infinity")
    for name, module in model.named_modules():
        where, prefix = f"{path}: damaged: {name}", f"{name}." if name else ""
        if isinstance(module, TensorQuantizer):
            state = {b: tensors[prefix + b] for b in TensorQuantizer._STATE if prefix + b in tensors}
            _check_ranges(where, module, state)
            if name.endswith("weight_quantizer") or name.rpartition(".")[0].endswith("weight_quantizer"):
                _check_tiles(where, model, name, module, state)
        elif isinstance(module, QuantWeightBase) and module.is_packed:
            layout = packed_layout(module._packed_format, module._packed_shape)
            fields = {field: tensors[prefix + module._PACKED + field] for field in layout}
            check_stored(unpack_codes(fields, module._packed_format, module._packed_shape), where)


def _check_ranges(where: str, quantizer: TensorQuantizer, state: dict[str, Tensor]) -> None:
    for buffer in ("_amax", "_global_amax", "_low", "_high", "_pre_quant_scale"):
        if buffer in state and not bool(torch.isfinite(state[buffer]).all()):
            raise DetentError(f"{where}.{buffer} is not finite")
    for buffer in ("_amax", "_low", "_high"):
        if buffer in state and quantizer.format.granularity.kind == "per_tensor" and state[buffer].numel() != 1:
            raise DetentError(f"{where}.{buffer} has {state[buffer].numel()} values; a range of a whole tensor is one")
    for buffer in ("_amax", "_global_amax"):
        if buffer in state and bool((state[buffer] < 0).any()):
            raise DetentError(f"{where}.{buffer} is a largest magnitude, but negative")
    if ("_low" in state) != ("_high" in state):
        raise DetentError(f"{where} has one end of its range without the other")
    if "_low" in state and (
        state["_low"].shape != state["_high"].shape or bool((state["_low"] > state["_high"]).any())
    ):
        raise DetentError(f"{where}: the low end of a range is above its high end")
    empty = torch.empty(0, dtype=quantizer.format.scale.stored_dtype)
    scales = Scales(state.get("_scale", empty), state.get("_zero_point"), state.get("_outer_scale"))
    check_scales(quantizer.format, scales, where, of_weight="weight_quantizer" in where)


def _check_tiles(where: str, model: nn.Module, name: str, quantizer: TensorQuantizer, state: dict[str, Tensor]) -> None:
    """A weight's range has one value for each tile of the weight."""
    owner = model.get_submodule(name[: name.rindex("weight_quantizer")].rstrip("."))
    parameter = owner.weight_parameter if isinstance(owner, QuantWeightBase) else None
    if parameter is None or not isinstance(owner, QuantWeightBase):
        return
    shape = tuple(owner.to_output_first(parameter, owner).shape)
    tiles = math.prod(quantizer.format.granularity.grid(shape))
    shared = scales_layout(quantizer.format, quantizer.format.granularity.grid(shape)).get("outer_scale")
    if shared is not None and "_outer_scale" in state and tuple(state["_outer_scale"].shape) != shared[0]:
        raise DetentError(f"{where}._outer_scale is {tuple(state['_outer_scale'].shape)}, not {shared[0]}")
    for buffer in ("_amax", "_low", "_high", "_scale", "_zero_point"):
        if buffer in state and state[buffer].numel() != tiles:
            raise DetentError(
                f"{where}.{buffer} has {state[buffer].numel()} values, but a weight of shape {shape} with"
                f" {quantizer.format.granularity} has {tiles} scales"
            )


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
        if tensor.is_floating_point() != tensors[name].is_floating_point():
            raise DetentError(f"{path}: damaged: {name} is {tensors[name].dtype}, but {tensor.dtype} in the model")
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
