"""What comes before any weight is read: options parsed, the checkpoint opened, the plan made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from detent.checkpoints import Layout, Source, open_source, wanted_layouts
from detent.checkpoints.source import holds_no_weights
from detent.config import QuantizeAlgorithmConfig, Scheme, kv_cache_format, parse_scheme
from detent.config.algorithm_names import named_algorithms
from detent.config.base import shown
from detent.data import load_texts
from detent.data.batches import CalibrationBatches, check_vocabulary, token_batches
from detent.errors import DetentError
from detent.formats import E2M1, Format
from detent.plan.plan import Plan, make_plan, with_scale_dtype
from detent.pretrained.facts import max_sequence_length, vocabulary_size
from detent.pretrained.loading import load_config, model_dtype, model_on_meta
from detent.pretrained.names import as_written
from detent.runs.options import AlgorithmOptions, CalibrationOptions, ExportOptions, ModelOptions, SchemeOptions
from detent.runs.run import Run

DEFAULT_SCHEME = "w_int4_per_group_sym"
#: The name that asks for a search.
AUTO = "auto"
#: The share of a model that may stay in floating point without being excluded before a notice says so.
OVERLOOKED_SHARE = 0.2


@dataclass(frozen=True)
class Prepared:
    """A checkpoint with the plan for it.

    Attributes:
        source: the checkpoint. config: its transformers configuration. dtype: that its model is held in.
        plan: what will happen to it.
        min_kv_scale: the least scale of keys and values.
    """

    source: Source
    config: Any
    dtype: torch.dtype
    plan: Plan
    min_kv_scale: float


def prepare(
    folder: Path,
    model: ModelOptions,
    scheme: SchemeOptions,
    algorithms: AlgorithmOptions | None,
    run: Run,
    *,
    without_weights: bool = False,
) -> Prepared:
    """Plan a run, and tell what a user might not expect of it.

    Args:
        folder: of the checkpoint.
        model, scheme, algorithms: what is asked for.
        run: the run in progress.
        without_weights: whether a folder with nothing but a configuration will do.

    Raises:
        DetentError: whatever can be refused without reading weights.
    """
    chosen, kv_cache = _formats(scheme, model.model_dir is None)
    how = scheme.export
    wanted = layouts_for(how)
    steps = _algorithms(algorithms or AlgorithmOptions(), run)
    config = load_config(folder, trust_remote_code=model.trust_remote_code)
    bare = without_weights and holds_no_weights(folder)
    source = _imagined(folder, config, model, run) if bare else open_source(folder)
    wanted = [layout.of(source) for layout in wanted]
    for note in [*source.notes, *(note for layout in wanted for note in layout.notes)]:
        run.notify(note)
    dtype = model_dtype(model.data_type, config, source)
    chosen = _as_stored(chosen, dtype, wanted)
    plan = _plan(source, config, model, scheme, chosen, kv_cache, dtype, steps, wanted)
    if how.imatrix is not None and not (plan.streams and model.data_type == "auto"):
        raise DetentError(
            "imatrix weighs errors where weights are rounded without data; algorithms that read data, and a data_type,"
            " don't go with it: leave out one of them"
        )
    _tell_about(plan, run, dtype)
    return Prepared(source, config, dtype, plan, scheme.min_kv_scale)


def layouts_for(how: ExportOptions) -> list[Layout]:
    """The layouts that will do, the best first. Raises DetentError as `wanted_layouts`."""
    return wanted_layouts(
        how.format,
        how.custom_mode,
        pack_method=how.pack_method,
        gguf_type=how.gguf_type,
        imatrix=how.imatrix,
        gptq_version=how.gptq_version,
    )


def _as_stored(scheme: Scheme, dtype: torch.dtype, wanted: list[Layout]) -> Scheme:
    """A scheme with the grids and the scales that will be on disk, so that what is simulated is what is written."""
    if len(wanted) > 1:
        return with_scale_dtype(scheme, dtype)
    return wanted[0].adapt(with_scale_dtype(scheme, dtype, all_bits=wanted[0].scales_like_model))


def _imagined(folder: Path, config: Any, options: ModelOptions, run: Run) -> Source:
    """The checkpoint that a model without weights would have, its tensors named as transformers would write them."""
    run.notify(
        f"{folder} holds no weights, so the plan is made from its config.json, with the names that transformers writes"
    )
    dtype = getattr(config, "dtype", None)
    model = model_on_meta(
        config, trust_remote_code=options.trust_remote_code, dtype=dtype if isinstance(dtype, torch.dtype) else None
    )
    tied: Any = getattr(model, "all_tied_weights_keys", None) or {}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return Source.imagined(folder, {n: (tuple(t.shape), t.dtype) for n, t in as_written(model, state).items()})


def _tell_about(plan: Plan, run: Run, dtype: torch.dtype) -> None:
    """What a user might not expect of the plan."""
    small = any(f.weight is not None and f.weight.element == E2M1 for f in plan.formats.layers.values())
    if small and dtype != torch.bfloat16 and plan.layout.name == "compressed-tensors":
        run.notify(
            f"the model is in {str(dtype).removeprefix('torch.')}, and transformers decodes FP4 weights to bfloat16:"
            " load the result with dtype=torch.bfloat16, or quantize with data_type bfloat16"
        )
    for note in plan.notes:
        run.notify(note)
    for note in plan.layout_notes:
        run.notify(f"Written in Detent's own layout, which other engines don't read: {note}")
    if plan.overlooked_share > OVERLOOKED_SHARE:
        name = next(iter(plan.overlooked))
        run.notify(
            f"{plan.overlooked_share:.0%} of the parameters in matrices (embeddings aside) stay in floating point:"
            f" {len(plan.overlooked)} tensors, for instance {name} ({plan.kept[name]})"
        )


def _formats(options: SchemeOptions, builtin: bool) -> tuple[Scheme, Format | None]:
    decided = options.export.gguf_type
    for option, value in (("gguf_type", decided), ("imatrix", options.export.imatrix)):
        if value is not None and options.export.format != "gguf":
            raise DetentError(f"{option} is about GGUF files, and {options.export.format} isn't one; leave it out")
    if decided is not None and options.name is not None:
        raise DetentError(
            f"quant_scheme {options.name} and gguf_type {decided} both say which formats weights get; leave out one of"
            " them"
        )
    name = options.name or decided or (DEFAULT_SCHEME if builtin else None)
    if name == AUTO and not options.chosen:
        raise DetentError(
            "scheme auto is a search with calibration data, which quantizing does: it takes auto_formats, the schemes"
            " to choose from, and a budget; a plan is of one scheme"
        )
    if name is None:
        raise DetentError(
            f"no scheme is named; pass quant_scheme, for instance {DEFAULT_SCHEME} (`detent schemes` lists all), or"
            " skip_quantization to evaluate the float model"
        )
    how = options.group_size, options.scale_format, options.scale_calculation_mode
    scheme = Scheme(AUTO if options.chosen else name) if options.chosen or decided else parse_scheme(name, *how)
    kv_name = "fp8" if options.kv_cache is None and options.fp8_attention else options.kv_cache
    if options.fp8_attention and kv_name != "fp8":
        raise DetentError(
            f"fp8_attention_quant quantizes keys and values to fp8, so kv_cache_dtype can't be {shown(kv_name)}; leave"
            " it out, or say fp8"
        )
    if kv_name is None:
        if options.min_kv_scale:
            raise DetentError("min_kv_scale is the floor of key/value cache scales; it needs kv_cache_dtype")
        kv_cache = None
    else:
        if not (math.isfinite(options.min_kv_scale) and options.min_kv_scale >= 0):
            raise DetentError(f"min_kv_scale is a number of at least 0, not {options.min_kv_scale}")
        kv_cache = kv_cache_format(kv_name, options.group_size, options.scale_format, options.scale_calculation_mode)
        if options.min_kv_scale and kv_cache.dynamic:
            raise DetentError("min_kv_scale needs a static key/value cache type, such as fp8")
    given = options.chosen or decided
    if scheme.weight is None and scheme.input is None and kv_cache is None and not given:
        raise DetentError(f"scheme {name!r} quantizes nothing; use skip_quantization to evaluate the float model")
    return scheme, kv_cache


def _plan(
    source: Source,
    config: Any,
    model_options: ModelOptions,
    options: SchemeOptions,
    scheme: Scheme,
    kv_cache: Format | None,
    dtype: torch.dtype,
    algorithms: list[QuantizeAlgorithmConfig],
    wanted: list[Layout],
) -> Plan:
    model = model_on_meta(config, trust_remote_code=model_options.trust_remote_code)
    groups = {
        pattern: _as_stored(
            parse_scheme(scheme.name, size, options.scale_format, options.scale_calculation_mode), dtype, wanted
        )
        for pattern, size in options.group_size_per_layer
    }
    used = {
        name: _as_stored(parse_scheme(name, None, options.scale_format, options.scale_calculation_mode), dtype, wanted)
        for name in dict.fromkeys(name for _, name in options.chosen)
    }
    second = None
    if options.experts_second_step is not None:
        second = parse_scheme(options.experts_second_step, options.group_size).weight
    return make_plan(
        source,
        model,
        scheme,
        kv_cache=kv_cache,
        attention=kv_cache if options.fp8_attention else None,
        exclude=options.exclude,
        per_layer=groups,
        chosen={layer: used[name] for layer, name in options.chosen},
        algorithms=algorithms,
        overrides=options.overrides,
        wanted=wanted,
        allow_unfused=options.allow_unfused,
        quantize_mtp=options.quantize_mtp,
        experts_second_step=second,
    )


def _algorithms(options: AlgorithmOptions, run: Run) -> list[QuantizeAlgorithmConfig]:
    steps, notices = named_algorithms(options.before, options.algorithm, options.before_file, options.file)
    for notice in notices:
        run.notify(notice)
    return steps


def calibration_batches(
    options: CalibrationOptions, tokenizer: Any, config: Any, builtin: bool, run: Run
) -> CalibrationBatches:
    """The samples to calibrate on. Raises DetentError: there is no text, or its tokens aren't the model's."""
    texts = load_texts(options.dataset or ("builtin" if builtin else None), "calibration", options.num_samples)
    longest = max_sequence_length(config)
    seq_len = options.seq_len
    if longest is not None and longest < seq_len:
        run.notify(f"The model takes at most {longest} tokens, so calibration samples have {longest}, not {seq_len}.")
        seq_len = longest
    batches = token_batches(texts, tokenizer, seq_len, options.batch_size, options.num_samples)
    for notice in batches.notices:
        run.notify(notice)
    vocabulary = vocabulary_size(config)
    if vocabulary is not None:
        check_vocabulary(batches, vocabulary)
    return batches
