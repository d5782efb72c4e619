"""Writing a checkpoint folder whole or not at all.

Everything goes into a temporary folder next to the target (`detent.external.output`); `finish` renames it. Until then
the target is untouched, and whatever goes wrong (an error, a full disk, Ctrl-C) leaves it so. A manifest in the folder
lists what Detent wrote, and only a folder that holds nothing else is ever replaced.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from detent.checkpoints.source import INDEX_NAME, PICKLE_SUFFIXES, SINGLE_NAME, Source
from detent.errors import DetentError
from detent.external.files import placed, read_as, to_disk, unreadable
from detent.external.interrupts import shielded
from detent.external.model_folder import CONFIG_NAME
from detent.external.output import (
    MANIFEST_NAME,
    MARKER_NAME,
    Workspace,
    check_apart,
    check_replaceable,
    clear_leftovers,
    empty_folder,
    source_files,
    target_path,
    write_manifest,
)
from detent.external.schemas import FinishedShards

_log = logging.getLogger(__name__)

MAX_SHARD_SIZE = 5_000_000_000

#: Weights, whatever their format: the output has its own.
_WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json", *PICKLE_SUFFIXES)
#: What describes the source's own state rather than the model.
_STALE_NAMES = (
    CONFIG_NAME,
    MANIFEST_NAME,
    MARKER_NAME,
    "detent_report.json",
    "quantize_config.json",
    "quantization_config.json",
    "hf_quant_config.json",
)


#: What a folder that is kept for a later run says of its files.
PROGRESS_NAME = "shards.json"


class CheckpointWriter:
    """Streams tensors into a checkpoint folder.

    ::

        with CheckpointWriter("out", source=source) as writer:
            writer.add("model.norm.weight", tensor)
            writer.finish(config)

    Tensors are held until a shard is full, so memory needs `max_shard_size` bytes besides the model. Leaving the block
    without `finish` leaves nothing behind.

    Args:
        out_dir: the folder to appear; its parents are made. A symbolic link is followed.
        source: where tokenizer, generation config, remote code and all other files that aren't weights are copied from;
            None copies nothing.
        overwrite: replace an existing folder, if Detent wrote everything in it.
        max_shard_size: bytes above which a further safetensors file is begun.
        progress: a folder to write into until the end, which stays if the run ends before: another writer then has the
            files that were finished there. None: a temporary one.

    Raises:
        DetentError: the folder exists and isn't empty (or, with `overwrite`, holds something that isn't as Detent wrote
            it); one of it and the source folder contains the other; it can't be written; the disk is full; a link in
            the source leads out of it; another run is writing there.
    """

    def __init__(
        self,
        out_dir: str | Path,
        *,
        source: Source | None = None,
        overwrite: bool = False,
        max_shard_size: int = MAX_SHARD_SIZE,
        progress: Path | None = None,
    ) -> None:
        self.out_dir = target_path(out_dir)
        self.max_shard_size = max_shard_size
        self._source = source
        self._overwrite = overwrite
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[dict[str, int]] = []
        #: {tensor name: `digest` of what was written}
        self.digests: dict[str, int] = {}
        if source is not None:
            check_apart(self.out_dir, source.path.resolve())
        for notice in clear_leftovers(self.out_dir):
            _log.warning(notice)
        check_replaceable(self.out_dir, overwrite=overwrite)
        self._made_parents = missing_parents(self.out_dir)
        with clear_errors(self.out_dir):
            self.out_dir.parent.mkdir(parents=True, exist_ok=True)
            self._workspace = Workspace(self.out_dir, "writing") if progress is None else None
        self._temporary = self._resumed(progress) if self._workspace is None else self._workspace.path

    def _resumed(self, folder: Path | None) -> Path:
        """The folder of an unfinished run, with the shards that it finished and nothing else."""
        assert folder is not None
        log = folder / PROGRESS_NAME
        shards = read_as(FinishedShards, log).shards if log.exists() else []
        for index, shard in enumerate(shards):
            if not (folder / f"shard-{index}.safetensors").exists():
                break
            self._shards.append(shard.sizes)
            self.digests |= shard.digests
        with clear_errors(self.out_dir):
            folder.mkdir(exist_ok=True)
            shards_kept = [f"shard-{number}.safetensors" for number in range(len(self._shards))]
            empty_folder(folder, but=[PROGRESS_NAME, *shards_kept])
        return folder

    def has(self, names: Iterable[str]) -> bool:
        """Whether tensors are in files that are finished."""
        return all(name in self.digests for name in names)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove whatever `finish` didn't make final."""
        self._pending.clear()
        if self._workspace is not None:
            self._workspace.remove()
            remove_empty(self._made_parents)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write `tensor`, from any device, under `name`; it is held, not copied, until its shard is written."""
        written = self.has([name])
        if written and self._workspace is None:
            return  # by the run that this one goes on with
        if written or name in self._pending:
            raise DetentError(f"tensor {name!r} was added to the checkpoint twice")
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_shard_size:
            self._write_shard({})
        self._pending[name] = tensor.detach().cpu()
        self._pending_bytes += size

    @property
    def nbytes(self) -> int:
        """The size of all tensors in bytes."""
        return sum(size for shard in self._shards for size in shard.values())

    def finish(self, config: dict[str, Any], **more: Any) -> Path:
        """`close`, with its arguments, and `commit`."""
        self.close(config, **more)
        return self.commit()

    def close(
        self,
        config: dict[str, Any],
        *,
        metadata: dict[str, str] | None = None,
        files: dict[str, str] | None = None,
    ) -> Path:
        """Write the rest; the folder is then whole, but still under its temporary name.

        Args:
            config: the content of config.json.
            metadata: strings for the header of the last safetensors file.
            files: further text files, by name.

        Returns:
            The temporary folder.
        """
        # The last shard is written here, never by `add`, so that it can carry what is known only at the end.
        self._write_shard(metadata or {})
        with clear_errors(self.out_dir):
            self._name_shards()
            if self._source is not None:
                for relative, path in files_to_copy(self._source.path):
                    target = self._temporary / relative
                    target.parent.mkdir(parents=True, exist_ok=True)
                    _copy(path, target)
            for name, text in (files or {}).items():
                (self._temporary / name).write_text(text, encoding="utf-8")
            _write_json(self._temporary / CONFIG_NAME, config)
            (self._temporary / PROGRESS_NAME).unlink(missing_ok=True)
            write_manifest(self._temporary)
            set_permissions(self._temporary)
        return self._temporary

    @contextmanager
    def examined(self) -> Iterator[None]:
        """For a look at the folder between `close` and `commit`: errors name it as the user did, not the hidden one."""
        try:
            with clear_errors(self.out_dir):
                yield
        except DetentError as error:
            message = str(error).replace(str(self._temporary), str(self.out_dir))
            raise DetentError(f"{message}; nothing was written to {self.out_dir}") from error

    def commit(self) -> Path:
        """Put the folder in its place; returns it."""
        with clear_errors(self.out_dir):
            self._replace()
        return self.out_dir

    def _write_shard(self, metadata: dict[str, str]) -> None:
        path = self._temporary / f"shard-{len(self._shards)}.safetensors"
        tensors = unshared(self._pending)
        self.digests |= {name: digest(tensor) for name, tensor in tensors.items()}
        with clear_errors(self.out_dir):
            save_file(tensors, path, metadata={"format": "pt", **metadata})
            _sort_metadata(path)
        self._shards.append({name: t.numel() * t.element_size() for name, t in self._pending.items()})
        self._pending, self._pending_bytes = {}, 0
        if self._workspace is None and not metadata:
            shards = [{"sizes": sizes, "digests": {n: self.digests[n] for n in sizes}} for sizes in self._shards]
            with clear_errors(self.out_dir):
                to_disk(path)
                placed(self._temporary / PROGRESS_NAME, lambda file: file.write_text(json.dumps({"shards": shards})))

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
        _write_json(self._temporary / INDEX_NAME, {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map})

    def _replace(self) -> None:
        """Put the temporary folder in the target's place. The old one is moved aside, and comes back on failure."""
        check_replaceable(self.out_dir, overwrite=self._overwrite)  # hours may have passed since the first check
        aside = Workspace(self.out_dir, "old") if self.out_dir.exists() else None
        try:
            with shielded():
                if aside is not None:
                    self.out_dir.rename(aside.path / "old")
                try:
                    self._temporary.rename(self.out_dir)
                except OSError:
                    if aside is not None:
                        (aside.path / "old").rename(self.out_dir)
                    raise
                if self._workspace is not None:
                    (self.out_dir / MARKER_NAME).unlink()
                    self._workspace.close()
        finally:
            if aside is not None and self.out_dir.exists():
                aside.remove()


