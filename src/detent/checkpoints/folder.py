"""Writing a checkpoint folder whole or not at all.

Everything goes into a temporary folder beside the target; `finish` renames it. Until then the target is untouched, and
whatever goes wrong (an error, a full disk, Ctrl-C) leaves it so. A manifest in the folder lists what Detent wrote, and
only a folder that holds nothing else is ever replaced.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from detent.checkpoints.source import CONFIG_NAME, INDEX_NAME, PICKLE_SUFFIXES, SINGLE_NAME, Source
from detent.errors import DetentError

#: Lists the files that Detent wrote into the folder, by path relative to it.
MANIFEST_NAME = "detent_manifest.json"
MAX_SHARD_SIZE = 5_000_000_000

#: Weights, whatever their format: the output has its own.
_WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json", *PICKLE_SUFFIXES)
#: What describes the source's own state rather than the model.
_STALE_NAMES = (
    CONFIG_NAME,
    MANIFEST_NAME,
    "detent_report.json",
    "quantize_config.json",
    "quantization_config.json",
    "hf_quant_config.json",
)
_SKIPPED_FOLDERS = (".git", ".cache", "__pycache__")


class CheckpointWriter:
    """Streams tensors into a checkpoint folder.

    ::

        with CheckpointWriter("out", source=source) as writer:
            writer.add("model.norm.weight", tensor)
            writer.finish(config)

    Tensors are held until a shard is full, so memory needs `max_shard_size` bytes beside the model. Leaving the block
    without `finish` leaves nothing behind.

    Args:
        out_dir: the folder to appear; its parents are made. A symbolic link is followed.
        source: where tokenizer, generation config, remote code and all other files that aren't weights are copied from;
            None copies nothing.
        overwrite: replace an existing folder, if Detent wrote everything in it.
        max_shard_size: bytes above which a further safetensors file is begun.

    Raises:
        DetentError: the folder exists and isn't empty (or, with `overwrite`, holds something Detent didn't write); it
            lies in the source folder or the other way round; it can't be written; the disk is full.
    """

    def __init__(
        self,
        out_dir: str | Path,
        *,
        source: Source | None = None,
        overwrite: bool = False,
        max_shard_size: int = MAX_SHARD_SIZE,
    ) -> None:
        self.out_dir = Path(out_dir).resolve()
        self.max_shard_size = max_shard_size
        self._source = source
        self._overwrite = overwrite
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[dict[str, int]] = []
        if source is not None:
            _check_apart(self.out_dir, source.path.resolve())
        check_replaceable(self.out_dir, overwrite=overwrite)
        self._made_parents = _missing_parents(self.out_dir)
        with _clear_errors(self.out_dir):
            self.out_dir.parent.mkdir(parents=True, exist_ok=True)
            self._temporary = Path(tempfile.mkdtemp(prefix=f".{self.out_dir.name}.writing-", dir=self.out_dir.parent))

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove whatever `finish` didn't make final."""
        self._pending.clear()
        if self._temporary.exists():
            shutil.rmtree(self._temporary, ignore_errors=True)
        if not self.out_dir.exists():
            for parent in self._made_parents:
                if parent.exists() and not any(parent.iterdir()):
                    parent.rmdir()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write `tensor`, from any device, under `name`; it is held, not copied, until its shard is written."""
        if name in self._pending or any(name in shard for shard in self._shards):
            raise DetentError(f"tensor {name!r} was added to the checkpoint twice")
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_shard_size:
            self._write_shard({})
        self._pending[name] = tensor.detach().cpu()
        self._pending_bytes += size

    def finish(
        self,
        config: dict[str, Any],
        *,
        metadata: dict[str, str] | None = None,
        files: dict[str, str] | None = None,
        check: Callable[[Path], None] | None = None,
    ) -> Path:
        """Write the rest and make the folder appear.

        Args:
            config: the content of config.json.
            metadata: strings for the header of the last safetensors file.
            files: further text files, by name.
            check: looks at the finished folder before it takes its place; what it raises keeps that from happening.

        Returns:
            The folder.
        """
        # The last shard is written here, never by `add`, so that it can carry what is known only at the end.
        self._write_shard(metadata or {})
        with _clear_errors(self.out_dir):
            self._name_shards()
            if self._source is not None:
                for relative, path in files_to_copy(self._source.path):
                    target = self._temporary / relative
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)
            for name, text in (files or {}).items():
                (self._temporary / name).write_text(text, encoding="utf-8")
            _write_json(self._temporary / CONFIG_NAME, config)
            _write_json(self._temporary / MANIFEST_NAME, {"written_by": "detent", "files": _files_in(self._temporary)})
            self._set_permissions()
        with _clear_errors(self.out_dir):
            if check is not None:
                check(self._temporary)
            self._replace()
        return self.out_dir

    def _write_shard(self, metadata: dict[str, str]) -> None:
        path = self._temporary / f"shard-{len(self._shards)}.safetensors"
        with _clear_errors(self.out_dir):
            save_file(_separate(self._pending), path, metadata={"format": "pt", **metadata})
        self._shards.append({name: t.numel() * t.element_size() for name, t in self._pending.items()})
        self._pending, self._pending_bytes = {}, 0

    def _name_shards(self) -> None:
        count = len(self._shards)
        if count == 1:
            (self._temporary / "shard-0.safetensors").rename(self._temporary / SINGLE_NAME)
            return
        weight_map = {}
        for number, shard in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (self._temporary / f"shard-{number}.safetensors").rename(self._temporary / file)
            weight_map.update(dict.fromkeys(shard, file))
        total = sum(size for shard in self._shards for size in shard.values())
        _write_json(self._temporary / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def _set_permissions(self) -> None:
        """The usual ones: temporary folders, and files that safetensors writes, are for their owner alone."""
        mask = _umask()
        self._temporary.chmod(0o777 & ~mask)
        for path in self._temporary.glob("*.safetensors"):
            path.chmod(0o666 & ~mask)

    def _replace(self) -> None:
        """Put the temporary folder in the target's place. The old one is moved aside, and comes back on failure."""
        check_replaceable(self.out_dir, overwrite=self._overwrite)  # hours may have passed since the first look
        if not self.out_dir.exists():
            self._temporary.rename(self.out_dir)
            return
        aside = Path(tempfile.mkdtemp(prefix=f".{self.out_dir.name}.old-", dir=self.out_dir.parent))
        old = aside / "old"
        try:
            self.out_dir.rename(old)
            self._temporary.rename(self.out_dir)
        except BaseException:
            if old.exists() and not self.out_dir.exists():
                old.rename(self.out_dir)
            aside.rmdir()
            raise
        shutil.rmtree(aside, ignore_errors=True)


