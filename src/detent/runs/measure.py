"""Perplexity within a run: of a model in memory, or of a checkpoint that doesn't fit, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from torch import nn

from detent.checkpoints import Source, open_quantized, open_source
from detent.data import load_texts
from detent.engine.host import CannotStream, Host
from detent.errors import DetentError
from detent.evaluation import DEFAULT_WINDOW, evaluation_ids, perplexity
from detent.model.skeleton import model_without_weights
from detent.pretrained.facts import max_sequence_length, vocabulary_size
from detent.pretrained.loading import load_config
from detent.pretrained.names import CheckpointNames
from detent.report.run_report import Evaluation
from detent.runs.load import attach, in_model
from detent.runs.options import EvaluationOptions
from detent.runs.run import Run
from detent.runs.streamed import StreamedBlocks
from detent.structure.chain import chain_of

#: Windows that perplexity is measured on at once, unless their logits in float32 take more than `LOGITS_BYTES`.
DEFAULT_BATCH = 8
LOGITS_BYTES = 1 << 30


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

    def __call__(self, model: nn.Module, host: Host | None = None, blocks: Sequence[str] = ()) -> float | None:
        """The perplexity of a model, in memory or, with `host`, block by block."""
        if self._options.skip:
            return None
        windows, rows = self._options.windows, self._batch_size
        result = perplexity(model, self._ids, max_windows=windows, batch_size=rows, host=host, blocks=blocks)
        self.details = Evaluation(dataset=self._dataset, window=result.window, tokens=result.tokens)
        return result.perplexity


def _windows_at_once(options: EvaluationOptions, config: Any) -> int:
    """The number asked for, or by default as many as keep the logits within `LOGITS_BYTES`, between 1 and 8."""
    if options.batch_size is not None:
        return options.batch_size
    window = min(DEFAULT_WINDOW, max_sequence_length(config) or DEFAULT_WINDOW)
    size = window * (vocabulary_size(config) or 1) * torch.float32.itemsize
    return max(1, min(options.max_batch_size or DEFAULT_BATCH, LOGITS_BYTES // size))


def measure_source(
    measure: Measure, source: Source, config: Any, *, dtype: torch.dtype, device: str, **options: Any
) -> float | None:
    """The perplexity of a float checkpoint, block by block.

    Args:
        measure: what on. source, config: the checkpoint. dtype: to compute in. device: where blocks run.
        options: as for `model_without_weights`.

    Raises:
        DetentError: its blocks can't be run one by one.
    """
    model = model_without_weights(source, config, dtype=dtype, **options)
    return _by_blocks(measure, source, CheckpointNames(model, source.tensors), model, device)


def measure_quantized(
    measure: Measure, folder: Path, *, dtype: torch.dtype, device: str, **options: Any
) -> float | None:
    """The perplexity of a quantized checkpoint, block by block: weights are decoded as they are read."""
    checkpoint, source = open_quantized(folder), open_source(folder)
    config = load_config(folder, trust_remote_code=options["trust_remote_code"])
    model = model_without_weights(source, config, dtype=dtype, **options)
    names, formats = CheckpointNames(model, source.tensors), checkpoint.formats
    records = [in_model(replace(checkpoint.layer(name), weight=None), names, folder) for name in formats.layers]
    attach(model, formats, checkpoint.kv_scales, names, records, folder, device=torch.device(device))
    return _by_blocks(measure, source, names, model, device)


def _by_blocks(measure: Measure, source: Source, names: CheckpointNames, model: nn.Module, device: str) -> float | None:
    blocks = chain_of(model, None)
    host = StreamedBlocks(source, names, model, blocks, device=device, states=Path(gettempdir()))
    try:
        return measure(model, host, blocks)
    except CannotStream as error:
        raise DetentError(
            f"{source.path}: the model doesn't fit into memory, and its perplexity can't be measured block by block:"
            f" {error}; pass skip_evaluation, or evaluate it where there is more memory"
        ) from error
