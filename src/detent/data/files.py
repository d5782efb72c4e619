"""Documents from a local file: .txt, .json, .jsonl or .parquet."""

from __future__ import annotations

import json
import re
from pathlib import Path

from detent.data.documents import CHAT_FIELDS, TEXT_FIELDS, Document, is_blank, parse_document, parse_text
from detent.errors import DetentError
from detent.external.files import MAX_DATA_BYTES, is_file, parse_json, read_bytes, status

#: What a data file may be, by its suffix.
SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")


def read_documents(path: Path) -> list[Document]:
    """Read the documents of a data file, blank ones left out.

    ``.txt`` is one document. ``.json`` is a list of entries, or an object with one list among its values; ``.jsonl`` is
    one entry a line; an entry is what :func:`detent.data.documents.parse_document` takes. ``.parquet`` has a text
    column.

    Raises:
        DetentError: the file is missing, empty, of another kind, unreadable, or has no text in it. The message names
            the line, entry or row.
    """
    suffix = check_data_file(path)
    readers = {".txt": _read_txt, ".json": _read_json, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    documents = [document for document in readers[suffix](path) if not is_blank(document)]
    if not documents:
        raise DetentError(f"the data file {path} holds no usable text: its entries are blank, or there are none")
    return documents


def check_data_file(path: Path) -> str:
    """The suffix of a data file. Raises DetentError where there is none that could be read."""
    if status(path) is None:
        raise DetentError(f"the data file {path} does not exist")
    if not is_file(path):
        raise DetentError(f"{path} is not a file; name one data file ({', '.join(SUFFIXES)}) or a hub data set")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        found = f"the suffix {suffix!r}" if suffix else "no suffix"
        raise DetentError(f"{path}: a data file must end in one of {', '.join(SUFFIXES)}, found {found}")
    if path.stat().st_size == 0:
        raise DetentError(f"the data file {path} is empty")
    return suffix


def split_paragraphs(text: str) -> list[str]:
    """The paragraphs of a text: what blank lines separate."""
    return [paragraph for paragraph in re.split(r"\n[^\S\n]*\n\s*", text) if paragraph.strip()]


def _read_text(path: Path) -> str:
    try:
        # utf-8-sig drops the byte order mark that some editors write.
        text = read_bytes(path, limit=MAX_DATA_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DetentError(f"{path}: byte {error.start} is not valid UTF-8; save the file as UTF-8 text") from error
    return text.replace("\r\n", "\n")


def _read_txt(path: Path) -> list[Document]:
    return [_read_text(path)]


def _read_json(path: Path) -> list[Document]:
    text = _read_text(path)
    try:
        content = parse_json(text, str(path))
    except DetentError as error:
        cause = error.__cause__
        if isinstance(cause, json.JSONDecodeError) and cause.msg == "Extra data":
            # A whole value, then another: many data sets store one object per line under this suffix.
            return _parse_lines(text, path)
        raise
    return [parse_document(entry, f"{path}, entry {number}") for number, entry in enumerate(_entries(content, path), 1)]


def _entries(content: object, path: Path) -> list[object]:
    """The list in a JSON document: the document itself, or the only list among the values of an object."""
    if isinstance(content, list):
        return content
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) == 1 and not any(field in content for field in CHAT_FIELDS):
            return lists[0]
        if any(field in content for field in (*TEXT_FIELDS, *CHAT_FIELDS)):
            return [content]
        raise DetentError(f"{path}: expected an object with exactly one list of texts, found {len(lists)} lists in it")
    raise DetentError(f"{path}: expected a list of texts or of objects, found a single {type(content).__name__} value")


def _read_jsonl(path: Path) -> list[Document]:
    return _parse_lines(_read_text(path), path)


def _parse_lines(text: str, path: Path) -> list[Document]:
    documents = []
    # Not splitlines(): JSON strings may hold characters, such as U+2028, that it would split at.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        documents.append(parse_document(parse_json(line, where), where))
    return documents


def _read_parquet(path: Path) -> list[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DetentError(
            f'{path}: reading .parquet files needs a package that is not installed; run: pip install "detent[datasets]"'
        ) from error
    try:
        schema = pyarrow.parquet.read_schema(path)
        texts = [f.name for f in schema if pyarrow.types.is_string(f.type) or pyarrow.types.is_large_string(f.type)]
        column = find_text_column(schema.names, texts, str(path))
        values = pyarrow.parquet.read_table(path, columns=[column])[column].to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DetentError(f"{path} is not a readable Parquet file: {error}") from error
    return [column_document(column, value, f"{path}, row {row}") for row, value in enumerate(values, 1)]


def find_text_column(columns: list[str], text_columns: list[str], where: str) -> str:
    """The column of a table that holds its text: one with a usual name, or the only one of type string.

    Raises:
        DetentError: there is no such column, or more than one.
    """
    for name in (*TEXT_FIELDS, *CHAT_FIELDS):
        if name in columns:
            return name
    if len(text_columns) == 1:
        return text_columns[0]
    usual = ", ".join((*TEXT_FIELDS, *CHAT_FIELDS))
    raise DetentError(
        f"{where}: cannot tell which column holds the text; it has the columns {', '.join(columns)}; "
        f"one must be named {usual}, or only one may hold text"
    )


def column_document(column: str, value: object, where: str) -> Document:
    """The document in one cell of a table."""
    if column in CHAT_FIELDS:
        return parse_document({column: value}, where)
    return parse_text(value, f"{where}, column {column!r}")