def check_target(out_dir: str | Path, *, source: str | Path, overwrite: bool) -> None:
    """All that can be said in advance about writing what is made of `source` to `out_dir`: called before long work.

    Raises:
        DetentError: as `CheckpointWriter`.
    """
    path = Path(out_dir).resolve()
    _check_apart(path, Path(source).resolve())
    check_replaceable(path, overwrite=overwrite)
    parent = next(folder for folder in path.parents if folder.exists())
    if not parent.is_dir():
        raise DetentError(f"{parent} is a file, so there can be no folder {path}; name another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise DetentError(f"{path}: cannot be written (no permission to write in {parent}); name another folder")


def check_replaceable(out_dir: str | Path, *, overwrite: bool) -> None:
    """Raise DetentError unless a checkpoint may be written at `out_dir`."""
    path = Path(out_dir)
    if not path.exists():
        return
    if not path.is_dir():
        raise DetentError(f"{path} is a file; name a folder to write into")
    present = _files_in(path)
    if not present:
        if any(path.iterdir()):
            raise DetentError(f"{path} exists and holds folders; name another folder")
        return
    if not overwrite:
        raise DetentError(f"{path} exists and is not empty; name another folder, or replace it with --overwrite")
    ours = _manifest(path)
    foreign = [name for name in present if name not in ours]
    if foreign:
        raise DetentError(
            f"{path} holds files that Detent did not write ({', '.join(foreign[:3])}{', ...' * (len(foreign) > 3)}),"
            " so it is not overwritten; move them away or name another folder"
        )


def add_to_manifest(folder: str | Path, *names: str) -> None:
    """Note that Detent wrote `names` (relative to `folder`) into a finished checkpoint; it can still be overwritten."""
    path = Path(folder) / MANIFEST_NAME
    with _clear_errors(Path(folder)):
        _write_json(path, {"written_by": "detent", "files": sorted(_manifest(Path(folder)) | set(names))})


def files_to_copy(source: Path) -> Iterator[tuple[Path, Path]]:
    """(path relative to `source`, path) of every file that goes along with the weights. Links are followed.

    Raises:
        DetentError: a link leads nowhere.
    """
    seen: set[Path] = set()  # a link to a folder above it would lead in circles
    for folder, folders, names in os.walk(source, followlinks=True):
        if (real := Path(folder).resolve()) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS)
        for name in sorted(names):
            path = Path(folder) / name
            if name.endswith(_WEIGHT_SUFFIXES) or name in _STALE_NAMES:
                continue
            if not path.exists():
                raise DetentError(f"{path} is a link to nothing; remove it, or download the checkpoint again")
            if path.is_file():
                yield path.relative_to(source), path


