"""What stays in floating point, and why; and how files say so."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from detent.checkpoints import Source
from detent.errors import DetentError
from detent.formats import Format
from detent.nn import QuantWeightBase
from detent.nn.attention import attention_modules, caches_latents
from detent.plan.defaults import stays_by_default
from detent.pretrained.facts import is_multimodal, outside_language
from detent.pretrained.names import CheckpointNames
from detent.structure import Structure


def exclusions(
    model: nn.Module,
    linears: list[str],
    exclude: list[str] | None,
    names: CheckpointNames,
    structure: Structure | None,
) -> tuple[list[str], dict[str, str]]:
    """(names of the linear layers that stay, {module name: reason} of these and of others that stay)."""
    why: dict[str, str] = {}
    if exclude is None:
        reason = stays_by_default(model, structure)
        why = {name: text for name, _ in model.named_modules() if (text := reason(name))}
        return [name for name in linears if name in why], why
    in_file = {name: names.layer(name) or name for name in linears}
    others = _stay_anyway(model, linears, names)
    for pattern in exclude:
        found = [name for name in linears if _means(pattern, name) or _means(pattern, in_file[name])]
        if not found and not any(_means(pattern, name) for name in others):
            check_pattern("exclude_layers", pattern, linears)
        why.update(dict.fromkeys(found, f"excluded by {pattern!r}"))
    return list(why), why


def _stay_anyway(model: nn.Module, linears: list[str], names: CheckpointNames) -> list[str]:
    """What else a user may name among the exclusions: matrices that aren't linear layers, such as routers and experts,
    as they are called in the model and in the file."""
    quantizable = set(linears)
    found = {
        name: None
        for name, module in model.named_modules()
        if name not in quantizable and any(p.dim() > 1 for p in module.parameters(recurse=False))
    }
    for group in names.groups:
        if any(parameter.rpartition(".")[0] in found for parameter in group.parameters):
            found |= {tensor.removesuffix(".weight"): None for tensor in group.tensors}
    return list(found)


def _means(pattern: str, name: str) -> bool:
    """Whether a user's pattern names a module: itself, or by a module around it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def why_nothing(model: nn.Module, linears: list[str], exclude: list[str] | None) -> str:
    """The message for a plan that quantizes nothing."""
    if exclude and linears:
        return "exclude_layers names every linear layer, so nothing would be quantized; exclude fewer"
    found = {type(m) for m in model.modules() if any(p.dim() > 1 for p in m.parameters(recurse=False))}
    kinds = sorted(kind.__name__.removeprefix("Quant") for kind in found)
    return (
        f"{type(model).__name__} has no plain torch.nn.Linear layer besides those that stay by default, so nothing"
        f" would be quantized: its weights are in {', '.join(kinds)}, and schemes cover nn.Linear alone"
    )


def check_pattern(flag: str, pattern: str, linears: list[str]) -> list[str]:
    """The linear layers that a user's pattern names.

    Raises:
        DetentError: there are none.
    """
    found = [name for name in linears if _means(pattern, name)]
    if not found:
        known = get_close_matches(pattern.strip("*."), {n.rpartition(".")[2] for n in linears}, 1) or linears[:3]
        raise DetentError(
            f"{flag} {pattern!r} matches no linear layer; did you mean {' or '.join(repr(k) for k in known)}?"
            " Wildcards match whole module names, as in '*.down_proj'"
        )
    return found


def unreached(model: nn.Module, structure: Structure, linears: list[str], *, learns: bool) -> dict[str, str]:
    """{module name: reason} of the linear layers whose inputs can't be seen: a module around them multiplies with their
    weights itself, or no text reaches them in a model of several modalities, which matters where data is needed."""
    taken = [name for name in structure.taken if name in linears]
    why = dict.fromkeys(taken, "the module around it uses its weight without calling it, so its input can't be seen")
    if learns and is_multimodal(model):
        unread = [name for name in structure.unread if name in linears]
        why |= dict.fromkeys(unread, "text alone doesn't reach it, so nothing can be learned about its input")
    return why


def check_attention(model: nn.Module, structure: Structure | None, kv_cache: Format) -> list[str]:
    """The names of the attention modules whose keys and values stay, though those of the others are quantized: those
    of other modalities, and those that read another one, such as cross-attention, which text alone doesn't reach.

    Raises:
        DetentError: there are no others; scales per head are asked for, and what is cached has no heads.
    """
    outside = outside_language(model)
    names = [name for name, _ in attention_modules(model)]
    if all(map(outside, names)):
        raise DetentError(
            f"kv_cache_dtype: {type(model).__name__} has no attention whose keys and values can be reached: no module"
            " fetches its attention function from transformers, calls PyTorch's, or takes the softmax of a product of"
            " its own; leave the key/value cache unquantized"
        )
    if kv_cache.granularity.kind == "per_channel" and any(
        caches_latents(type(module)) for _, module in attention_modules(model)
    ):
        raise DetentError(
            f"kv_cache_dtype: {type(model).__name__} caches latents, which have no heads to give scales to; use fp8"
        )
    unread = structure.unread if structure is not None and is_multimodal(model) else ()
    blind = {name.rpartition(".")[0] for name in unread}
    return [name for name in names if outside(name) or name in blind]


