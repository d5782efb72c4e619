"""What a run that is interrupted leaves for one that goes on: finished blocks, and what enters the next one.

Next to the output, in a hidden folder: ``journal.json`` (what the run is made of), one safetensors file for each
finished block (in Detent's own layout; its header holds the rest), and one folder of hidden states. Each file gets its
name once it is whole and on the disk, so a run may end at any moment.

Invariant: what is made from a resumed journal has the bytes that an uninterrupted run would have written: blocks are
solved again from the last states that were kept, and only those.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType

import torch
from safetensors.torch import save_file
from torch import Tensor

from detent._version import __version__
from detent.algorithms.outcome import Outcome
from detent.checkpoints import ModelFormats, Source
from detent.checkpoints.detent_layout import DetentLayout, DetentReader
from detent.checkpoints.folder import PROGRESS_NAME, clear_errors, missing_parents, remove_empty, unshared
from detent.checkpoints.records import describe
from detent.data.batches import CalibrationBatches
from detent.distributed import size
from detent.engine.store import TensorStore
from detent.errors import DetentError
from detent.external.files import check_as, parse_json, placed, read_as, read_bytes, to_disk
from detent.external.model_folder import CONFIG_NAME
from detent.external.output import (
    DONE_NAME,
    MANIFEST_NAME,
    MARKER_NAME,
    Workspace,
    empty_folder,
    is_journal,
    journal_path,
    target_path,
)
from detent.external.schemas import FinishedBlock, FinishedShards, JournalStart, WrittenTensor
from detent.formats import Scales
from detent.plan.plan import Plan
from detent.report.run_report import REPORT_NAME, RunReport
from detent.runs.simulate import SimulatedLayer

START_NAME, STATES, HEADER, WRITTEN_NAME = "journal.json", "states", "detent", "written.jsonl"
#: Hidden states are kept again once the work since then has taken so many times as long as keeping them does.
WORTH = 5.0


class FinishedUnit:
    """The layers of a block (or all that are outside of blocks), read from the journal when they are asked for."""

    def __init__(self, path: Path) -> None:
        source = Source.of_file(path)
        header = check_as(FinishedBlock, parse_json(source.metadata.get(HEADER, ""), str(path)), str(path))
        source.config = {"quantization_config": header.description}
        self._source, self._reader = source, DetentReader(source)
        self.formats: ModelFormats = self._reader.formats
        self._errors = header.errors
        self._outcomes = {name: [Outcome(**o) for o in all_of] for name, all_of in header.outcomes.items()}
        self.values = {name: source.tensor(f"value:{name}") for name in header.values}
        self.kv = self._reader.kv_scales()
        source.close()

    def layer(self, name: str) -> SimulatedLayer:
        layer = SimulatedLayer(self._reader.layer(name), self._errors[name], self._outcomes.get(name, []))
        self._source.close()
        return layer


class Journal:
    """The journal of one run.

    Args:
        target: the folder that the run writes.
        made_of: everything that decides what the run gives, by what a user would call it.
        resume: whether to go on from what is there.
        tell: is called with what the user has to know.

    Attributes:
        found: whether there was something to go on from.

    Raises:
        DetentError: a journal is there and `resume` isn't set; it is of another recipe, model or data set; it can't be
            written; another run has it.
    """

    def __init__(
        self, target: str | Path, made_of: Mapping[str, str], *, resume: bool, tell: Callable[[str], None]
    ) -> None:
        self._tell = tell
        self._target = target_path(target)
        path = journal_path(self._target)
        check_no_journal(self._target, resume=resume)
        self.found = resume and is_journal(path) and (path / START_NAME).exists() and bool(_finished(path))
        if resume and not self.found:
            tell(f"nothing to resume was found next to {self._target}, so the run starts from the beginning")
        if self.found:
            before = read_as(JournalStart, path / START_NAME).made_of
            _check_same(before, made_of, f"{path} was begun", "that folder")
        with clear_errors(self._target):
            self._made_parents = missing_parents(self._target)
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._workspace = Workspace(self._target, "journal")
            self.path = self._workspace.path
            if not self.found:
                empty_folder(self.path, but=[MARKER_NAME])  # of what a run left that finished nothing
                content = {"written_by": "detent", "made_of": dict(made_of)}
                placed(self.path / START_NAME, lambda file: file.write_text(json.dumps(content, indent=1)))
        self._kept_at, self._kept_in = time.monotonic(), 0.0

    # ---- units ------------------------------------------------------------------------------------------------------

    def write(
        self,
        unit: str,
        layers: Iterable[SimulatedLayer],
        values: Mapping[str, Tensor],
        kv: Mapping[str, tuple[Scales, ...]],
        formats: ModelFormats,
    ) -> None:
        """Keep what was made of a block; `formats` are those of the whole model.

        Raises:
            DetentError: the disk is full, or the folder can't be written.
        """
        layout, layers = DetentLayout(), list(layers)
        tensors = {f"value:{name}": value.detach().cpu() for name, value in values.items()}
        for layer in layers:
            tensors |= layout.layer_tensors(layer.record)
        for module, pair in kv.items():
            tensors |= layout.kv_tensors(module, *pair)
        mine = {layer.record.name: layer.record.formats for layer in layers}
        header = {
            "description": describe(replace(formats, layers=mine, ignored=())),
            "errors": {layer.record.name: layer.relative_error for layer in layers},
            "outcomes": {layer.record.name: [asdict(o) for o in layer.outcomes] for layer in layers if layer.outcomes},
            "values": list(values),
        }
        metadata = {HEADER: json.dumps(header)}
        with clear_errors(self._target):
            placed(self.path / _file_of(unit), lambda file: save_file(unshared(tensors), file, metadata))

    def has(self, unit: str) -> bool:
        return (self.path / _file_of(unit)).exists()

    def unit(self, unit: str) -> FinishedUnit:
        """What was written for a block. Raises DetentError where it is damaged."""
        return FinishedUnit(self.path / _file_of(unit))

    # ---- tensors that are written one by one ------------------------------------------------------------------------

    @property
    def output(self) -> Path:
        """Where files of the result are kept until it is whole."""
        return self.path / "output"

    def written(self) -> dict[str, WrittenTensor]:
        """What is known of the tensors that were written before, by name."""
        log = self.path / WRITTEN_NAME
        lines = log.read_text("utf-8").splitlines() if log.exists() else []
        found = {}
        for line in lines:
            with suppress(DetentError):  # the last line of a run that was killed
                one = check_as(WrittenTensor, parse_json(line, WRITTEN_NAME), WRITTEN_NAME)
                found[one.tensor] = one
        return found

    def note(self, tensor: WrittenTensor) -> None:
        """Remember what is known of a tensor that was written."""
        with clear_errors(self._target), (self.path / WRITTEN_NAME).open("a", encoding="utf-8") as file:
            file.write(tensor.model_dump_json() + "\n")

    # ---- hidden states ----------------------------------------------------------------------------------------------

    def keep(self, index: int, inputs: TensorStore, references: TensorStore | None) -> None:
        """Keep what enters block `index`, if that is worth its time by now."""
        began = time.monotonic()
        if began - self._kept_at < WORTH * self._kept_in:
            return
        fresh = self.path / f"unfinished-{STATES}"
        shutil.rmtree(fresh, ignore_errors=True)
        with clear_errors(self._target):
            fresh.mkdir()
            inputs.saved(fresh / "inputs")
            if references is not None:
                references.saved(fresh / "references")
            for file in fresh.rglob("*"):
                to_disk(file)
            fresh.rename(self.path / f"{STATES}-{index}")
            to_disk(self.path)
        for number in self._kept():
            if number != index:
                shutil.rmtree(self.path / f"{STATES}-{number}", ignore_errors=True)
        self._kept_at = time.monotonic()
        self._kept_in = self._kept_at - began

    def resumed(self) -> tuple[int, TensorStore, TensorStore | None] | None:
        """The block to go on with, and what enters it."""
        kept = self._kept()
        if not kept:
            return None
        index = max(kept)
        folder = self.path / f"{STATES}-{index}"
        references = folder / "references"
        return (
            index,
            TensorStore.opened(folder / "inputs"),
            TensorStore.opened(references) if references.is_dir() else None,
        )

    def _kept(self) -> list[int]:
        names = [path.name.removeprefix(f"{STATES}-") for path in self.path.glob(f"{STATES}-*")]
        return [int(name) for name in names if name.isdigit()]

    def ending(self, folder: Path) -> None:
        """Remember which result is about to take its place."""
        content = (folder / MANIFEST_NAME).read_bytes()
        with clear_errors(self._target):
            placed(self.path / DONE_NAME, lambda file: file.write_bytes(content))

    # ---- the end ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let go of it. After an error it stays, unless nothing is finished or several processes share the run."""
        done = self.finished
        if kind is None or not done or size() > 1:  # each process has a share of the hidden states
            self.remove()
            return
        self._workspace.close()
        self._tell(f"{done} are kept in {self.path}: the same run with resume goes on from there")

    @property
    def finished(self) -> str:
        """What is finished, in words; "" for nothing."""
        return _finished(self.path)

    def remove(self) -> None:
        """Remove it."""
        self._workspace.remove()
        remove_empty(self._made_parents)


