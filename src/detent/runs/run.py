"""A run in progress: its clock, its notices and the function that shows them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detent._version import __version__
from detent.data import sample_model_dir
from detent.data.text import missing_package_notice
from detent.pretrained.loading import resolve_folder
from detent.report.resources import AnonymousMemory, peak_device_memory_bytes, peak_memory_bytes
from detent.report.run_report import RunReport
from detent.runs.options import CalibrationOptions, EvaluationOptions, ModelOptions

BUILTIN_MODEL = "the built-in sample model"


@dataclass
class Run:
    """A run in progress: its clock, its notices and the function that shows them."""

    command: list[str] = field(default_factory=list)
    on_notice: Callable[[str], None] = lambda text: None
    notices: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    memory: AnonymousMemory = field(default_factory=AnonymousMemory)

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.monotonic() - self.started

    def notify(self, text: str) -> None:
        """Show a notice to the user and keep it for the report; each text once."""
        if text not in self.notices:
            self.notices.append(text)
            self.on_notice(text)

    def tell_about_texts(self, calibration: CalibrationOptions | None, evaluation: EvaluationOptions) -> None:
        """At the start, warn if the default texts that will be needed come from a package that isn't installed."""
        if calibration and not calibration.dataset and (notice := missing_package_notice("calibration")):
            self.notify(notice)
        if not evaluation.skip and not evaluation.dataset and (notice := missing_package_notice("evaluation")):
            self.notify(notice)

    def report(self, **parts: Any) -> RunReport:
        """The report, with what the run itself knows filled in."""
        return RunReport(
            detent_version=__version__,
            command=self.command,
            seconds=self.seconds,
            peak_memory_bytes=peak_memory_bytes(),
            peak_anonymous_memory_bytes=self.memory.look(),
            peak_device_memory_bytes=peak_device_memory_bytes(),
            notices=self.notices,
            **parts,
        )


def model_folder(options: ModelOptions) -> tuple[Path, bool]:
    if options.model_dir is None:
        return sample_model_dir(), True
    return resolve_folder(options.model_dir, options.revision), False