def _check_apart(out_dir: Path, source: Path) -> None:
    if out_dir == source:
        raise DetentError(f"{out_dir} is the source checkpoint itself; name another folder to write into")
    if source in out_dir.parents:
        raise DetentError(f"{out_dir} lies inside the source checkpoint {source}; name a folder outside it")
    if out_dir in source.parents:
        raise DetentError(f"{out_dir} contains the source checkpoint {source}; name another folder to write into")


def _missing_parents(path: Path) -> list[Path]:
    """The parents of `path` that don't exist, the innermost first."""
    return [parent for parent in path.parents if not parent.exists()]


def _files_in(folder: Path) -> list[str]:
    """Everything in `folder` that isn't a real folder (links count as files), relative and sorted."""
    found = []
    for path, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(path) / name).is_symlink()]
        found += [(Path(path) / name).relative_to(folder).as_posix() for name in names + links]
    return sorted(found)


def _manifest(folder: Path) -> set[str]:
    """The files in `folder` that Detent says it wrote; none without a readable manifest."""
    path = folder / MANIFEST_NAME
    if path.is_symlink() or not path.is_file():
        return set()
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {MANIFEST_NAME, "detent_report.json", *map(str, files)}
    except (ValueError, KeyError, TypeError):
        return set()


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, contiguous, none sharing memory with another (safetensors refuses those that do)."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        seen.add(storage.data_ptr())
        separate[name] = tensor
    return separate


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@contextmanager
def _clear_errors(out_dir: Path) -> Iterator[None]:
    """Failures of the file system as one clear message; safetensors reports them as text with the errno in it."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise _write_failure(out_dir, OSError(int(number[1]), os.strerror(int(number[1])))) from error
    except OSError as error:
        raise _write_failure(out_dir, error) from error


def _write_failure(out_dir: Path, error: OSError) -> DetentError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DetentError(
            f"{out_dir.parent}: the disk is full ({error.strerror}); nothing was written to {out_dir}."
            " Free some space or name a folder on another disk"
        )
    if error.errno == errno.EBUSY:
        return DetentError(f"{out_dir} cannot be replaced (is it a mount point?); name a folder inside it")
    return DetentError(f"{out_dir}: cannot be written ({error.strerror or error}); nothing was left there")