def made_of(
    source: Source, plan: Plan, batches: CalibrationBatches | None, dtype: torch.dtype, min_kv_scale: float
) -> dict[str, str]:
    """Everything that decides what a run gives, by what a user would call it: for `Journal`."""
    config, steps = source.path / CONFIG_NAME, plan.algorithms
    recipe = hashlib.sha256(json.dumps(describe(plan.formats), sort_keys=True).encode()).hexdigest()[:16]
    files = {info.file for info in source.tensors.values()}
    return {
        "version of Detent": __version__,
        "version of PyTorch": str(torch.__version__),
        "scheme": plan.scheme.name,
        "choice of layers and formats": recipe,
        "list of algorithms": json.dumps([step.model_dump(mode="json", exclude_unset=True) for step in steps]),
        "data type": str(dtype).removeprefix("torch."),
        "min_kv_scale": str(min_kv_scale),
        **({} if batches is None else _data(batches)),
        "config.json": hashlib.sha256(read_bytes(config)).hexdigest()[:16],
        **{f"file {name}": _stamp(source.path / name) for name in sorted(files)},
    }


def _data(batches: CalibrationBatches) -> dict[str, str]:
    tokens = hashlib.sha256(b"".join(sample.numpy().tobytes() for sample in batches.samples)).hexdigest()[:16]
    return {
        "calibration data": f"{len(batches.samples)} samples, {batches.tokens} tokens, digest {tokens}",
        "batch size": str(batches.batch_size),
    }


