"""Runs that are interrupted and go on: the same bytes, or a refusal that names what has changed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from cli.runner import Workplace, contents, detent, save_checkpoint, save_text, small
from detent.runs import journal as journals
from detent.runs.blocks import BlockStream
from detent.runs.stream import LayerStream

GPTQ = ("--group_size", 32, "--quant_algo", "gptq", "--skip_evaluation")
RESULT = ("model.safetensors", "config.json")


def interrupted(place: Workplace, monkeypatch: pytest.MonkeyPatch, after: int, *flags: object) -> None:
    """A run that ends by Ctrl-C once `after` blocks are finished."""
    real, done = BlockStream.finished, []

    def finished(self: BlockStream, name: str, *more: Any) -> None:
        if len(done) == after:
            raise KeyboardInterrupt
        real(self, name, *more)
        done.append(name)

    with monkeypatch.context() as patch:
        patch.setattr(BlockStream, "finished", finished)
        assert place.quantize(*flags, run=detent).code == 130
    assert not place.out.exists()


def journal(place: Workplace) -> Path:
    return place.out.parent / f".{place.out.name}.journal"


@pytest.fixture
def deep(place: Workplace, tmp_path: Path) -> Workplace:
    model = save_checkpoint(tmp_path / "model", small(num_hidden_layers=4))
    return Workplace(model, place.calibration, place.evaluation, place.out)


@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize("flags", [GPTQ, ("--group_size", 32, "--quant_algo", "gptaq", "--skip_evaluation")])
def test_goes_on_and_ends_with_the_same_bytes(
    flags: tuple[object, ...], after: int, deep: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep.quantize(*flags)
    wanted = {name: contents(deep.out)[name] for name in RESULT}
    for path in deep.out.iterdir():
        path.unlink()
    deep.out.rmdir()
    interrupted(deep, monkeypatch, after, *flags)
    assert journal(deep).is_dir()
    begun: list[str] = []
    real = BlockStream.finished
    monkeypatch.setattr(
        BlockStream, "finished", lambda self, name, *more: (begun.append(name), real(self, name, *more))[1]
    )
    deep.quantize(*flags, "--resume")
    assert {name: contents(deep.out)[name] for name in RESULT} == wanted
    assert len(begun) < 4  # what was finished was not done twice
    assert not journal(deep).exists()


def test_says_what_it_found(deep: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(deep, monkeypatch, 2, *GPTQ)
    before = contents(journal(deep))
    again = deep.quantize(*GPTQ, run=detent)
    assert again.code == 2
    assert f"{journal(deep)} holds an interrupted run of which 2 blocks are finished; pass resume" in again.err.replace(
        "\n", " "
    )
    assert contents(journal(deep)) == before


CHANGES: dict[str, tuple[tuple[object, ...], str]] = {
    "algorithm": (("--group_size", 32, "--quant_algo", "awq", "--skip_evaluation"), "list of algorithms"),
    "group": (("--group_size", 16, "--quant_algo", "gptq", "--skip_evaluation"), "choice of layers and formats"),
    "samples": ((*GPTQ, "--num_calib_data", 3), "calibration data"),
    "layers": ((*GPTQ, "--exclude_layers", "*.down_proj"), "choice of layers and formats"),
    "type": ((*GPTQ, "--data_type", "bfloat16"), "choice of layers and formats"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_recipe_is_refused_by_name(change: str, deep: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(deep, monkeypatch, 1, *GPTQ)
    flags, word = CHANGES[change]
    again = deep.quantize(*flags, "--resume", run=detent)
    assert again.code == 2
    assert f"was begun with another {word}" in again.err
    assert not deep.out.exists()
    assert journal(deep).is_dir()


def test_another_model_or_data_set_is_refused(deep: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(deep, monkeypatch, 1, *GPTQ)
    other = save_text(tmp_path / "other.json", seed=5)
    again = Workplace(deep.model, other, deep.evaluation, deep.out).quantize(*GPTQ, "--resume", run=detent)
    assert "another calibration data" in again.err
    os.utime(deep.model / "model.safetensors", (1, 1))
    again = deep.quantize(*GPTQ, "--resume", run=detent)
    assert "another file model.safetensors" in again.err
    assert again.code == 2


def test_of_another_version(deep: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(deep, monkeypatch, 1, *GPTQ)
    start = journal(deep) / "journal.json"
    content = json.loads(start.read_text("utf-8"))
    content["made_of"]["version of Detent"] = "0.0.1"
    start.write_text(json.dumps(content), "utf-8")
    again = deep.quantize(*GPTQ, "--resume", run=detent)
    assert again.code == 2
    assert "another version of Detent: 0.0.1 then" in again.err


def test_a_damaged_block_is_refused(deep: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(deep, monkeypatch, 3, *GPTQ)
    block = journal(deep) / "block-00000.safetensors"
    block.write_bytes(block.read_bytes()[:-8])
    again = deep.quantize(*GPTQ, "--resume", run=detent)
    assert again.code == 2
    assert "block-00000.safetensors: truncated or corrupt" in again.err
    assert not deep.out.exists()


def test_nothing_to_resume_starts_from_the_beginning(deep: Workplace) -> None:
    outcome = deep.quantize(*GPTQ, "--resume")
    assert deep.out.is_dir()
    assert "nothing to resume" in outcome.err


@pytest.mark.parametrize("scheme", ["w_mxfp4", "w_fp8_per_channel_static_a_fp8_per_token_dynamic"])
@pytest.mark.parametrize("after", [18, 26])
def test_without_data_it_goes_on_file_by_file(
    after: int, scheme: str, deep: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detent.runs.write.SHARD_SIZE", 20_000)
    flags = ("--skip_evaluation",)
    deep.quantize(*flags, scheme=scheme)
    wanted = {name: digest for name, digest in contents(deep.out).items() if name != "detent_report.json"}
    report = deep.report
    shutil.rmtree(deep.out)
    real, done = LayerStream.layer, []

    def layer(self: LayerStream, name: str, **more: Any) -> Any:
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(name)
        return real(self, name, **more)

    with monkeypatch.context() as patch:
        patch.setattr(LayerStream, "layer", layer)
        assert deep.quantize(*flags, scheme=scheme, run=detent).code == 130
    assert not deep.out.exists()
    assert "files are finished; pass resume" in deep.quantize(*flags, scheme=scheme, run=detent).err
    again: list[str] = []
    monkeypatch.setattr(LayerStream, "layer", lambda self, name, **m: (again.append(name), real(self, name, **m))[1])
    deep.quantize(*flags, "--resume", scheme=scheme)
    found = {name: digest for name, digest in contents(deep.out).items() if name != "detent_report.json"}
    found.pop("detent_manifest.json"), wanted.pop("detent_manifest.json")
    assert found == wanted
    assert deep.report["layers"] == report["layers"]
    assert deep.report["weights"] == report["weights"]
    assert len(set(again)) < len(report["layers"])
    assert not journal(deep).exists()


def test_nothing_is_kept_before_a_block_is_finished(deep: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(deep, monkeypatch, 0, *GPTQ)
    assert not journal(deep).exists()


def bytes_of(place: Workplace) -> dict[str, str]:
    return {name: digest for name, digest in contents(place.out).items() if name in RESULT}


@pytest.fixture
def whole(deep: Workplace, tmp_path: Path) -> dict[str, str]:
    """The result of a run that nothing disturbs."""
    other = Workplace(deep.model, deep.calibration, deep.evaluation, tmp_path / "whole")
    other.quantize(*GPTQ)
    return bytes_of(other)


def test_survives_a_disk_that_fills(deep: Workplace, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    real, files = journals.save_file, []

    def save_file(tensors: Any, path: Path, metadata: Any = None) -> None:
        files.append(path)
        if len(files) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(journals, "save_file", save_file)
        full = deep.quantize(*GPTQ, run=detent)
    assert full.code == 2
    assert "the disk is full" in full.err
    assert "2 blocks are kept" in full.err
    assert not deep.out.exists()
    deep.quantize(*GPTQ, "--resume")
    assert bytes_of(deep) == whole


def test_survives_a_shard_that_disappears_midway(
    deep: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_checkpoint(tmp_path / "sharded", small(num_hidden_layers=4), max_shard_size="100KB")
    place = Workplace(model, deep.calibration, deep.evaluation, deep.out)
    place.quantize(*GPTQ)
    whole = contents(place.out)["model.safetensors"]
    shutil.rmtree(place.out)
    real, done, last = BlockStream.finished, [], sorted(model.glob("model-*.safetensors"))[-1]

    def finished(self: BlockStream, name: str, *more: Any) -> None:
        real(self, name, *more)
        done.append(name)
        if len(done) == 2:
            last.rename(tmp_path / "away")

    with monkeypatch.context() as patch:
        patch.setattr(BlockStream, "finished", finished)
        lost = place.quantize(*GPTQ, run=detent)
    assert lost.code == 2
    assert last.name in lost.err
    assert not place.out.exists()
    (tmp_path / "away").rename(last)
    place.quantize(*GPTQ, "--resume")
    assert contents(place.out)["model.safetensors"] == whole


def test_a_run_killed_when_its_result_was_in_place(deep: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(journals.Journal, "remove", lambda self: self._workspace.close())
        deep.quantize(*GPTQ)
    assert journal(deep).is_dir()
    before = contents(deep.out)
    assert "exists and is not empty" in deep.quantize(*GPTQ, run=detent).err
    outcome = deep.quantize(*GPTQ, "--resume")
    assert "the run had finished" in outcome.err
    assert contents(deep.out) == before
    assert not journal(deep).exists()
    assert "the run had finished" in deep.quantize(*GPTQ, "--resume").err  # and without its journal
    assert contents(deep.out) == before
    other = deep.quantize(*GPTQ, "--num_calib_data", 3, "--resume", run=detent)
    assert other.code == 2
    assert "with another calibration data" in other.err
    assert contents(deep.out) == before
