"""The container: the header of a GGUF file, read with distrust.

A header says how long its strings and arrays are, and where tensors lie. Nothing is believed that the size of the file
contradicts, and nothing is allocated that it doesn't justify.

Layout (little-endian): magic, version, number of tensors, number of values; the values; the tensors; padding; data.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detent.errors import DetentError
from detent.external.files import unreadable

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT_KEY = "general.alignment"
#: Codes of scalars: how `struct` calls them.
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class Entry:
    """A tensor as the header describes it.

    Attributes:
        kind: the name of its type, such as ``Q4_K``.
        shape: with the longest stride first, as PyTorch has it.
        start: of its bytes in the file. nbytes: how many there are.
    """

    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its data: {key: value}, and {name: tensor} in the order of the file."""

    values: dict[str, Any]
    tensors: dict[str, Entry]


def gguf_package() -> Any:
    """The gguf package: its tables of types and names, and its writer.

    Raises:
        DetentError: it isn't installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise DetentError("GGUF files need the gguf package; install it with: pip install 'detent[gguf]'") from error
    return gguf


def is_gguf_file(path: Path) -> bool:
    """Whether a path is named as GGUF files are."""
    return path.suffix.lower() == ".gguf"


def read_header(path: Path) -> Header:
    """The header of a GGUF file.

    Raises:
        DetentError: it can't be read; it is no GGUF file, or of a version or byte order that isn't read; a length, an
            offset or a type in it can't be right.
    """
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise DetentError(f"{path} is empty; download it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return _Parser(path, view).header()
    except OSError as error:
        raise unreadable(path, error) from error


class _Parser:
    """Reads one value after the other; whatever would lie past the end of the file is an error."""

    def __init__(self, path: Path, view: mmap.mmap) -> None:
        self._path, self._view, self._size, self._at = path, view, len(view), 0

    def header(self) -> Header:
        if self._view[:4] != MAGIC:
            raise self._error("it doesn't start with the letters GGUF, so it is no GGUF file")
        self._at = 4
        version = self._number("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            why = "its bytes are in big-endian order" if swapped else f"it is of version {version}"
            raise self._error(f"{why}; little-endian files of version {' or '.join(map(str, VERSIONS))} are read")
        count, keys = self._number("Q"), self._number("Q")
        # A tensor takes at least 24 bytes, a value at least 13.
        self._fits(count * 24 + keys * 13, f"{count} tensors and {keys} values")
        values: dict[str, Any] = {}
        for _ in range(keys):
            key = self._string()
            if key in values:
                raise self._error(f"the key {key!r} is there twice")
            values[key] = self._value(self._number("I"), key)
        alignment = values.get(ALIGNMENT_KEY, 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise self._error(f"{ALIGNMENT_KEY} is {alignment!r}, not a power of two")
        found = [self._tensor() for _ in range(count)]
        start = -(-self._at // alignment) * alignment
        return Header(values, self._placed(found, start, alignment))

    def _placed(
        self, found: list[tuple[str, str, tuple[int, ...], int, int]], start: int, alignment: int
    ) -> dict[str, Entry]:
        tensors: dict[str, Entry] = {}
        end, last = start, ""
        for name, kind, shape, offset, nbytes in sorted(found, key=lambda tensor: (tensor[3], tensor[4])):
            at = start + offset
            if name in tensors:
                raise self._error(f"the tensor {name!r} is there twice")
            if offset % alignment:
                raise self._error(f"{name} begins at {offset}, which is no multiple of {alignment}")
            if at < end:
                raise self._error(f"{name} begins at {offset}, inside of {last}")
            if at + nbytes > self._size:
                raise self._error(f"{name} ends at byte {at + nbytes} of a file of {self._size}; it is truncated")
            tensors[name] = Entry(kind, shape, at, nbytes)
            end, last = at + nbytes, name
        return {name: tensors[name] for name, *_ in found}

    def _tensor(self) -> tuple[str, str, tuple[int, ...], int, int]:
        """(name, type, shape, offset, bytes) of a tensor."""
        gguf = gguf_package()
        name, dimensions = self._string(), self._number("I")
        if dimensions > _MAX_DIMENSIONS:
            raise self._error(f"{name} has {dimensions} dimensions; there are at most {_MAX_DIMENSIONS}")
        shape = tuple(reversed([self._number("Q") for _ in range(dimensions)]))
        code, offset = self._number("I"), self._number("Q")
        known = {int(kind): kind for kind in gguf.GGML_QUANT_SIZES}
        if code not in known:
            raise self._error(f"{name} is of type {code}, which the installed gguf package doesn't know; update it")
        block, size = gguf.GGML_QUANT_SIZES[known[code]]
        count = math.prod(shape)
        if not count or shape[-1] % block:
            raise self._error(f"{name} has shape {shape}, but {known[code].name} has blocks of {block}")
        return name, known[code].name, shape, offset, count // block * size

    def _value(self, code: int, key: str, depth: int = 0) -> Any:
        if code in _SCALARS:
            return self._number(_SCALARS[code])
        if code == _STRING:
            return self._string(errors="replace")  # tokens may be parts of characters
        if code != _ARRAY or depth > 2:
            raise self._error(f"{key} is of type {code}, which there isn't")
        inner, count = self._number("I"), self._number("Q")
        if inner in _SCALARS:
            size = struct.calcsize(_SCALARS[inner])
            self._fits(count * size, f"{count} values of {key}")
            at, self._at = self._at, self._at + count * size
            return np.frombuffer(self._view[at : self._at], np.dtype(_SCALARS[inner]).newbyteorder("<"))
        self._fits(count * 8, f"{count} values of {key}")
        return [self._value(inner, key, depth + 1) for _ in range(count)]

    def _string(self, errors: str = "strict") -> str:
        length = self._number("Q")
        self._fits(length, f"a string of {length} bytes")
        at, self._at = self._at, self._at + length
        try:
            return self._view[at : self._at].decode(errors=errors)
        except UnicodeDecodeError as error:
            raise self._error(f"a string at byte {at} is no UTF-8 text") from error

    def _number(self, code: str) -> Any:
        size = struct.calcsize(code)
        self._fits(size, "its header")
        at, self._at = self._at, self._at + size
        return struct.unpack_from(f"<{code}", self._view, at)[0]

    def _fits(self, nbytes: int, what: str) -> None:
        if nbytes > self._size - self._at:
            raise self._error(f"{what} would end past its {self._size} bytes; it is truncated or corrupt")

    def _error(self, problem: str) -> DetentError:
        return DetentError(f"{self._path}: {problem}")
