"""The report of one run, as data: what ``detent_report.json`` holds.

Every number in it is finite, so that any JSON reader takes the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from detent.errors import DetentError
from detent.external.files import check_as, is_folder, read_json, status

#: The file's name, in the output folder.
REPORT_NAME = "detent_report.json"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Perplexity(_Part):
    """Perplexity before and after quantization; None where it wasn't measured."""

    before: float | None = None
    after: float | None = None


class Evaluation(_Part):
    """What perplexity was measured on."""

    dataset: str
    #: Tokens in a window.
    window: int
    #: Tokens that were predicted.
    tokens: int


class BeforeAfterBytes(_Part):
    """Size of the weights on disk, in bytes. `after` is None where nothing was quantized or written."""

    before: int
    after: int | None = None


class Weights(_Part):
    """How many weight tensors, and how many numbers in them, were quantized and kept, and why each was kept."""

    quantized: int = 0
    kept: int = 0
    quantized_parameters: int = 0
    kept_parameters: int = 0
    #: Name of each kept tensor, and the reason.
    kept_reasons: dict[str, str] = Field(default_factory=dict)


class AlgorithmReport(_Part):
    """What one algorithm did to one weight."""

    algorithm: str
    #: What it minimises.
    objective: str
    #: The objective under round-to-nearest, and with what was chosen.
    before: float
    after: float
    #: The objective of a weight of zeros; None if not measured.
    energy: float | None = None
    decided: dict[str, Any] = Field(default_factory=dict)
    notice: str = ""
    #: Whether the weight keeps its round-to-nearest values.
    kept_plain: bool = False
    #: Whether the notice was shown in the summary too.
    noteworthy: bool = False


class LayerReport(_Part):
    """One quantized weight."""

    name: str
    #: The weight's format, in words.
    format: str
    #: ``norm(W - W^) / norm(W)``, Frobenius norms; None where it wasn't measured.
    relative_error: float | None = None
    shape: list[int] = Field(default_factory=list)
    #: Bits for each weight, its scales and zero points included.
    bits_per_weight: float | None = None
    #: What algorithms did to it, in order.
    algorithms: list[AlgorithmReport] = Field(default_factory=list)


class Calibration(_Part):
    """The data that the run calibrated on."""

    source: str
    samples: int
    tokens: int


class Verification(_Part):
    """What was found when the written folder was read back, before it took its place."""

    #: Tensors that were read and have the bits that were written.
    tensors: int
    #: Blocks of the model that were loaded from the folder and compared with the simulated ones; None for all.
    blocks: int | None
    #: The difference of their logits, relative to the length of the simulated ones.
    logit_difference: float


class ChosenFormat(_Part):
    """What a search chose for layers that share a choice."""

    layers: list[str]
    #: A scheme, or "none" for floating point.
    format: str
    #: Of a weight, scales included.
    bits: float
    #: What the loss is estimated to gain by it, in nats for each token.
    score: float


class SearchReport(_Part):
    """A search for the scheme of each layer."""

    #: Mean bits of a weight of the layers that were searched, and bytes of all tensors.
    effective_bits: float
    bytes: float
    #: The sum of the scores; no other choice has one that is lower by more than `gap`.
    score: float
    gap: float
    choices: list[ChosenFormat]


class RunReport(_Part):
    """Everything that a run reports."""

    detent_version: str
    #: The command line, as it was typed.
    command: list[str] = Field(default_factory=list)
    model: str
    #: Name of the quantization scheme; None where nothing was quantized.
    scheme: str | None = None
    #: None where the evaluation was skipped.
    perplexity: Perplexity | None = None
    evaluation: Evaluation | None = None
    size_bytes: BeforeAfterBytes
    weights: Weights = Field(default_factory=Weights)
    layers: list[LayerReport] = Field(default_factory=list)
    #: None where the run needed no data.
    calibration: Calibration | None = None
    #: The layout of the written checkpoint; None where nothing was written.
    layout: str | None = None
    #: None where nothing was written, or nothing was to be verified.
    verification: Verification | None = None
    #: None where one scheme was named.
    search: SearchReport | None = None
    #: Wall-clock time of the whole run.
    seconds: float
    #: Most main memory held at one time.
    peak_memory_bytes: int
    #: Without pages of files, which the system drops when memory is short; 0 where it isn't known.
    peak_anonymous_memory_bytes: int = 0
    #: The same on the CUDA devices, all together; None where they weren't used.
    peak_device_memory_bytes: int | None = None
    #: Everything that decides what a run gives, by name; {} where nothing was written.
    made_of: dict[str, str] = Field(default_factory=dict)
    #: Notices shown during the run.
    notices: list[str] = Field(default_factory=list)
    output_dir: str | None = None

    def to_json(self) -> str:
        """The report as indented JSON text."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def write(self, folder: Path) -> Path:
        """Write ``detent_report.json`` into an existing folder, and return its path."""
        path = folder / REPORT_NAME
        path.write_text(self.to_json(), encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: Path) -> RunReport:
        """Read a report from its file, or from the folder that holds it.

        Raises:
            DetentError: there is none, or it is not a report.
        """
        path = path / REPORT_NAME if is_folder(path) else path
        if status(path) is None:
            raise DetentError(f"there is no report at {path}")
        return check_as(cls, read_json(path), str(path))
