"""The plan: every tensor's fate, decided on the meta device before any weight is read.

Invariant: a plan covers each tensor of the checkpoint exactly once, with a format or with the reason why it stays.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detent.algorithms.registry import handler_of, refusals
from detent.checkpoints import LayerFormats, Layout, ModelFormats, Source, choose
from detent.checkpoints.records import exported_format
from detent.config import QuantCfg, QuantizeAlgorithmConfig, Scheme, quant_cfg_for
from detent.errors import DetentError
from detent.formats import Format, Integer
from detent.model.conversion import replace_quant_module, set_quantizer_by_cfg
from detent.nn import QuantWeightBase, TensorQuantizer
from detent.nn.experts_layout import take_experts_apart
from detent.nn.own_linear import kind_of
from detent.plan.carried import Carried, beside_the_model, carried_layers, note_on, without_r1
from detent.plan.fits import check_fits
from detent.plan.kept import (
    check_attention,
    check_pattern,
    exclusions,
    left_in_float,
    overlooked,
    reason_kept,
    unreached,
    why_nothing,
    without_a_name,
)
from detent.plan.mixtures import second_step
from detent.plan.readers import experts_apart, misread
from detent.plan.unlike import check_fused
from detent.pretrained.names import CheckpointNames
from detent.structure import Structure, find_structure
from detent.structure.chain import chain_of


@dataclass(frozen=True)
class Plan:
    """What will happen to a checkpoint.

    Attributes:
        scheme: the scheme, with formats as they will be used (scales in the dtype of the model).
        quant_cfg: the same as rules for quantizers.
        formats: of all quantized layers and of the key/value cache.
        kept: {tensor name: the reason why it stays}, for every tensor that isn't a quantized weight.
        parameters: {tensor name: number of elements} of the quantized weights.
        layout: the on-disk format.
        layout_notes: why a preferred on-disk format can't be used.
        wanted: the on-disk formats that will do; None for those of `hf_format`.
        skeleton: the model on the meta device, its quantizers set as they will be.
        structure: what was found in the model; None where nothing needs it and it can't be found.
        notes: what the user should know before anything runs.
        overlooked: {tensor name: number of elements} of the matrices that stay although nothing asked for that: no
            embedding, no output embedding, not excluded by the user. Their modules are of kinds that aren't quantized.
        unties: whether the output embedding is quantized, and so no longer the same as the input embedding.
        algorithms: what runs on the weights, in order; round-to-nearest where there is none.
        carried: what is quantized beside the model.
        names: which tensors of the file make which parameters of the model. `formats` and
            `quant_cfg` name modules of the model; `kept` and `parameters` name tensors of the file.
    """

    scheme: Scheme
    quant_cfg: QuantCfg
    formats: ModelFormats
    names: CheckpointNames
    kept: dict[str, str]
    parameters: dict[str, int]
    layout: Layout
    skeleton: nn.Module
    structure: Structure | None = None
    layout_notes: list[str] = field(default_factory=list)
    wanted: Sequence[Layout] | None = None
    notes: list[str] = field(default_factory=list)
    overlooked: dict[str, int] = field(default_factory=dict)
    unties: bool = False
    algorithms: list[QuantizeAlgorithmConfig] = field(default_factory=list)
    carried: Carried = field(default_factory=Carried)

    @property
    def overlooked_share(self) -> float:
        """The share of the parameters worth quantizing that isn't quantized, from 0 to 1."""
        left = sum(self.overlooked.values())
        return left / max(1, left + sum(self.parameters.values()))

    @property
    def needs_data(self) -> bool:
        """Whether calibration data is needed: some activation, key or value has a calibrated scale, or an algorithm
        learns from data."""
        if any(step.needs_data for step in self.algorithms):
            return True
        sides = [fmt for layer in self.formats.layers.values() for fmt in (layer.input, layer.output)]
        attention = (self.formats.kv_cache, self.formats.attention)
        return any(fmt is not None and not fmt.dynamic for fmt in [*sides, *attention])

    @property
    def groups_with_common_scale(self) -> list[list[str]]:
        """Quantized layers that engines fuse where a scale covers a whole matrix (NVFP4): it has to be common."""
        groups = () if self.structure is None else self.structure.fused_groups
        formats = {name: layer.weight for name, layer in self.formats.layers.items()}
        chosen = [[n for n in group if (fmt := formats.get(n)) is not None and fmt.has_outer_scale] for group in groups]
        return [group for group in chosen if len(group) > 1]

    def weight(self, layer: str, source: Source) -> Tensor:
        """The weight of a layer as the file has it: a tensor, a piece of one, or that of the layer it is tied to."""
        parameter = f"{layer}.weight"
        if self.names.of_parameter(parameter) is None:
            tied: Any = getattr(self.skeleton, "all_tied_weights_keys", None) or {}
            parameter = tied.get(parameter, parameter)
        return self.names.to_model(parameter, source.tensor)[parameter]

    @property
    def streams(self) -> bool:
        """Whether each weight can be quantized by itself: without data, and without a change to any other."""
        data_free = not self.needs_data and self.formats.kv_cache is None
        return data_free and all(step.method and handler_of(step).scope == "weight" for step in self.algorithms)

    @property
    def why_whole(self) -> str:
        """Why the model has to be in memory whole while it is calibrated; "" if one block at a time does."""
        if self.structure is None or len(chain_of(self.skeleton, self.structure)) < 2:
            return "it has no chain of blocks"
        for step in self.algorithms:
            for part in handler_of(step).parts(step) if step.method else []:
                if handler_of(part).scope in ("model", "end") or getattr(part, "layerwise", None) is False:
                    return f"{part.method} works on the whole model"
        return ""


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection: a plan makes millions of objects that stay, and looking through them again and again
    for cycles would be a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_uncollected()
