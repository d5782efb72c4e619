"""Evaluating a checkpoint, quantized or not."""

from __future__ import annotations

import math
from typing import Any

from detent.checkpoints import QuantizedCheckpoint, Source, open_quantized, open_stored, quant_method
from detent.errors import DetentError
from detent.pretrained.loading import load_config, load_model, load_tokenizer, model_dtype
from detent.report.resources import available_memory_bytes
from detent.report.run_report import BeforeAfterBytes, Perplexity, RunReport
from detent.report.terminal import format_bytes
from detent.runs.load import load_quantized
from detent.runs.measure import Measure, measure_quantized, measure_source
from detent.runs.options import EvaluationOptions, ModelOptions
from detent.runs.parts import stored_parts
from detent.runs.run import BUILTIN_MODEL, Run, model_folder

#: What users call the format of files in which weights of these methods are.
_FILE_FORMATS = {"quark": "quark_format", "gguf": "gguf"}


def evaluate_checkpoint(
    model_options: ModelOptions,
    evaluation: EvaluationOptions | None = None,
    *,
    quantized: bool | None = None,
    file_format: str | None = None,
    run: Run | None = None,
) -> RunReport:
    """Measure the perplexity of a checkpoint. The result is ``perplexity.after`` for a quantized checkpoint
    and ``perplexity.before`` for a float one; sizes likewise.

    Args:
        model_options, evaluation: what to measure, on what.
        quantized: whether the checkpoint has to be quantized, or must not be; None takes both.
        file_format: what a quantized checkpoint has to be: ``quark_format``, ``gguf``, or ``hf_format`` for one with a
            config.json that says how its safetensors are read; None for whatever the folder says.
        run: the run in progress.

    Raises:
        DetentError: the checkpoint can't be read, is of the wrong kind, or there is no text.

    Example:
        >>> import detent
        >>> report = detent.evaluate_checkpoint(detent.ModelOptions(), detent.EvaluationOptions(skip=True))
        >>> report.model, report.scheme
        ('the built-in sample model', None)
    """
    run = run or Run()
    evaluation = evaluation or EvaluationOptions()
    folder, builtin = model_folder(model_options)
    source = Source(folder) if quantized is False else open_stored(folder)
    if not builtin:
        run.tell_about_texts(None, evaluation)
    method = quant_method(source.config)
    if quantized and method is None:
        raise DetentError(f"{folder} is not quantized: its config.json has no quantization_config")
    found = _FILE_FORMATS.get(method or "", "hf_format")
    if file_format not in (None, found) and not (file_format == "hf_format" and found == "quark_format"):
        raise DetentError(
            f"{folder} is of {found} ({method}), not of {file_format}; leave the file format out, or name that"
        )
    trust = model_options.trust_remote_code
    checkpoint = None if method is None else open_quantized(folder)
    config = load_config(folder, trust_remote_code=trust)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust)
    measure = Measure(evaluation, tokenizer, config, builtin, run)
    common: dict[str, Any] = {
        "device": model_options.device,
        "attention": model_options.attention,
        "trust_remote_code": trust,
        "notify": run.notify,
    }
    dtype = model_dtype(model_options.data_type, config, source)
    available = available_memory_bytes()
    elements = source.elements if checkpoint is None else _elements(checkpoint)
    size = elements * dtype.itemsize
    fits = evaluation.skip or available is None or size <= available
    if not fits:
        del common["notify"]
        run.notify(f"the model takes {format_bytes(size)}, more than there is: it is measured block by block")
    if checkpoint is None:
        before = (
            measure(load_model(source, config, dtype=dtype, **common))
            if fits
            else measure_source(measure, source, config, dtype=dtype, **common)
        )
        parts: dict[str, Any] = {"perplexity": Perplexity(before=before)}
    else:
        after = (
            measure(load_quantized(folder, dtype=dtype, **common))
            if fits
            else measure_quantized(measure, folder, dtype=dtype, **common)
        )
        parts = {"perplexity": Perplexity(after=after), **stored_parts(checkpoint)}
    return run.report(
        model=model_options.model_dir or BUILTIN_MODEL,
        scheme=method,
        evaluation=measure.details,
        size_bytes=BeforeAfterBytes(before=source.nbytes),
        **parts,
    )


def _elements(checkpoint: QuantizedCheckpoint) -> int:
    """The number of elements that the float model has."""
    kept = sum(math.prod(checkpoint.source.info(name).shape) for name in checkpoint.kept)
    return kept + sum(math.prod(layer.shape) for layer in checkpoint.formats.layers.values())