def files_to_copy(source: Path) -> Iterator[tuple[Path, Path]]:
    """(path relative to `source`, path) of every file that goes along with the weights.

    Raises:
        DetentError: as `detent.external.output.source_files`.
    """
    for relative, path in source_files(source):
        if not path.name.endswith(_WEIGHT_SUFFIXES) and path.name not in _STALE_NAMES:
            yield relative, path


def _copy(path: Path, target: Path) -> None:
    try:
        shutil.copyfile(path, target)
    except OSError as error:
        if error.filename is not None and Path(error.filename) == path:
            raise unreadable(path, error) from error
        raise


def digest(tensor: Tensor) -> int:
    """A checksum (CRC-32) of a tensor's bytes, which detects damage and mix-ups at nearly the speed of a copy."""
    flat = tensor.cpu().contiguous().flatten()
    return zlib.crc32(flat.view(torch.uint8).numpy()) if flat.numel() else 0  # type: ignore[arg-type]


def missing_parents(path: Path) -> list[Path]:
    """The parents of `path` that don't exist, the innermost first."""
    return [parent for parent in path.parents if not parent.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of some folders, the innermost first, that hold nothing."""
    for folder in folders:
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()


def unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
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


def _sort_metadata(path: Path) -> None:
    """Put the strings in a file's header into the order of their names: safetensors writes them in one that differs
    from process to process, and equal content is to be equal bytes."""
    start = '{"__metadata__":{'
    with path.open("r+b") as file:
        header = file.read(int.from_bytes(file.read(8), "little")).decode()
        if not header.startswith(start):
            return
        parse, at, pairs = json.JSONDecoder().raw_decode, len(start), []
        while header[at] != "}":
            at += header[at] == ","
            name, colon = parse(header, at)
            end = parse(header, colon + 1)[1]
            pairs.append((name, header[at:end]))
            at = end
        file.seek(8)
        file.write((start + ",".join(text for _, text in sorted(pairs)) + header[at:]).encode())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def set_permissions(folder: Path) -> None:
    """The usual ones: temporary folders, and files that safetensors writes, are readable by their owner only."""
    mask = _umask()
    folder.chmod(0o777 & ~mask)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o666 & ~mask)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@contextmanager
def clear_errors(out_dir: Path) -> Iterator[None]:
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
