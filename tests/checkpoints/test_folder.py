"""A checkpoint folder appears whole or not at all, and never at the cost of anything that was there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from checkpoints.toy import assert_same_tensor, toy_source
from detent.checkpoints import CheckpointWriter, Source, folder
from detent.errors import DetentError
from detent.external import output
from detent.external.interrupts import one_command
from detent.external.output import (
    MARKER_NAME,
    Workspace,
    add_to_manifest,
    check_replaceable,
    check_target,
    clear_leftovers,
)

CONFIG = {"model_type": "llama", "x": 1}
#: As safetensors words it.
FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


def write(out: Path, **options: Any) -> Path:
    with CheckpointWriter(out, **options) as writer:
        writer.add("a", torch.ones(3))
        return writer.finish(CONFIG)


def contents(path: Path) -> dict[str, bytes]:
    """Every file and folder below `path`, so that untouched can be told from restored."""
    return {
        str(p.relative_to(path)): p.read_bytes() if p.is_file() else b"" for p in sorted(path.rglob("*")) if p != path
    }


def test_single_file(tmp_path: Path) -> None:
    out = write(tmp_path / "deep" / "er" / "out")
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "detent_manifest.json", "model.safetensors"]
    assert json.loads((out / "config.json").read_text()) == CONFIG
    assert load_file(out / "model.safetensors")["a"].tolist() == [1, 1, 1]
    assert sorted(Source(out)) == ["a"]
    assert list(out.parent.iterdir()) == [out]


def test_permissions_are_the_usual_ones(tmp_path: Path) -> None:
    out = write(tmp_path / "out")
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "file").write_text("x")
    assert out.stat().st_mode == plain.stat().st_mode
    assert {path.stat().st_mode for path in out.iterdir()} == {(plain / "file").stat().st_mode}


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = {f"t{n}": torch.full((n,), float(n)) for n in (10, 20, 30, 1, 60, 2)}
    with CheckpointWriter(tmp_path / "out", max_shard_size=4 * 32) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.finish(CONFIG, metadata={"note": "n"})
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = index["weight_map"]
    assert index["metadata"]["total_size"] == 4 * sum(len(t) for t in tensors.values())
    assert list(files) == list(tensors)
    assert [int(files[name][6:11]) for name in tensors] == [1, 1, 2, 2, 3, 4]
    assert {file[-20:] for file in files.values()} == {"-of-00004.safetensors"[-20:]}
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == sorted(set(files.values()))
    source = Source(tmp_path / "out")
    assert source.metadata["note"] == "n"
    for name, tensor in tensors.items():
        assert_same_tensor(source.tensor(name), tensor, name)


def test_views_and_shared_memory(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    views = {"t": base.t(), "row": base[1], "base": base, "again": base, "scalar": torch.tensor(2.0), "none": base[:0]}
    with CheckpointWriter(tmp_path / "out") as writer:
        for name, tensor in views.items():
            writer.add(name, tensor.requires_grad_(False))
        writer.finish(CONFIG)
    for name, tensor in views.items():
        assert_same_tensor(Source(tmp_path / "out").tensor(name), tensor, name)


def test_a_name_once(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", max_shard_size=1) as writer:
        for name in ("a", "b"):
            writer.add(name, torch.ones(1))
        for name in ("a", "b"):
            with pytest.raises(DetentError, match="twice"):
                writer.add(name, torch.ones(1))


def test_other_files_come_along(tmp_path: Path) -> None:
    source = toy_source(tmp_path / "src")
    kept = {
        "tokenizer.json": "{}",
        "tokenizer.model": "x",
        "modeling_own.py": "code",
        "sub/chat_template.jinja": "t",
        "LICENSE": "l",
        ".gitattributes": "g",
    }
    left = {
        "pytorch_model.bin": "",
        "model.safetensors.index.json": "{}",
        "adapter.safetensors": "",
        "x.gguf": "",
        "original/consolidated.00.pth": "",
        ".git/config": "",
        "detent_manifest.json": "{}",
        "detent_report.json": "{}",
    }
    for name, text in {**kept, **left}.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    (source / "sub" / "inner").mkdir()
    (source / "sub" / "inner" / "vocab.txt").write_text("v")
    (source / "link.txt").symlink_to(source / "sub" / "inner" / "vocab.txt")
    out = write(tmp_path / "out", source=Source(source))
    found = {
        str(p.relative_to(out)): p.read_text() for p in out.rglob("*") if p.is_file() and p.suffix != ".safetensors"
    }
    del found["config.json"], found["detent_manifest.json"]
    assert found == {**kept, "sub/inner/vocab.txt": "v", "link.txt": "v"}
    assert not any(path.is_symlink() for path in out.rglob("*"))


def test_link_to_nothing(tmp_path: Path) -> None:
    source = toy_source(tmp_path / "src")
    (source / "tokenizer.json").symlink_to(tmp_path / "gone")
    with pytest.raises(DetentError, match=r"tokenizer\.json is a link to nothing"):
        write(tmp_path / "out", source=Source(source))
    assert list(tmp_path.iterdir()) == [source]


class TestLinks:
    """Nothing from outside of the source becomes part of an output that people upload."""

    def check(self, source: Path, name: str, out: Path, match: str) -> None:
        before = contents(out.parent)
        with pytest.raises(DetentError, match=f"{name} is a link to .*{match}"):
            check_target(out, source=source, overwrite=False)
        with pytest.raises(DetentError, match=f"{name} is a link to .*{match}"):
            write(out, source=Source(source))
        assert contents(out.parent) == before

    @pytest.mark.parametrize("name", ["notes.txt", "sub/deep/notes.txt", "model-extra.safetensors", "tokenizer.json"])
    def test_out_of_the_folder(self, name: str, tmp_path: Path) -> None:
        source = toy_source(tmp_path / "src")
        (tmp_path / "secret").write_text("key")
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).symlink_to(tmp_path / "secret")
        self.check(source, name, tmp_path / "out", "outside of the checkpoint folder")

    def test_by_way_of_another_link(self, tmp_path: Path) -> None:
        source = toy_source(tmp_path / "src")
        (source / ".cache").mkdir()
        (source / ".cache" / "way").symlink_to("/etc/hostname")
        (source / "vocab.txt").symlink_to(source / ".cache" / "way")
        self.check(source, "vocab.txt", tmp_path / "out", "outside")

    @pytest.mark.parametrize("target", ["/proc/self", "{}/src", "{}/elsewhere", "{}/src/sub"])
    def test_folders(self, target: str, tmp_path: Path) -> None:
        source = toy_source(tmp_path / "src")
        (source / "sub").mkdir()
        (tmp_path / "elsewhere").mkdir()
        (source / "linked").symlink_to(target.format(tmp_path))
        self.check(source, "linked", tmp_path / "out", "not followed")

    def test_cache_of_the_hub(self, tmp_path: Path) -> None:
        cache = tmp_path / "models--a--b"
        toy = toy_source(tmp_path / "toy")
        (toy / "tokenizer.json").write_text("{}")
        (cache / "blobs").mkdir(parents=True)
        snapshot = cache / "snapshots" / "0123"
        snapshot.mkdir(parents=True)
        for number, path in enumerate(sorted(toy.iterdir())):
            path.rename(cache / "blobs" / str(number))
            (snapshot / path.name).symlink_to(f"../../blobs/{number}")
        out = write(tmp_path / "out", source=Source(snapshot))
        assert (out / "tokenizer.json").read_text() == "{}"
        (tmp_path / "secret").write_text("key")
        (snapshot / "key.txt").symlink_to("../../../secret")
        with pytest.raises(DetentError, match="key.txt is a link"):
            write(tmp_path / "again", source=Source(snapshot))

    def test_pipes_and_what_cannot_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = toy_source(tmp_path / "src")
        os.mkfifo(source / "pipe.json")
        with pytest.raises(DetentError, match=r"pipe\.json is a pipe"):
            check_target(tmp_path / "out", source=source, overwrite=False)
        (source / "pipe.json").unlink()
        (source / "tokenizer.json").write_text("{}")
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "tokenizer.json")
        with pytest.raises(DetentError, match=r"tokenizer\.json: no permission to read it"):
            check_target(tmp_path / "out", source=source, overwrite=False)


class TestExistingFolder:
    """What happens to a folder that is there already."""

    def test_empty_one_is_used(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        assert sorted(Source(write(tmp_path / "out"))) == ["a"]

    def test_any_content_is_refused(self, tmp_path: Path) -> None:
        out = write(tmp_path / "out")
        before = contents(tmp_path)
        with pytest.raises(DetentError, match="overwrite"):
            write(out)
        assert contents(tmp_path) == before

    def test_ours_is_replaced(self, tmp_path: Path) -> None:
        out = write(tmp_path / "out")
        (out / "detent_report.json").write_text("{}")
        (out / "plots.html").write_text("x")
        add_to_manifest(out, "plots.html", "detent_report.json")
        with CheckpointWriter(out, overwrite=True) as writer:
            writer.add("b", torch.ones(1))
            writer.finish(CONFIG)
        assert sorted(Source(out)) == ["b"]
        assert sorted(p.name for p in out.iterdir()) == ["config.json", "detent_manifest.json", "model.safetensors"]
        assert list(tmp_path.iterdir()) == [out]

    @pytest.mark.parametrize("name", ["notes.txt", "sub/notes.txt", ".hidden"])
    def test_foreign_files_are_never_replaced(self, tmp_path: Path, name: str) -> None:
        out = write(tmp_path / "out")
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
        before = contents(tmp_path)
        with pytest.raises(DetentError, match=f"did not write .*{name}"):
            write(out, overwrite=True)
        assert contents(tmp_path) == before

    def test_foreign_links_are_never_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        out = write(tmp_path / "out")
        (out / "link").symlink_to(tmp_path / "data")
        with pytest.raises(DetentError, match="link"):
            check_replaceable(out, overwrite=True)

    @pytest.mark.parametrize("manifest", [None, "{", "[]", '{"files": 3}', '{"files": ["/etc/passwd"]}'])
    def test_without_a_good_manifest_everything_is_foreign(self, tmp_path: Path, manifest: str | None) -> None:
        out = write(tmp_path / "out")
        (out / "detent_manifest.json").unlink()
        if manifest is not None:
            (out / "detent_manifest.json").write_text(manifest)
        before = contents(tmp_path)
        with pytest.raises(DetentError, match="did not write"):
            write(out, overwrite=True)
        assert contents(tmp_path) == before

    def edited(self, out: Path, name: str, change: Any) -> None:
        change(out / name)
        before = contents(out.parent)
        with pytest.raises(DetentError, match=f"changed after Detent wrote them .*{name}"):
            write(out, overwrite=True)
        assert contents(out.parent) == before

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_edits_are_never_lost(self, name: str, tmp_path: Path) -> None:
        def flip(path: Path) -> None:
            data = bytearray(path.read_bytes())
            data[-3] ^= 1
            path.write_bytes(data)

        self.edited(write(tmp_path / "out"), name, flip)

    def test_edits_of_large_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(output, "DIGEST_BYTES", 100)
        out = write(tmp_path / "out")
        out = write(out, overwrite=True)
        self.edited(out, "model.safetensors", lambda path: os.utime(path, ns=(1, 1)))

    def test_links_in_place_of_files(self, tmp_path: Path) -> None:
        def link(path: Path) -> None:
            path.rename(tmp_path / "moved")
            path.symlink_to(tmp_path / "moved")

        self.edited(write(tmp_path / "out"), "config.json", link)

    def test_files_that_appear_while_writing(self, tmp_path: Path) -> None:
        with CheckpointWriter(tmp_path / "out") as writer:
            writer.add("a", torch.ones(1))
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "mine").write_text("x")
            with pytest.raises(DetentError, match="not empty"):
                writer.finish(CONFIG)
        assert contents(tmp_path) == {"out": b"", "out/mine": b"x"}

    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("mine")
        with pytest.raises(DetentError, match="is a file"):
            write(tmp_path / "out", overwrite=True)

    def test_empty_folders_are_somebodys(self, tmp_path: Path) -> None:
        (tmp_path / "out" / "sub").mkdir(parents=True)
        with pytest.raises(DetentError, match="holds folders"):
            write(tmp_path / "out")

    def test_a_link_leads_to_the_folder(self, tmp_path: Path) -> None:
        (tmp_path / "big").mkdir()
        (tmp_path / "out").symlink_to(tmp_path / "big")
        write(tmp_path / "out")
        assert sorted(Source(tmp_path / "big")) == ["a"]
        assert (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("place", ["src", "src/out", "src/../src", ".", "link"])
def test_source_and_output_are_apart(tmp_path: Path, place: str) -> None:
    source = Source(toy_source(tmp_path / "src"))
    (tmp_path / "link").symlink_to(tmp_path / "src")
    before = contents(tmp_path)
    with pytest.raises(DetentError, match="source checkpoint"):
        write(tmp_path / place, source=source, overwrite=True)
    assert contents(tmp_path) == before


def left(target: Path, purpose: str, content: str | None = None) -> Path:
    """What a killed run leaves: a marked folder that nobody holds."""
    workspace = Workspace(target, purpose)
    if content is not None:
        folder_there = workspace.path / "old" if purpose == "old" else workspace.path
        folder_there.mkdir(exist_ok=True)
        (folder_there / "content").write_text(content)
    workspace.close()
    return workspace.path


class TestLeftovers:
    """What a run that was killed has left, at the next run."""

    def test_unfinished_output_is_removed(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        path = left(out, "writing", "half")
        notices = check_target(out, source=None, overwrite=False)
        assert notices == [f"removed {path}, an unfinished output of an interrupted run"]
        assert contents(tmp_path) == {}

    def test_old_output_comes_back(self, tmp_path: Path) -> None:
        """Killed between the two renames of --overwrite."""
        out = write(tmp_path / "out")
        before = contents(tmp_path)
        path = left(out, "old")
        out.rename(path / "old")
        left(out, "writing", "half")
        with pytest.raises(DetentError, match="overwrite"):
            check_target(out, source=None, overwrite=False)
        assert contents(tmp_path) == before
        assert check_target(out, source=None, overwrite=True) == []

    def test_replaced_output_is_removed(self, tmp_path: Path) -> None:
        """Killed after the swap."""
        out = write(tmp_path / "out")
        left(out, "old", "old")
        before = contents(out)
        assert len(clear_leftovers(out)) == 1
        assert contents(tmp_path) == {"out": b"", **{f"out/{name}": data for name, data in before.items()}}

    @pytest.mark.parametrize("marker", [None, "", "{}", '{"written_by": "detent", "target": "other"}', "[" * 999])
    def test_what_is_not_proved_to_be_ours_stays(self, marker: str | None, tmp_path: Path) -> None:
        path = tmp_path / ".out.writing-abc"
        path.mkdir()
        (path / "thesis.tex").write_text("mine")
        if marker is not None:
            (path / MARKER_NAME).write_text(marker)
        before = contents(tmp_path)
        assert clear_leftovers(tmp_path / "out") == []
        assert contents(tmp_path) == before

    def test_another_run_is_at_work(self, tmp_path: Path) -> None:
        with CheckpointWriter(tmp_path / "out"), pytest.raises(DetentError, match="another run is writing to it"):
            check_target(tmp_path / "out", source=None, overwrite=True)
        assert contents(tmp_path) == {}

    def test_writer_alone(self, tmp_path: Path) -> None:
        left(tmp_path / "out", "writing", "half")
        write(tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_signals_wait_for_the_swap(self, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        out, rename = write(tmp_path / "out"), Path.rename

        def struck(self: Path, target: Path) -> Path:
            if out in (self, target):
                signal.raise_signal(number)
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", struck)
        with one_command():  # the command has its result, and ends as if nothing had been
            write(out, overwrite=True)
            signal.raise_signal(number)
        if number == signal.SIGINT:  # the caller of a library hears of it, after the swap
            with pytest.raises(KeyboardInterrupt):
                write(out, overwrite=True)
        monkeypatch.undo()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert sorted(Source(out)) == ["a"]


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("x" * 240, "at most 231 bytes"),
        ("a/" * 3000, "longer than the file system takes"),
        ("a\0b", "NUL"),
        ("a\udcffb", "not UTF-8"),
        ("~nobody-at-all/x", "no user 'nobody-at-all'"),
        ("circle/x", "circle"),
    ],
)
def test_impossible_targets(name: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    place = name if name.startswith("~") else f"{tmp_path}/{name}"
    with pytest.raises(DetentError, match=match):
        check_target(place, source=None, overwrite=False)


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert write(Path("~/out")) == tmp_path / "out"


class TestFailure:
    """Whatever fails, the old folder is as it was and nothing new lies around."""

    @pytest.fixture(params=["new", "overwrite"])
    def out(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        out = tmp_path / "out"
        if request.param == "overwrite":
            write(out)
        return out

    def attempt(self, out: Path, **options: Any) -> None:
        with CheckpointWriter(out, overwrite=True, **options) as writer:
            writer.add("b", torch.ones(1))
            writer.add("c", torch.ones(1))
            writer.finish(CONFIG)

    def check(self, out: Path, match: str, kind: type[BaseException] = DetentError, **options: Any) -> None:
        before = contents(out.parent)
        with pytest.raises(kind, match=match):
            self.attempt(out, **options)
        assert contents(out.parent) == before

    def test_disk_full_while_writing_weights(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(tensors: Any, path: Path, metadata: Any) -> None:
            path.write_bytes(b"half")
            raise SafetensorError(FULL)

        monkeypatch.setattr(folder, "save_file", full)
        self.check(out, "the disk is full .*nothing was written", max_shard_size=1)

    def test_disk_full_while_copying(self, out: Path, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*paths: Path) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        source = toy_source(tmp_path_factory.mktemp("elsewhere") / "src")
        (source / "tokenizer.json").write_text("{}")
        monkeypatch.setattr(shutil, "copyfile", full)
        self.check(out, "the disk is full", source=Source(source))

    def test_last_rename(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rename = Path.rename

        def refuse(self: Path, target: Path) -> Path:
            if "writing" in self.name:
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", refuse)
        self.check(out, "cannot be written .Permission denied")

    def test_interrupted(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt("Ctrl-C")

        monkeypatch.setattr(folder, "save_file", interrupt)
        self.check(out, "Ctrl-C", KeyboardInterrupt)

    def test_without_finish(self, out: Path) -> None:
        before = contents(out.parent)
        with CheckpointWriter(out, overwrite=True, max_shard_size=1) as writer:
            writer.add("b", torch.ones(1))
            writer.add("c", torch.ones(1))
        assert contents(out.parent) == before

    def test_new_parents_go_too(self, tmp_path: Path) -> None:
        with CheckpointWriter(tmp_path / "x" / "y" / "out"):
            assert (tmp_path / "x" / "y").is_dir()
        assert contents(tmp_path) == {}

    def test_unwritable_place(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(DetentError, match="cannot be written"):
            write(tmp_path / "file" / "out")