def _stamp(path: Path) -> str:
    found = path.stat()
    changed = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(found.st_mtime))
    return f"{found.st_size} bytes of {changed}.{found.st_mtime_ns % 10**9:09d}"


def finished_report(target: str | Path, made_of: Mapping[str, str]) -> RunReport:
    """The report of a run that had come to its end; a journal that it left is removed.

    Raises:
        DetentError: it was of another recipe, model or data set.
    """
    path = target_path(target)
    report = read_as(RunReport, path / REPORT_NAME)
    _check_same(report.made_of, made_of, f"{path} is the result of a run", "it")
    if is_journal(journal_path(path)):
        Workspace(path, "journal").remove()
    return report


def _check_same(before: Mapping[str, str], now: Mapping[str, str], what: str, remove: str) -> None:
    for name in sorted(before.keys() | now.keys()):
        then, this = before.get(name, "nothing"), now.get(name, "nothing")
        if then != this:
            raise DetentError(
                f"resume: {what} with another {name}: {then} then, {this} now; give the same one, or remove {remove} to"
                " start from the beginning"
            )


def check_no_journal(target: str | Path, *, resume: bool) -> None:
    """Refuse to begin where an interrupted run has left something, unless it is to be resumed.

    Raises:
        DetentError: there is a journal.
    """
    path = journal_path(target_path(target))
    if not resume and is_journal(path) and (done := _finished(path)):
        raise DetentError(
            f"{path} holds an interrupted run of which {done} are finished; pass resume to go on from there, or remove"
            " that folder to start from the beginning"
        )


def _finished(path: Path) -> str:
    blocks, log = sum(1 for _ in path.glob("block-*.safetensors")), path / "output" / PROGRESS_NAME
    files = len(read_as(FinishedShards, log).shards) if log.exists() else 0
    return f"{files} files" if files else f"{blocks} blocks" if blocks else ""


def _file_of(unit: str) -> str:
    return f"block-{unit}.safetensors"
