"""On-disk formats, the writer and the reader of each side by side. Nothing here computes a scale."""

from __future__ import annotations

from detent.checkpoints.decoded import DecodedSource, open_source
from detent.checkpoints.folder import MAX_SHARD_SIZE, CheckpointWriter
from detent.checkpoints.gguf.reader import gguf_file, open_stored
from detent.checkpoints.layout import Layout
from detent.checkpoints.quantized import (
    QuantizedCheckpoint,
    QuantizedWriter,
    choose,
    layouts,
    open_quantized,
    wanted_layouts,
)
from detent.checkpoints.records import Activation, LayerCheckpoint, LayerFormats, ModelFormats
from detent.checkpoints.source import Source, TensorInfo, quant_method

__all__ = [
    "MAX_SHARD_SIZE",
    "Activation",
    "CheckpointWriter",
    "DecodedSource",
    "LayerCheckpoint",
    "LayerFormats",
    "Layout",
    "ModelFormats",
    "QuantizedCheckpoint",
    "QuantizedWriter",
    "Source",
    "TensorInfo",
    "choose",
    "gguf_file",
    "layouts",
    "open_quantized",
    "open_source",
    "open_stored",
    "quant_method",
    "wanted_layouts",
]
