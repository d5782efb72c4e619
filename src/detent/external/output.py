"""Output folders: where one may be written, what is in it, and what an interrupted run has left next to it.

A folder is made under a hidden name next to its target (`Workspace`), and renamed once it is complete. A marker inside
says whose it is, and is locked as long as its process lives: what a killed run has left is recognized by the marker
without a lock, and cleaned up by the next run. A manifest lists what Detent wrote, with sizes and digests, and
only a folder that holds nothing else is ever replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from detent.errors import DetentError
from detent.external.files import (
    check_as,
    is_folder,
    names_in,
    parse_json,
    read_as,
    read_bytes,
    status,
    unreadable,
    user_path,
)
from detent.external.schemas import Manifest, Unfinished, WrittenFile

#: Lists the files that Detent wrote into the folder, by path relative to it.
MANIFEST_NAME = "detent_manifest.json"
#: Marks a folder that Detent is still writing, or has moved aside.
MARKER_NAME = ".detent_unfinished.json"
#: The manifest of a result that is about to take its place, in the journal of its run.
DONE_NAME = "done.json"
#: Folders of a source that don't go along.
SKIPPED_FOLDERS = (".git", ".cache", "__pycache__")
#: Files up to this size are known by a digest; larger ones, which would take long to read, by their time of change.
DIGEST_BYTES = 1 << 26
#: Room for what `Workspace` puts around the name of its target.
_AFFIXES = 24


# ---- where a folder may be written ----------------------------------------------------------------------------------


def target_path(out_dir: str | os.PathLike[str]) -> Path:
    """Where an output folder is to appear: absolute, ``~`` expanded, links followed.

    Raises:
        DetentError: as `user_path`; or the name is too long.
    """
    path = Path(os.path.realpath(user_path(out_dir)))
    longest = 255 - _AFFIXES
    if len(os.fsencode(path.name)) > longest:
        raise DetentError(
            f"{path.name[:60]}...: the name of an output folder has at most {longest} bytes; choose another"
        )
    status(path)  # a path that is too long, or links in a circle
    return path


def check_target(out_dir: str | os.PathLike[str], *, source: Path | None, overwrite: bool) -> list[str]:
    """Check in advance whether what is made from `source` can be written to `out_dir`: called before long work.
    What an interrupted run left there is cleaned up first.

    Args:
        out_dir: the folder to appear.
        source: the checkpoint that it is made of; None where it isn't here yet.
        overwrite: whether a folder that Detent wrote may be replaced.

    Returns:
        What the user should be told.

    Raises:
        DetentError: the folder exists and may not be replaced, can't be written, or is inside the source or around
            it; a link in the source leads out of it; another run is writing there.
    """
    path = target_path(out_dir)
    if source is not None:
        check_apart(path, Path(os.path.realpath(source)))
        for _ in source_files(source):
            pass
    notices = clear_leftovers(path)
    check_replaceable(path, overwrite=overwrite)
    parent = next(folder for folder in path.parents if status(folder) is not None)
    if not parent.is_dir():
        raise DetentError(f"{parent} is a file, so the folder {path} cannot be created; name another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise DetentError(f"{path}: cannot be written (no permission to write in {parent}); name another folder")
    return notices


def check_room(out_dir: str | os.PathLike[str], size: int) -> None:
    """Raise DetentError unless the disk of an output folder has `size` bytes left."""
    path = target_path(out_dir)
    parent = next(folder for folder in path.parents if status(folder) is not None)
    free = shutil.disk_usage(parent).free
    if free < size:
        raise DetentError(
            f"{parent}: the run needs about {size / 1e9:.1f} GB of disk there, and {free / 1e9:.1f} GB are free; free"
            " some, or name a folder on another disk"
        )


def check_apart(out_dir: Path, source: Path) -> None:
    """Raise DetentError where one of two real paths is inside the other."""
    if out_dir == source:
        raise DetentError(f"{out_dir} is the source checkpoint itself; name another folder to write into")
    if source in out_dir.parents:
        raise DetentError(f"{out_dir} is inside the source checkpoint {source}; name a folder outside it")
    if out_dir in source.parents:
        raise DetentError(f"{out_dir} contains the source checkpoint {source}; name another folder to write into")


def check_replaceable(out_dir: str | Path, *, overwrite: bool) -> None:
    """Raise DetentError unless a checkpoint may be written at `out_dir`: nothing is there, or an empty folder, or, with
    `overwrite`, a folder in which all is as Detent wrote it."""
    path = Path(out_dir)
    found = status(path)
    if found is None:
        return
    if not stat.S_ISDIR(found.st_mode):
        raise DetentError(f"{path} is a file; name a folder to write into")
    present = [name for name in files_in(path) if name != MARKER_NAME]
    if not present:
        if any(name != MARKER_NAME for name in names_in(path)):
            raise DetentError(f"{path} exists and holds folders; name another folder")
        return
    if not overwrite:
        raise DetentError(f"{path} exists and is not empty; name another folder, or allow overwrite to replace it")
    ours = _manifest(path)
    foreign = [name for name in present if name not in ours and (name != MANIFEST_NAME or not ours)]
    changed = [name for name in present if name in ours and not _as_written(path / name, ours[name])]
    for names, what in ((foreign, "that Detent did not write"), (changed, "that were changed after Detent wrote them")):
        if names:
            raise DetentError(
                f"{path} holds files {what} ({', '.join(names[:3])}{', ...' * (len(names) > 3)}), so it is not"
                " overwritten; move them away or name another folder"
            )


# ---- what a folder holds --------------------------------------------------------------------------------------------


def files_in(folder: Path) -> list[str]:
    """Everything in `folder` that isn't a real folder (links count as files), relative and sorted.

    Raises:
        DetentError: a folder in it can't be listed.
    """
    found = []
    for path, folders, names in _walk(folder):
        links = [name for name in folders if (path / name).is_symlink()]
        found += [(path / name).relative_to(folder).as_posix() for name in names + links]
    return sorted(found)


def _walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    def refuse(error: OSError) -> None:
        raise unreadable(error.filename or folder, error) from error

    for path, folders, names in os.walk(folder, onerror=refuse):
        yield Path(path), folders, names


def source_files(source: Path) -> Iterator[tuple[Path, Path]]:
    """(path relative to `source`, path) of every file of a checkpoint. Links to files are followed as long as they stay
    in it; in the hub's cache they lead to ``blobs``.

    Raises:
        DetentError: a link leads out of the folder, to a folder or nowhere; a file or folder can't be read, or is a
            pipe or device.
    """
    root = Path(os.path.realpath(source))
    allowed = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    for folder, folders, names in _walk(source):
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS)
        for name in [*folders, *sorted(names)]:
            _check_link(folder / name, allowed)
        for name in sorted(names):
            path = folder / name
            found = status(path)
            if found is None or not stat.S_ISREG(found.st_mode):
                raise DetentError(f"{path} is a pipe or a device, not a file; remove it")
            if not os.access(path, os.R_OK):
                raise DetentError(f"{path}: no permission to read it; change its permissions, or move it away")
            yield path.relative_to(source), path


def _check_link(path: Path, allowed: list[Path]) -> None:
    if not path.is_symlink():
        return
    if status(path) is None:
        raise DetentError(f"{path} is a link to nothing; remove it, or download the checkpoint again")
    real = Path(os.path.realpath(path))
    if real.is_dir():
        raise DetentError(f"{path} is a link to the folder {real}, which is not followed; put a copy in its place")
    if not any(folder in real.parents for folder in allowed):
        raise DetentError(
            f"{path} is a link to {real}, outside of the checkpoint folder, and is not followed: what it leads to would"
            " become part of the output; put a copy in its place, or remove it"
        )


def write_manifest(folder: Path, files: dict[str, WrittenFile] | None = None) -> None:
    """Note that Detent wrote all files that are now in `folder`, or `files`. Raises OSError."""
    if files is None:
        names = [name for name in files_in(folder) if name not in (MARKER_NAME, MANIFEST_NAME)]
        files = {name: _described(folder / name) for name in names}
    written = Manifest(written_by="detent", files=files).model_dump(exclude_none=True)
    (folder / MANIFEST_NAME).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def add_to_manifest(folder: str | Path, *names: str) -> None:
    """Note that Detent wrote `names` (relative to `folder`) into a finished checkpoint; it can still be overwritten.
    Raises OSError."""
    path = Path(folder)
    write_manifest(path, _manifest(path) | {name: _described(path / name) for name in names})


def _manifest(folder: Path) -> dict[str, WrittenFile]:
    """The files in `folder` that Detent says it wrote; none without a readable manifest."""
    path = folder / MANIFEST_NAME
    if path.is_symlink():
        return {}
    try:
        return read_as(Manifest, path).files
    except DetentError:
        return {}


def _described(path: Path) -> WrittenFile:
    found = path.stat()
    if found.st_size > DIGEST_BYTES:
        return WrittenFile(size=found.st_size, mtime_ns=found.st_mtime_ns)
    return WrittenFile(size=found.st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def _as_written(path: Path, written: WrittenFile) -> bool:
    found = status(path)
    if path.is_symlink() or found is None or not stat.S_ISREG(found.st_mode) or found.st_size != written.size:
        return False
    if written.sha256 is None:
        return found.st_mtime_ns == written.mtime_ns
    return hashlib.sha256(read_bytes(path, limit=written.size)).hexdigest() == written.sha256


# ---- while a folder is written --------------------------------------------------------------------------------------


def empty_folder(folder: Path, *, but: Collection[str]) -> None:
    """Remove what is in a folder of Detent's own, but for the names in `but`. Raises OSError."""
    for path in folder.iterdir():
        if path.name not in but:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


