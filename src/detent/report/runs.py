"""Whole runs: quantize a checkpoint, evaluate one, reload one; each from options to a report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detent._version import __version__
from detent.checkpoints import Source, add_to_manifest, check_replaceable, quant_method
from detent.config import Scheme, kv_cache_format, parse_scheme
from detent.data import (
    CalibrationBatches,
    check_vocabulary,
    load_texts,
    max_sequence_length,
    run_batches,
    sample_model_dir,
    token_batches,
    vocabulary_size,
)
from detent.engine.checkpoint import SimulatedLayer, floor_kv_scales, load_quantized, simulate, write
from detent.engine.models import (
    DTYPES,
    load_config,
    load_model,
    load_tokenizer,
    model_on_meta,
    resolve_folder,
)
from detent.engine.plan import Plan, make_plan, with_scale_dtype
from detent.errors import DetentError
from detent.evaluation import evaluation_ids, perplexity
from detent.formats import Format
from detent.report.resources import peak_device_memory_bytes, peak_memory_bytes
from detent.report.run_report import (
    REPORT_NAME,
    BeforeAfterBytes,
    Calibration,
    Evaluation,
    LayerReport,
    Perplexity,
    RunReport,
    Weights,
)

DEFAULT_SCHEME = "w_int4_per_group_sym"


@dataclass(frozen=True)
class ModelOptions:
    """Where a model comes from and how it is held.

    Attributes:
        model_dir: a folder, a hub name, or None for the built-in sample model.
        data_type: ``auto``, ``float16``, ``bfloat16`` or ``float32``.
        device: ``cpu``, ``cuda``, ``cuda:1``, ...
        attention: the attention implementation.
        trust_remote_code: whether Python code that comes with the checkpoint may run.
        revision: of a hub model.
    """

    model_dir: str | None = None
    data_type: str = "auto"
    device: str = "cpu"
    attention: str | None = None
    trust_remote_code: bool = False
    revision: str | None = None


@dataclass(frozen=True)
class EvaluationOptions:
    """What perplexity is measured on.

    Attributes:
        skip: measure nothing.
        dataset: a file, a hub data set, ``builtin``, or None for WikiText-2's test text (without a network: the
            built-in one).
        windows: use only so many windows; None for all.
        batch_size: windows that run at once.
    """

    skip: bool = False
    dataset: str | None = None
    windows: int | None = None
    batch_size: int = 1


@dataclass(frozen=True)
class CalibrationOptions:
    """What ranges are calibrated on.

    Attributes:
        dataset: a file, a hub data set, ``builtin``, or None for the default one (without a network: the built-in
            text).
        seq_len: tokens in a sample. num_samples: how many. batch_size: samples that run at once.
    """

    dataset: str | None = None
    seq_len: int = 512
    num_samples: int = 512
    batch_size: int = 1


@dataclass(frozen=True)
class SchemeOptions:
    """What is quantized and how; see `detent.config.parse_scheme`.

    Attributes:
        name: the scheme; None for the default one, where the model is the built-in one too.
        group_size: None where the user gave none.
        group_size_per_layer: (wildcard on module names, group size) pairs; the last match wins.
        exclude: wildcards on module names; None for the usual ones.
    """

    name: str | None = None
    group_size: int | None = None
    group_size_per_layer: tuple[tuple[str, int], ...] = ()
    scale_format: str | None = None
    scale_calculation_mode: str = "even"
    kv_cache: str | None = None
    min_kv_scale: float = 0.0
    exclude: list[str] | None = None


@dataclass
class Run:
    """A run in progress: its clock, its notices and who hears of them."""

    command: list[str] = field(default_factory=list)
    hear: Callable[[str], None] = lambda text: None
    notices: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def notify(self, text: str) -> None:
        """Tell the user something that the report keeps; once each."""
        if text not in self.notices:
            self.notices.append(text)
            self.hear(text)

    def report(self, **parts: Any) -> RunReport:
        """The report, with everything that the run itself knows filled in."""
        return RunReport(
            detent_version=__version__,
            command=self.command,
            seconds=time.monotonic() - self.started,
            peak_memory_bytes=peak_memory_bytes(),
            peak_device_memory_bytes=peak_device_memory_bytes(),
            notices=self.notices,
            **parts,
        )


def quantize_checkpoint(
    model_options: ModelOptions,
    scheme_options: SchemeOptions,
    output_dir: str | Path,
    *,
    calibration: CalibrationOptions | None = None,
    evaluation: EvaluationOptions | None = None,
    overwrite: bool = False,
    run: Run | None = None,
) -> RunReport:
    """Quantize a checkpoint into a new folder: plan, calibrate, simulate, write, read back, measure.

    Returns:
        The report, which also lies in the folder as ``detent_report.json``.

    Raises:
        DetentError: anything that the user can mend; the output folder is then as it was.
    """
    run = run or Run()
    calibration, evaluation = calibration or CalibrationOptions(), evaluation or EvaluationOptions()
    output = Path(output_dir)
    folder, builtin = _folder(model_options)
    scheme, kv_cache = _formats(scheme_options, builtin)
    check_replaceable(output, overwrite=overwrite)
    source = Source(folder)
    config = load_config(folder, trust_remote_code=model_options.trust_remote_code)
    dtype = _model_dtype(model_options, config)
    scheme = with_scale_dtype(scheme, dtype)
    plan = _plan(source, config, model_options, scheme_options, scheme, kv_cache)
    for note in plan.layout_notes:
        run.notify(f"Written in Detent's own layout, which other engines don't read: {note}")
    tokenizer = None
    if plan.needs_data or not evaluation.skip:
        tokenizer = load_tokenizer(folder, trust_remote_code=model_options.trust_remote_code)
    batches = _batches(calibration, tokenizer, config, builtin, run) if plan.needs_data else None
    measure = _Measure(evaluation, tokenizer, builtin, run)

    model = _load(folder, model_options)
    before = measure(model)
    loop = None if batches is None else (lambda m: run_batches(m, batches))
    layers = simulate(model, plan, loop)
    if kv_cache is not None:
        floor_kv_scales(model, scheme_options.min_kv_scale)
    after = measure(model)
    cast = None if model_options.data_type == "auto" else DTYPES[model_options.data_type]
    size_before = source.nbytes
    if cast is not None:
        source.config["dtype"] = model_options.data_type
        source.config.pop("torch_dtype", None)
    size_after = write(output, source, plan, model, layers, dtype=cast, overwrite=overwrite)
    report = run.report(
        model=model_options.model_dir or "the built-in sample model",
        scheme=scheme.name,
        perplexity=None if evaluation.skip else Perplexity(before=before, after=after),
        evaluation=measure.details,
        size_bytes=BeforeAfterBytes(before=size_before, after=size_after),
        weights=_weights(source, plan),
        layers=[_layer(name, layer) for name, layer in layers.items()],
        calibration=None if batches is None else _calibration(batches),
        output_dir=str(output),
    )
    report.write(output)
    add_to_manifest(output, REPORT_NAME)
    return report


def evaluate_checkpoint(
    model_options: ModelOptions, evaluation: EvaluationOptions | None = None, *, run: Run | None = None
) -> RunReport:
    """Measure the perplexity of a checkpoint, quantized or not. The figure stands under ``perplexity.after`` for a
    quantized checkpoint and under ``perplexity.before`` for a float one.

    Raises:
        DetentError: the checkpoint can't be read, or there is no text.
    """
    run = run or Run()
    evaluation = evaluation or EvaluationOptions()
    folder, builtin = _folder(model_options)
    source = Source(folder, quantized=True)
    quantized = quant_method(source.config) is not None
    tokenizer = load_tokenizer(folder, trust_remote_code=model_options.trust_remote_code)
    measure = _Measure(evaluation, tokenizer, builtin, run)
    model = _load(folder, model_options, quantized=quantized)
    figure = measure(model)
    return run.report(
        model=model_options.model_dir or "the built-in sample model",
        scheme=quant_method(source.config),
        perplexity=None if evaluation.skip else Perplexity(**{"after" if quantized else "before": figure}),
        evaluation=measure.details,
        size_bytes=BeforeAfterBytes(before=source.nbytes),
    )


def _folder(options: ModelOptions) -> tuple[Path, bool]:
    if options.model_dir is None:
        return sample_model_dir(), True
    return resolve_folder(options.model_dir, options.revision), False


def _formats(options: SchemeOptions, builtin: bool) -> tuple[Scheme, Format | None]:
    name = options.name or (DEFAULT_SCHEME if builtin else None)
    if name is None:
        raise DetentError(
            f"no scheme is named; pass --quant_scheme, for instance {DEFAULT_SCHEME} (`detent schemes` lists all), or"
            " --skip_quantization to evaluate the model as it is"
        )
    scheme = parse_scheme(name, options.group_size, options.scale_format, options.scale_calculation_mode)
    if options.kv_cache is None:
        if options.min_kv_scale:
            raise DetentError("--min_kv_scale is the floor of key/value cache scales; it needs --kv_cache_dtype")
        kv_cache = None
    else:
        if not (math.isfinite(options.min_kv_scale) and options.min_kv_scale >= 0):
            raise DetentError(f"--min_kv_scale is a number of at least 0, not {options.min_kv_scale}")
        kv_cache = kv_cache_format(
            options.kv_cache, options.group_size, options.scale_format, options.scale_calculation_mode
        )
        if options.min_kv_scale and kv_cache.dynamic:
            raise DetentError("--min_kv_scale needs a static key/value cache type, such as fp8")
    if scheme.weight is None and scheme.input is None and kv_cache is None:
        raise DetentError(f"scheme {name!r} quantizes nothing; use --skip_quantization to evaluate the model as it is")
    return scheme, kv_cache


def _model_dtype(options: ModelOptions, config: Any) -> torch.dtype:
    if options.data_type != "auto":
        return DTYPES[options.data_type]
    dtype = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _plan(
    source: Source,
    config: Any,
    model_options: ModelOptions,
    options: SchemeOptions,
    scheme: Scheme,
    kv_cache: Format | None,
) -> Plan:
    model = model_on_meta(config, trust_remote_code=model_options.trust_remote_code)
    groups = {
        pattern: with_scale_dtype(
            parse_scheme(scheme.name, size, options.scale_format, options.scale_calculation_mode),
            _model_dtype(model_options, config),
        )
        for pattern, size in options.group_size_per_layer
    }
    return make_plan(source, model, scheme, kv_cache=kv_cache, exclude=options.exclude, per_layer=groups)


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


class _Measure:
    """Perplexity on one text, tokenized once; None where evaluation is skipped."""

    def __init__(self, options: EvaluationOptions, tokenizer: Any, builtin: bool, run: Run) -> None:
        self.details: Evaluation | None = None
        self._options = options
        if options.skip:
            return
        text = load_texts(options.dataset or ("builtin" if builtin else None), "evaluation")
        if text.notice:
            run.notify(text.notice)
        self._dataset = text.description
        self._ids = evaluation_ids(text, tokenizer)

    def __call__(self, model: nn.Module) -> float | None:
        if self._options.skip:
            return None
        result = perplexity(model, self._ids, max_windows=self._options.windows, batch_size=self._options.batch_size)
        self.details = Evaluation(dataset=self._dataset, window=result.window, tokens=result.tokens)
        return result.perplexity


def _load(folder: Path, options: ModelOptions, *, quantized: bool = False) -> nn.Module:
    common: dict[str, Any] = {
        "data_type": options.data_type,
        "device": options.device,
        "attention": options.attention,
        "trust_remote_code": options.trust_remote_code,
    }
    return load_quantized(folder, **common) if quantized else load_model(folder, **common)


def _weights(source: Source, plan: Plan) -> Weights:
    kept = {name: math.prod(source.info(name).shape) for name in plan.kept}
    return Weights(
        quantized=sum(f.weight is not None for f in plan.formats.layers.values()),
        kept=len(kept),
        quantized_parameters=sum(math.prod(f.shape) for f in plan.formats.layers.values() if f.weight is not None),
        kept_parameters=sum(kept.values()),
        kept_reasons=plan.kept,
    )


def _layer(name: str, layer: SimulatedLayer) -> LayerReport:
    formats = layer.record.formats
    parts = [f"{side} {fmt}" for side, fmt in (("input", formats.input), ("output", formats.output)) if fmt is not None]
    weight = formats.weight
    return LayerReport(
        name=name,
        format="; ".join([str(weight) if weight else "weight as it was", *parts]),
        relative_error=layer.relative_error,
        shape=list(formats.shape),
        bits_per_weight=None if weight is None else weight.bits_per_element(formats.shape),
    )


def _calibration(batches: CalibrationBatches) -> Calibration:
    return Calibration(source=batches.description, samples=len(batches.samples), tokens=batches.tokens)