def make_plan(
    source: Source,
    model: nn.Module,
    scheme: Scheme,
    *,
    kv_cache: Format | None = None,
    attention: Format | None = None,
    exclude: list[str] | None = None,
    per_layer: Mapping[str, Scheme] | None = None,
    chosen: Mapping[str, Scheme] | None = None,
    algorithms: list[QuantizeAlgorithmConfig] | None = None,
    overrides: str | Path | None = None,
    wanted: Sequence[Layout] | None = None,
    allow_unfused: bool = False,
    quantize_mtp: bool = False,
    experts_second_step: Format | None = None,
) -> Plan:
    """Plan the quantization of a checkpoint.

    Args:
        source: the opened checkpoint.
        model: its model on the meta device; it is converted.
        scheme: what to do with linear layers.
        kv_cache: the format of keys and values, or None.
        attention: that of queries and attention probabilities, or None; it needs one of keys and values.
        exclude: wildcards on names, in the model or the file, of what stays; None for the output embedding, routers and
            what is outside the language model.
        per_layer: {wildcard on module names: the scheme for these}; later ones win, exclusions win over all.
        chosen: {layer: the scheme for it}, on top of `scheme`.
        algorithms: what runs on the weights, from `parse_algorithm`.
        overrides: a JSON file of what to use in place of the structure that is found: see `find_structure`.
        wanted: the on-disk formats that will do, the best first; None for those of `hf_format`.
        allow_unfused: whether layers that engines fuse may have different formats.
        quantize_mtp: whether linear layers that the checkpoint has beside the model are quantized like those in it.
        experts_second_step: a format for the codes that `scheme` gives the weights of experts.

    Raises:
        DetentError: a pattern of `exclude` matches nothing; nothing is left to quantize; a weight of the model isn't in
            the checkpoint; a group size that leaves no format to store it in; layers that engines fuse would differ; an
            algorithm can't serve a format; an algorithm needs the structure of a model in which none can be found.
    """
    take_experts_apart(model)
    structure, notes = _structure(model, bool(algorithms or overrides), overrides)
    names = CheckpointNames(model, source.tensors)
    check_fits(source, model, names)
    replace_quant_module(model)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    patterns, why = exclusions(model, linears, exclude, names, structure)
    more = without_a_name(names, linears)
    if structure is not None:
        schemes = [scheme, *(chosen or {}).values()]
        learns = any(s.needs_data for s in schemes) or any(step.needs_data for step in algorithms or [])
        rounds = any(one.input or one.output for one in schemes)
        more |= unreached(model, structure, linears, learns=learns) if learns or rounds else {}
    if blind := [name for name in more if name not in why]:
        notes.append(f"{len(blind)} linear layers stay in floating point, such as {blind[0]}: {more[blind[0]]}")
    patterns, why = [*patterns, *more], {**more, **why}
    quant_cfg = quant_cfg_for(scheme)
    for pattern, special in (per_layer or {}).items():
        check_pattern("group_size_per_layer", pattern, linears)
        for entry in quant_cfg_for(special):
            if entry.get("parent_class"):
                quant_cfg.append({**entry, "quantizer_name": f"{pattern}.{entry['quantizer_name'].lstrip('*')}"})
    quant_cfg.extend(_rules_of(chosen or {}))
    if experts_second_step is not None:
        quant_cfg.extend(second_step(structure, scheme, experts_second_step))
    decided = _decided(model, names, wanted)
    if decided is not None:
        for name, (fmt, _) in decided.items():
            setting = {"enable": False} if fmt is None else {"cfg": {"format": fmt}}
            quant_cfg.append({"quantizer_name": f"{name}.weight_quantizer", **setting})
        patterns, why = (patterns, why) if exclude else ([*more], more)
        why = {name: reason for name, (fmt, reason) in decided.items() if fmt is None} | why
    quant_cfg.extend({"quantizer_name": f"{pattern}.*", "enable": False} for pattern in patterns)
    if kv_cache is not None:
        elsewhere = check_attention(model, structure, kv_cache)
        quant_cfg.append({"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"format": kv_cache}})
        if attention is not None:
            quant_cfg.append({"quantizer_name": "*[qp]_bmm_quantizer", "cfg": {"format": attention}})
        quant_cfg.extend({"quantizer_name": f"{name}.*", "enable": False} for name in elsewhere)
    # Exclusions are checked above, in the user's words: a warning about them here would say it twice.
    set_quantizer_by_cfg(model, quant_cfg)
    layers = {name: _layer_formats(module) for name, module in _quantized(model)}
    if not layers and (scheme.weight or scheme.input) and not (kv_cache and exclude and linears):
        raise DetentError(why_nothing(model, linears, exclude))
    beside = beside_the_model(source, names)
    algorithms, more_notes = without_r1(algorithms or [], beside, source, structure)
    carried = carried_layers(model, beside, source, names, layers, structure) if quantize_mtp else Carried()
    notes += [*more_notes, *([note_on(beside, carried, model)] if beside else [])]
    ignored, merges = left_in_float(source, model, names, [*layers, *carried.formats])
    formats = ModelFormats(
        layers=layers,
        kv_cache=None if kv_cache is None else exported_format(kv_cache),
        attention=attention,
        ignored=ignored,
        aliases={
            file: name for name in layers if (file := names.layer(name) or name) != name and name not in names.experts
        },
        merges=merges,
    )
    weights = _weight_tensors(source, model, names, formats)
    weights |= {f"{name}.weight": math.prod(layer.shape) for name, layer in carried.formats.items()}
    kept = {name: reason_kept(name, model, names, why) for name in source.tensors if name not in weights}
    if structure is not None and not allow_unfused and all(layout.fuses for layout in wanted or ()):
        check_fused(structure, layers, linears)
    if messages := refusals(algorithms, layers):
        raise DetentError("; ".join(messages))
    layout, layout_notes = choose(formats, wanted, refused=misread(model, formats))
    notes += experts_apart(model, names, formats) if layout.name == "compressed-tensors" else []
    return Plan(
        scheme=scheme,
        quant_cfg=quant_cfg,
        formats=formats,
        names=names,
        kept=kept,
        parameters=weights,
        layout=layout,
        skeleton=model,
        structure=structure,
        layout_notes=layout_notes,
        wanted=wanted,
        notes=notes,
        overlooked={} if scheme.weight is None else overlooked(source, model, names, kept, why),
        unties=any(_is_tied(model, name) for name, layer in layers.items() if layer.weight is not None),
        algorithms=algorithms,
        carried=carried,
    )


def _decided(
    model: nn.Module, names: CheckpointNames, wanted: Sequence[Layout] | None
) -> dict[str, tuple[Format | None, str]] | None:
    """{module: (format, or None where it stays; the reason)} where the on-disk format decides by itself."""
    if wanted is None or len(wanted) != 1:
        return None
    module_of = {
        names.layer(name) or name: (name, tuple(module.to_output_first(module.weight, module).shape))
        for name, module in model.named_modules()
        if isinstance(module, QuantWeightBase) and isinstance(module, (nn.Linear, nn.Embedding))
    }
    found = wanted[0].types({layer: shape for layer, (_, shape) in module_of.items()})
    return None if found is None else {module_of[layer][0]: decided for layer, decided in found.items()}


def _rules_of(chosen: Mapping[str, Scheme]) -> list[dict[str, Any]]:
    """Rules that give layers their schemes: one for each scheme and side, however many layers have it."""
    layers: dict[Scheme, set[str]] = {}
    for name, scheme in chosen.items():
        layers.setdefault(scheme, set()).add(name)
    rules = []
    for scheme, names in layers.items():
        for entry in quant_cfg_for(scheme):
            if entry.get("parent_class"):
                leaf = entry["quantizer_name"].lstrip("*")
                rules.append({**entry, "quantizer_name": partial(_is_quantizer_of, names, leaf)})
    return rules


def _is_quantizer_of(layers: Collection[str], leaf: str, quantizer: str) -> bool:
    layer, _, own = quantizer.rpartition(".")
    return own == leaf and layer in layers


def _structure(model: nn.Module, needed: bool, overrides: str | Path | None) -> tuple[Structure | None, list[str]]:
    """The model's structure, or None with a note where it can't be found and no algorithm needs it."""
    try:
        return find_structure(model, overrides=overrides), []
    except DetentError as error:
        if needed:
            raise
        return None, [f"no structure was found, so the formats of layers that engines fuse were not compared: {error}"]


def with_scale_dtype(scheme: Scheme, dtype: torch.dtype, *, all_bits: bool = False) -> Scheme:
    """Integer weights keep their scales in the model's dtype, as engines hold them, those of 8 bits with `all_bits`
    alone; FP8 scales stay float32."""
    name = {torch.bfloat16: "bfloat16", torch.float16: "float16"}.get(dtype)
    weight = scheme.weight
    if name is None or weight is None or not isinstance(weight.element, Integer) or (weight.bits == 8 and not all_bits):
        return scheme
    return replace(scheme, weight=weight.with_scale_dtype(name))  # type: ignore[arg-type]


def _quantized(model: nn.Module) -> Iterable[tuple[str, QuantWeightBase]]:
    for name, module in model.named_modules():
        if isinstance(module, QuantWeightBase) and any(
            q.is_enabled for q in module.children() if isinstance(q, TensorQuantizer)
        ):
            yield name, module


def _layer_formats(module: QuantWeightBase) -> LayerFormats:
    def side(name: str) -> Format | None:
        quantizer = getattr(module, f"{name}_quantizer", None)
        on = isinstance(quantizer, TensorQuantizer) and quantizer.is_enabled
        return exported_format(quantizer.format) if on and quantizer is not None else None

    weight = module.weight_quantizer
    return LayerFormats(
        shape=tuple(module.to_output_first(module.weight, module).shape),
        weight=weight.format if isinstance(weight, TensorQuantizer) and weight.is_enabled else None,
        input=side("input"),
        output=side("output"),
        kind=kind_of(module),
    )


def _weight_tensors(source: Source, model: nn.Module, names: CheckpointNames, formats: ModelFormats) -> dict[str, int]:
    """{name: elements} of the tensors that hold quantized weights."""
    found: dict[str, int] = {}
    for layer, described in formats.layers.items():
        if described.weight is None:
            continue
        piece = names.piece(f"{layer}.weight")
        name = f"{names.layer(layer)}.weight" if piece is None else piece.tensor
        if name in source.tensors:
            shape = source.info(name).shape
            if piece is not None:
                _check_whole(layer, piece.tensor, names, formats)
                shape = tuple(piece.select(torch.empty(shape, device="meta")).shape)
            own = tuple(model.get_parameter(f"{layer}.weight").shape)
            if shape != own:
                raise DetentError(
                    f"{source.path}: {name} has shape {source.info(name).shape}, but config.json calls for"
                    f" {own}{'' if piece is None else ' of each expert'}"
                )
            found[name] = found.get(name, 0) + math.prod(described.shape)
        elif not _is_tied(model, layer):
            raise DetentError(
                f"{source.path}: no tensor of the checkpoint is {layer}.weight of {type(model).__name__}, which its"
                f" config.json calls for; the first tensor there is {next(iter(source.tensors))}"
            )
    return found


def _check_whole(layer: str, tensor: str, names: CheckpointNames, formats: ModelFormats) -> None:
    """Of experts that are pieces of one tensor in the file, either all are quantized or none."""
    for parameter in names.of_tensor(tensor).parameters:
        other = formats.layers.get(parameter.removesuffix(".weight"))
        if other is None or other.weight is None:
            raise DetentError(
                f"{parameter.removesuffix('.weight')} would stay in floating point and {layer} be quantized, but the"
                f" checkpoint holds both in {tensor}; treat them alike"
            )


def _is_tied(model: nn.Module, layer: str) -> bool:
    """Whether a layer's weight is the input embedding's."""
    tied: Any = getattr(model, "all_tied_weights_keys", None) or {}
    return f"{layer}.weight" in tied
