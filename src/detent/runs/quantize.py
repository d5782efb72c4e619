"""Quantizing a checkpoint into a new folder, from options to a report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from detent.checkpoints import Source
from detent.config import QuantizeAlgorithmConfig, Scheme, kv_cache_format, parse_scheme
from detent.config.algorithm_names import named_algorithms
from detent.data import check_source, load_texts
from detent.data.batches import CalibrationBatches, check_vocabulary, token_batches
from detent.engine.data_loop import run_batches
from detent.errors import DetentError
from detent.external.files import user_path
from detent.external.output import add_to_manifest, check_target
from detent.formats import E2M1, Format
from detent.model.kv_cache import check_cache
from detent.notices import collected_notices
from detent.plan.plan import Plan, make_plan, with_scale_dtype
from detent.pretrained.facts import max_sequence_length, vocabulary_size
from detent.pretrained.loading import (
    load_config,
    load_model,
    load_tokenizer,
    model_dtype,
    model_on_meta,
)
from detent.report.run_report import REPORT_NAME, BeforeAfterBytes, Perplexity, RunReport
from detent.runs.evaluate import Measure
from detent.runs.load import load_quantized
from detent.runs.options import AlgorithmOptions, CalibrationOptions, EvaluationOptions, ModelOptions, SchemeOptions
from detent.runs.parts import calibration_report, layer_report, planned_weights
from detent.runs.probe import compare_few_blocks
from detent.runs.run import BUILTIN_MODEL, Run, check_one_process, model_folder
from detent.runs.simulate import Quantized, simulate
from detent.runs.stream import LayerStream
from detent.runs.verify import check_logits, probe_logits, verify
from detent.runs.write import LayerResult, written

DEFAULT_SCHEME = "w_int4_per_group_sym"
#: The share of a model that may stay in floating point without being excluded before a notice says so.
OVERLOOKED_SHARE = 0.2
#: The relative error from which on a weight counts as lost: rounding noise stays far below, a weight of zeros has 1.
LOST_ERROR = 0.9


def quantize_checkpoint(
    model_options: ModelOptions,
    scheme_options: SchemeOptions,
    output_dir: str | Path,
    *,
    algorithms: AlgorithmOptions | None = None,
    calibration: CalibrationOptions | None = None,
    evaluation: EvaluationOptions | None = None,
    overwrite: bool = False,
    run: Run | None = None,
) -> RunReport:
    """Quantize a checkpoint into a new folder: plan, calibrate, simulate, measure, write, read back.

    Everything that can be refused is refused before the weights are read.

    Returns:
        The report, which is also in the folder as ``detent_report.json``.

    Raises:
        DetentError: anything that the user can mend; the output folder is then as it was.

    Example:
        >>> import detent
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     report = detent.quantize_checkpoint(
        ...         detent.ModelOptions(),
        ...         detent.SchemeOptions("w_int4_per_group_sym", group_size=32),
        ...         f"{folder}/out",
        ...         evaluation=detent.EvaluationOptions(skip=True),
        ...     )
        >>> report.weights.quantized
        28
    """
    run = run or Run()
    check_one_process()
    calibration, evaluation = calibration or CalibrationOptions(), evaluation or EvaluationOptions()
    output = user_path(output_dir)
    folder, builtin = model_folder(model_options)
    scheme, kv_cache = _formats(scheme_options, builtin)
    steps = _algorithms(algorithms or AlgorithmOptions(), run)
    calibrates = scheme.needs_data or (kv_cache is not None and not kv_cache.dynamic)
    calibrates |= any(step.needs_data for step in steps)
    if not builtin:
        run.tell_about_texts(calibration if calibrates else None, evaluation)
    for notice in check_target(output, source=folder, overwrite=overwrite):
        run.notify(notice)

    # The plan: whatever can be refused is refused here, before a weight is read.
    source = Source(folder)
    trust = model_options.trust_remote_code
    config = load_config(folder, trust_remote_code=trust)
    dtype = model_dtype(model_options.data_type, config, source)
    plan = _plan(source, config, model_options, scheme_options, with_scale_dtype(scheme, dtype), kv_cache, dtype, steps)
    _tell_about(plan, run, dtype)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust) if plan.needs_data or not evaluation.skip else None
    batches = None
    if plan.needs_data:
        batches = _batches(calibration, tokenizer, config, builtin, run)
    elif calibration.dataset is not None:
        check_source(calibration.dataset)  # not read, but a misspelled name shouldn't pass for a used one
    measure = Measure(evaluation, tokenizer, config, builtin, run)
    loading: dict[str, Any] = {
        "device": model_options.device,
        "attention": model_options.attention,
        "trust_remote_code": trust,
    }

    # The work: weight by weight from disk where nothing needs data, else in a model.
    streams = plan.streams and model_options.data_type == "auto"
    quantized: Quantized
    before = after = None
    expected = torch.empty(0)
    held: dict[str, torch.dtype] = {}
    with collected_notices() as notices:
        if streams:
            if not evaluation.skip:
                before = measure(load_model(source, config, dtype=dtype, notify=run.notify, **loading))
            quantized = LayerStream(source, plan, dtype, model_options.device)
        else:
            model = load_model(source, config, dtype=dtype, notify=run.notify, **loading)
            if kv_cache is not None:
                check_cache(model)
            before = measure(model)
            loop = None if batches is None else (lambda m: run_batches(m, batches))
            quantized = simulate(model, plan, loop, min_kv_scale=scheme_options.min_kv_scale)
            after, expected = measure(model), probe_logits(model)
            if model_options.data_type != "auto":
                held = {name: tensor.dtype for name, tensor in model.state_dict().items()}
            model.to("meta")  # never two models in memory

        # The folder: written under a temporary name, proved, reported on, and only then put in its place.
        with written(output, source, plan, quantized, dtype=dtype, held=held, overwrite=overwrite) as out:
            with out.examined():
                verify(out.folder, out.expected, source)
                if isinstance(quantized, LayerStream):
                    compare_few_blocks(out.folder, source, plan, quantized, config, dtype=dtype, **loading)
                    if not evaluation.skip:
                        after = measure(load_quantized(out.folder, dtype=dtype, **loading))
                else:
                    check_logits(expected, probe_logits(load_quantized(out.folder, dtype=dtype, **loading)))
                for notice in [*notices, *_noteworthy(out.layers), *_lost(out.layers)]:
                    run.notify(notice)
                report = run.report(
                    model=model_options.model_dir or BUILTIN_MODEL,
                    scheme=scheme.name,
                    perplexity=None if evaluation.skip else Perplexity(before=before, after=after),
                    evaluation=measure.details,
                    size_bytes=BeforeAfterBytes(before=source.nbytes, after=out.nbytes),
                    weights=planned_weights(source, plan),
                    layers=[layer_report(name, layer) for name, layer in out.layers.items()],
                    calibration=None if batches is None else calibration_report(batches),
                    output_dir=str(output),
                )
                report.write(out.folder)
                add_to_manifest(out.folder, REPORT_NAME)
            out.commit()
    return report


def _tell_about(plan: Plan, run: Run, dtype: torch.dtype) -> None:
    """What a user might not expect of the plan."""
    small = any(f.weight is not None and f.weight.element == E2M1 for f in plan.formats.layers.values())
    if small and dtype != torch.bfloat16 and plan.layout == "compressed-tensors":
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
    name = options.name or (DEFAULT_SCHEME if builtin else None)
    if name is None:
        raise DetentError(
            f"no scheme is named; pass quant_scheme, for instance {DEFAULT_SCHEME} (`detent schemes` lists all), or"
            " skip_quantization to evaluate the float model"
        )
    scheme = parse_scheme(name, options.group_size, options.scale_format, options.scale_calculation_mode)
    if options.kv_cache is None:
        if options.min_kv_scale:
            raise DetentError("min_kv_scale is the floor of key/value cache scales; it needs kv_cache_dtype")
        kv_cache = None
    else:
        if not (math.isfinite(options.min_kv_scale) and options.min_kv_scale >= 0):
            raise DetentError(f"min_kv_scale is a number of at least 0, not {options.min_kv_scale}")
        kv_cache = kv_cache_format(
            options.kv_cache, options.group_size, options.scale_format, options.scale_calculation_mode
        )
        if options.min_kv_scale and kv_cache.dynamic:
            raise DetentError("min_kv_scale needs a static key/value cache type, such as fp8")
    if scheme.weight is None and scheme.input is None and kv_cache is None:
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
) -> Plan:
    model = model_on_meta(config, trust_remote_code=model_options.trust_remote_code)
    groups = {
        pattern: with_scale_dtype(
            parse_scheme(scheme.name, size, options.scale_format, options.scale_calculation_mode),
            dtype,
        )
        for pattern, size in options.group_size_per_layer
    }
    return make_plan(
        source,
        model,
        scheme,
        kv_cache=kv_cache,
        exclude=options.exclude,
        per_layer=groups,
        algorithms=algorithms,
        overrides=options.overrides,
        only_layout=None if options.export == "hf_format" else options.export,
        allow_unfused=options.allow_unfused,
    )


def _algorithms(options: AlgorithmOptions, run: Run) -> list[QuantizeAlgorithmConfig]:
    steps, notices = named_algorithms(options.before, options.algorithm, options.before_file, options.file)
    for notice in notices:
        run.notify(notice)
    return steps


def _lost(layers: Mapping[str, LayerResult]) -> list[str]:
    """A line about weights of which hardly anything is left."""
    lost = {name: layer.relative_error for name, layer in layers.items() if _is_lost(layer.relative_error)}
    if not lost:
        return []
    worst = max(lost, key=lambda name: lost[name] or 0.0)
    return [
        f"WARNING: {len(lost)} of {len(layers)} weights are lost: {worst} has a relative error of"
        f" {lost[worst]:.0%} (100% is a weight of zeros); leave {'it' if len(lost) == 1 else 'them'} in floating point,"
        " or choose smaller groups"
    ]


def _is_lost(error: float | None) -> bool:
    return error is not None and not error < LOST_ERROR


def _noteworthy(layers: Mapping[str, LayerResult]) -> list[str]:
    """One line for each reason why an algorithm kept round-to-nearest somewhere, or needed damping."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, layer in layers.items():
        for outcome in layer.outcomes:
            if outcome.noteworthy:
                reasons.setdefault((outcome.algorithm, outcome.notice), []).append(name)
    return [
        f"{algorithm}: {len(names)} of {len(layers)} layers, such as {names[0]}: {notice}"
        for (algorithm, notice), names in reasons.items()
    ]


def _batches(options: CalibrationOptions, tokenizer: Any, config: Any, builtin: bool, run: Run) -> CalibrationBatches:
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