class Workspace:
    """A folder under a hidden name next to its target, marked as Detent's and locked until `close`.

    Args:
        target: the folder that it is for; its parent exists.
        purpose: ``writing``: what is to take its place; ``old``: what must make room for that; ``journal``: what a
            later run can go on from, always at the same place.

    Raises:
        OSError: it can't be made.
        DetentError: another run has it.
    """

    def __init__(self, target: Path, purpose: str) -> None:
        if purpose == "journal":
            self.path = journal_path(target)
            self.path.mkdir(exist_ok=True)
        else:
            self.path = Path(tempfile.mkdtemp(prefix=f".{target.name}.{purpose}-", dir=target.parent))
        # Locked before it has any content: a marker with content and without a lock is that of a killed run.
        self._marker = os.open(self.path / MARKER_NAME, os.O_CREAT | os.O_RDWR, 0o666)
        if not _lock(self._marker) and purpose == "journal" and os.name == "posix":
            self.close()
            raise _busy(target, self.path)
        os.write(self._marker, json.dumps({"written_by": "detent", "target": target.name}).encode())

    def close(self) -> None:
        """Let go of the marker, which stays."""
        if self._marker >= 0:
            os.close(self._marker)
        self._marker = -1

    def remove(self) -> None:
        """Remove the folder, if it is still under its hidden name."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)


def _lock(file: int) -> bool:
    """Lock an open file for this process; False where another holds it."""
    try:
        import fcntl
    except ImportError:  # Windows: every marker counts as one in use, and nothing is removed
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def clear_leftovers(target: Path) -> list[str]:
    """Clean up what interrupted runs have left next to `target`; returns what was done, one message each.

    An unfinished output is removed. An earlier output that was moved aside comes back where nothing took its place.

    Raises:
        DetentError: another run is writing there at this moment.
    """
    if not is_folder(target.parent):
        return []
    notices = []
    for name in names_in(target.parent):
        if not name.startswith((f".{target.name}.writing-", f".{target.name}.old-")):
            continue
        path = target.parent / name
        if _is_left_by_killed_run(path, target):
            old = path / "old"
            if old.is_dir() and not target.exists():
                old.rename(target)
                notices.append(f"put back {target}, which an interrupted run had moved aside to replace it")
            else:
                what = "the replaced" if old.is_dir() else "an unfinished"
                notices.append(f"removed {path}, {what} output of an interrupted run")
            shutil.rmtree(path, ignore_errors=True)
    return notices


def _is_left_by_killed_run(path: Path, target: Path) -> bool:
    """Whether a folder is Detent's, for this target, and no process is writing to it."""
    marker = path / MARKER_NAME
    if path.is_symlink() or marker.is_symlink() or not marker.is_file():
        return False
    try:
        found = check_as(Unfinished, parse_json(read_bytes(marker), str(marker)), str(marker))
    except DetentError:
        return False  # another program's, or that of a run that is just starting
    if found.target != target.name:
        return False
    with marker.open("rb") as file:
        free = _lock(file.fileno())
    if not free:
        raise _busy(target, path)
    return True


def _busy(target: Path, path: Path) -> DetentError:
    return DetentError(f"{target}: another run is writing to it, in {path}; wait for it, or name another folder")


def journal_path(target: Path) -> Path:
    """Where a run that writes to `target` keeps what a later one can go on from."""
    return target.parent / f".{target.name}.journal"


def may_be_finished(out_dir: str | os.PathLike[str]) -> bool:
    """Whether what is to be resumed may have run to its end: its result is in place, and no work is left over. A run
    that is killed at its very end leaves its journal, with a mark."""
    path = target_path(out_dir)
    journal, manifest = journal_path(path), path / MANIFEST_NAME
    if not manifest.is_file():
        return False
    ours = journal / DONE_NAME
    return not is_journal(journal) or (ours.is_file() and read_bytes(ours) == read_bytes(manifest))


def is_journal(path: Path) -> bool:
    """Whether a folder is Detent's journal."""
    marker = path / MARKER_NAME
    return path.is_dir() and not path.is_symlink() and marker.is_file() and not marker.is_symlink()