def without_a_name(names: CheckpointNames, linears: list[str]) -> dict[str, str]:
    """{module name: reason} of the linear layers whose codes and scales would have no separate name in a file."""
    return {
        name: f"the file stores it joined with others as {group.tensors[0]}; this version leaves it"
        for name in linears
        if names.layer(name) is None and (group := names.of_parameter(f"{name}.weight")) is not None
    }


def overlooked(
    source: Source, model: nn.Module, names: CheckpointNames, kept: dict[str, str], why: dict[str, str]
) -> dict[str, int]:
    """{name: elements} of the kept matrices that are neither embeddings nor excluded. See `Plan`."""
    embeddings = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    found = {}
    for name in kept:
        info, modules = source.info(name), _modules(names, name)
        if modules and _is_float_matrix(source, name) and not modules & embeddings and not modules & why.keys():
            found[name] = math.prod(info.shape)
    return found


def left_in_float(
    source: Source, model: nn.Module, names: CheckpointNames, layers: Iterable[str]
) -> tuple[tuple[str, ...], bool]:
    """How to tell engines which matrices stay, all that aren't in `layers`; and whether transformers merges any.

    Modules are named as in the file and, where that differs, as in the model class. Engines look up each expert of
    a mixture under a separate name, whatever the file holds, so those are given by a pattern.
    """
    layers = set(layers)
    quantized = layers | {names.layer(name) or name for name in layers}
    embeddings = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = dict.fromkeys(name for name in linears if name not in layers and name not in names.experts)
    many: dict[str, list[str]] = {}
    for name in linears:
        if name in names.experts and name not in layers:
            many.setdefault(_tail(name) + "$", []).append(name)
    merges = False
    for tensor in source.tensors:
        group, modules = names.of_tensor(tensor), _modules(names, tensor)
        name = tensor.removesuffix(".weight")
        if name in quantized or modules & layers or not _is_float_matrix(source, tensor):
            continue
        if modules and modules <= embeddings:
            continue
        merges |= (group.converter is not None or group.merged) and tensor.endswith(".weight")
        for module in modules if group.converter or group.pieces or len(source.info(tensor).shape) > 2 else ():
            many.setdefault(_tail(module) + r"\..*", []).append(module)
        key = _tail(name) + "$"
        if key.count(r"\d+") > 1:
            many.setdefault(key, []).append(name)
        else:
            found[name] = None
    for pattern, members in many.items():
        if any(re.match(pattern, name) for name in quantized):
            found |= dict.fromkeys(members)
        else:
            found[f"re:{pattern}"] = None
    return tuple(found), merges


def _is_float_matrix(source: Source, tensor: str) -> bool:
    info = source.info(tensor)
    return len(info.shape) > 1 and info.dtype.is_floating_point


def _modules(names: CheckpointNames, tensor: str) -> set[str]:
    """The modules whose parameters a tensor of the file makes."""
    return {parameter.rpartition(".")[0] for parameter in names.of_tensor(tensor).parameters}


def _tail(name: str) -> str:
    """A pattern of a module in every block: from the first number on, up to the container of experts."""
    head, found, rest = name.partition(".experts")
    parts = (head + found if found and not re.search(r"\.\d", rest) else name).split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return r".*\." * (first > 0) + r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in parts[first:])


def reason_kept(tensor: str, model: nn.Module, names: CheckpointNames, why: dict[str, str]) -> str:
    group = names.of_tensor(tensor)
    if not group.parameters:
        return "the model class does not use it; copied unchanged"
    module_name, _, leaf = group.parameters[0].rpartition(".")
    if module_name in why:
        return why[module_name]
    module = model.get_submodule(module_name)
    if isinstance(module, nn.Embedding):
        return "embedding"
    if leaf == "bias":
        return "bias"
    parameter = getattr(module, leaf, None)
    if parameter is not None and parameter.dim() < 2:
        return f"{type(module).__name__} vector"
    if ".experts." in f"{module_name}.":
        return "experts, which the model holds merged in one tensor; this version leaves them"
    kind = type(module).__name__.removeprefix("Quant")
    if isinstance(module, nn.Linear) and isinstance(module, QuantWeightBase):
        return "left by the scheme"
    if isinstance(module, nn.Linear):
        return f"{kind} is a linear layer with a custom forward"
    return f"a {kind}, and schemes cover linear layers alone"
