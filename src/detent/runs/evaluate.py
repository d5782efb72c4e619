"""Evaluating a checkpoint, quantized or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from detent.checkpoints import Source, open_quantized, quant_method
from detent.data import load_texts
from detent.errors import DetentError
from detent.evaluation import DEFAULT_WINDOW, evaluation_ids, perplexity
from detent.pretrained.facts import max_sequence_length, vocabulary_size
from detent.pretrained.loading import load_config, load_model, load_tokenizer, model_dtype
from detent.report.run_report import BeforeAfterBytes, Evaluation, Perplexity, RunReport
from detent.runs.load import load_quantized
from detent.runs.options import EvaluationOptions, ModelOptions
from detent.runs.parts import stored_parts
from detent.runs.run import BUILTIN_MODEL, Run, model_folder

#: Windows that perplexity is measured on at once, unless their logits in float32 take more than `LOGITS_BYTES`.
DEFAULT_BATCH = 8


LOGITS_BYTES = 1 << 30


def evaluate_checkpoint(
    model_options: ModelOptions,
    evaluation: EvaluationOptions | None = None,
    *,
    quantized: bool | None = None,
    run: Run | None = None,
) -> RunReport:
    """Measure the perplexity of a checkpoint. The result is ``perplexity.after`` for a quantized checkpoint
    and ``perplexity.before`` for a float one; sizes likewise.

    Args:
        model_options, evaluation: what to measure, on what.
        quantized: whether the checkpoint has to be quantized, or must not be; None takes both.
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
    source = Source(folder, quantized=quantized is not False)
    if not builtin:
        run.tell_about_texts(None, evaluation)
    method = quant_method(source.config)
    if quantized and method is None:
        raise DetentError(f"{folder} is not quantized: its config.json has no quantization_config")
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
    if checkpoint is None:
        model = load_model(source, config, dtype=model_dtype(model_options.data_type, config, source), **common)
        parts: dict[str, Any] = {"perplexity": Perplexity(before=measure(model))}
    else:
        model = load_quantized(folder, data_type=model_options.data_type, **common)
        parts = {"perplexity": Perplexity(after=measure(model)), **stored_parts(checkpoint)}
    return run.report(
        model=model_options.model_dir or BUILTIN_MODEL,
        scheme=method,
        evaluation=measure.details,
        size_bytes=BeforeAfterBytes(before=source.nbytes),
        **parts,
    )


class Measure:
    """Perplexity on one text, tokenized once; None where evaluation is skipped."""

    def __init__(self, options: EvaluationOptions, tokenizer: Any, config: Any, builtin: bool, run: Run) -> None:
        self.details: Evaluation | None = None
        self._options = options
        if options.skip:
            return
        text = load_texts(options.dataset or ("builtin" if builtin else None), "evaluation")
        if text.notice:
            run.notify(text.notice)
        self._dataset = text.description
        self._ids = evaluation_ids(text, tokenizer)
        self._batch_size = _windows_at_once(options, config)

    def __call__(self, model: nn.Module) -> float | None:
        if self._options.skip:
            return None
        result = perplexity(model, self._ids, max_windows=self._options.windows, batch_size=self._batch_size)
        self.details = Evaluation(dataset=self._dataset, window=result.window, tokens=result.tokens)
        return result.perplexity


def _windows_at_once(options: EvaluationOptions, config: Any) -> int:
    """The number asked for, or by default as many as keep the logits within `LOGITS_BYTES`, between 1 and 8."""
    if options.batch_size is not None:
        return options.batch_size
    window = min(DEFAULT_WINDOW, max_sequence_length(config) or DEFAULT_WINDOW)
    size = window * (vocabulary_size(config) or 1) * torch.float32.itemsize
    return max(1, min(options.max_batch_size or DEFAULT_BATCH, LOGITS_BYTES // size))
