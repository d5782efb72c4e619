"""Opening what a user names: one place where paths are looked at, files are read and JSON is parsed.

Whatever is wrong with a path or a file is one `DetentError` that names it; nothing here hangs, follows a pipe, or reads
more than its limit. `read_as` is the way from a JSON file to a checked description of `detent.external.schemas`.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from detent.errors import DetentError

#: The most bytes of a JSON file that describes a model, an algorithm or a run; of a data file.
MAX_JSON_BYTES = 1 << 27
MAX_DATA_BYTES = 1 << 32
#: How deep JSON may be nested, and how many digits a whole number may have (tokenizers write 31 for "no limit").
MAX_DEPTH = 64
MAX_DIGITS = 40

_Model = TypeVar("_Model", bound=BaseModel)


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path as the user means it, ``~`` and ``~name`` expanded.

    Raises:
        DetentError: not a path; an unknown home, a NUL character, or a name that isn't UTF-8.
    """
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise DetentError(f"a path is text or a pathlib.Path, not {shown(path)}")
    if "\0" in text:
        raise DetentError(f"{text!r}: a path cannot contain NUL characters")
    try:
        os.fsencode(text).decode("utf-8")
    except UnicodeError as error:
        raise DetentError(f"{text!r}: the path is not UTF-8 text, which weight files need; rename it") from error
    if not text.startswith("~"):
        return Path(text)
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        name = text.split("/")[0]
        raise DetentError(
            f"{text}: there is no user {name[1:]!r}, so {name} is not a home folder; a name that begins with ~ is"
            f" written ./{name}"
        ) from error


def status(path: str | os.PathLike[str]) -> os.stat_result | None:
    """The `stat` of a path, links followed; None where nothing is there.

    Raises:
        DetentError: it can't be looked at: no permission, links in a circle, a name that is too long.
    """
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        raise unreadable(path, error) from error
    except ValueError as error:
        raise DetentError(f"{os.fspath(path)!r}: not a path ({error})") from error


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether a regular file is there. Raises DetentError as `status`."""
    found = status(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is there. Raises DetentError as `status`."""
    found = status(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted. Raises DetentError where it can't be listed."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise unreadable(folder, error) from error


def unreadable(path: str | os.PathLike[str], error: OSError) -> DetentError:
    """The one message for a path that the file system refuses."""
    reasons = {
        errno.EACCES: "no permission to read it; change its permissions, or run as its owner",
        errno.EPERM: "no permission to read it; change its permissions, or run as its owner",
        errno.ELOOP: "its symbolic links form a loop; remove them",
        errno.ENAMETOOLONG: "a name in it is longer than the file system takes; name a shorter one",
        errno.ENOENT: "there is no such file",
        errno.EISDIR: "it is a folder, not a file",
    }
    text = os.fspath(path)
    shown = text if len(text) < 300 else f"{text[:300]}..."
    return DetentError(f"{shown}: cannot be read: {reasons.get(error.errno or 0, error.strerror or error)}")


def read_bytes(path: Path, *, limit: int = MAX_JSON_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        DetentError: there is none, it is larger, or it can't be read.
    """
    found = status(path)
    if found is None:
        raise DetentError(f"{path}: there is no such file")
    if not stat.S_ISREG(found.st_mode):
        raise DetentError(f"{path} is not a file that can be read, but a folder, a pipe or a device")
    if found.st_size > limit:
        raise DetentError(f"{path}: {found.st_size} bytes; at most {limit} are read from such a file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def parse_json(text: str | bytes, where: str) -> Any:
    """The value of a JSON text: UTF-8, at most `MAX_DEPTH` deep, whole numbers of at most `MAX_DIGITS` digits, every
    key of an object once. ``NaN`` and ``Infinity`` are read, since Python programs write them.

    Raises:
        DetentError: naming `where` and what is wrong.
    """
    try:
        value = json.loads(
            text if isinstance(text, str) else text.decode("utf-8"), parse_int=_integer, object_pairs_hook=_object
        )
    except json.JSONDecodeError as error:
        raise DetentError(
            f"{where} is not JSON (line {error.lineno}, column {error.colno}: {error.msg}); fix it or get it again"
        ) from error
    except UnicodeDecodeError as error:
        raise DetentError(
            f"{where} is not JSON (byte {error.start} is not valid UTF-8); fix it or get it again"
        ) from error
    except RecursionError as error:
        raise _too_deep(where) from error
    except _NotTaken as error:
        raise DetentError(f"{where}: {error}") from error
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return value
    raise _too_deep(where)


class _NotTaken(Exception):
    """JSON that is not read."""


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise _NotTaken(f"holds a whole number of {len(digits)} digits; at most {MAX_DIGITS} are read")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _NotTaken(f"the key {twice!r} appears twice in one object; keep one of the two")
    return found


def _inside(value: Any) -> list[Any]:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [child for child in children if isinstance(child, dict | list)]


def _too_deep(where: str) -> DetentError:
    return DetentError(f"{where}: its JSON is nested more than {MAX_DEPTH} levels deep, which is not supported")


def read_json(path: Path) -> Any:
    """`parse_json` of a file. Raises DetentError as `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path), str(path))


def read_as(model: type[_Model], path: Path) -> _Model:
    """The checked description in a JSON file. Raises DetentError as `read_json` and `check_as`."""
    return check_as(model, read_json(path), str(path))


def check_as(model: type[_Model], value: Any, where: str) -> _Model:
    """A parsed JSON value as a description of `detent.external.schemas`.

    Raises:
        DetentError: naming `where`, the field, what was found in it and what it may hold.
    """
    try:
        return model.model_validate(value, strict=True)
    except ValidationError as error:
        _refuse(error, where)


def _refuse(error: ValidationError, where: str) -> NoReturn:
    errors = error.errors(include_url=False)
    first = errors[0]
    place: tuple[Any, ...] = first["loc"]
    # A field that may be one of several types has an error for each of them, told apart by the end of its place.
    choices = [e for e in errors if e["loc"][:-1] == place[:-1] and e["input"] is first["input"]]
    if len(choices) > 1:
        place = place[:-1]
    field = f"field {'.'.join(map(str, place))!r}" if place else "it"
    if first["type"] == "value_error":
        raise DetentError(f"{where}: {f'{field}: ' if place else ''}{first['ctx']['error']}")
    if first["type"] == "missing":
        raise DetentError(f"{where}: {field} is missing; the file is damaged, or of another kind")
    wanted = " or ".join(str(e["msg"]).removeprefix("Input should be ") for e in choices)
    raise DetentError(f"{where}: {field} is {shown(first['input'])}; it takes {wanted}")


def shown(value: object) -> str:
    """A value from a file as a message quotes it: its first 80 characters at most."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def to_disk(path: Path) -> None:
    """Wait until a file, or the list of a folder, is on the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def placed(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that is whole and on the disk before it has its name. Raises OSError."""
    fresh = path.with_name(f"unfinished-{path.name}")
    write(fresh)
    to_disk(fresh)
    fresh.replace(path)
    to_disk(path.parent)
