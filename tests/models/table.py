"""The columns of the table of models, and one cell of it: a checkpoint quantized through the public function, which
reads back what it wrote and compares its logits with the simulated ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import detent
from detent.errors import DetentError
from models.published import Row
from models.text_formats import WORDS

_INT4, _INT8 = "w_int4_per_group_sym", "w_int8_a_int8_per_tensor_sym"
#: {column: (scheme, further options of the scheme, options of algorithms)}
COLUMNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "FP8": ("w_fp8_a_fp8", {"kv_cache": "fp8"}, {}),
    "INT4": (_INT4, {"group_size": 32}, {}),
    "INT8": (_INT8, {}, {}),
    "MX": ("w_mxfp4_a_mxfp4", {}, {}),
    "AWQ": (_INT4, {"group_size": 32}, {"algorithm": "awq"}),
    "GPTQ": (_INT4, {"group_size": 32}, {"algorithm": "gptq"}),
    "SmoothQuant": (_INT8, {}, {"before": ("smoothquant",)}),
    "Rotation": ("w_uint4_a_uint4_per_channel", {}, {"before": ("quarot",)}),
}
#: Why a matrix doesn't count as one that could have been quantized.
_ASIDE = ("embedding", "output embedding", "outside of the language model", "router or gate", "the model class")


@dataclass(frozen=True)
class Cell:
    """Attributes: share: of the language model's matrices that were quantized; None where the cell was refused.
    text: the refusal. notices: what the report says."""

    share: float | None
    text: str
    notices: tuple[str, ...] = ()


def save_text(path: Path) -> Path:
    texts = [" ".join(WORDS[(7 * row * word + word) % len(WORDS)] for word in range(40)) for row in range(6)]
    path.write_text(json.dumps(texts), "utf-8")
    return path


def cell(row: Row, column: str, checkpoint: Path, text: Path, out: Path, **more: Any) -> Cell:
    """Quantize the checkpoint of a row by a column's method."""
    scheme, options, algorithms = COLUMNS[column]
    try:
        report = detent.quantize_checkpoint(
            detent.ModelOptions(
                str(checkpoint), trust_remote_code=row.remote, attention=None if row.remote else "eager"
            ),
            detent.SchemeOptions(scheme, **options, **more),
            out,
            algorithms=detent.AlgorithmOptions(**algorithms),
            calibration=detent.CalibrationOptions(str(text), seq_len=32, num_samples=6, batch_size=2),
            evaluation=detent.EvaluationOptions(skip=True),
        )
    except DetentError as error:
        return Cell(None, str(error).replace(str(checkpoint), "DIR"))
    return Cell(_share(report, checkpoint), "", tuple(report.notices))


def _share(report: Any, checkpoint: Path) -> float:
    from safetensors import safe_open

    left = 0
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name, reason in report.weights.kept_reasons.items():
                if name in file.keys() and not reason.startswith(_ASIDE):  # noqa: SIM118
                    shape = file.get_slice(name).get_shape()
                    left += _product(shape) if len(shape) > 1 else 0
    done = report.weights.quantized_parameters
    return float(done / max(1, done + left))


def _product(shape: list[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result
