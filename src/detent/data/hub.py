"""Documents from a data set on the Hugging Face Hub, through the `datasets` package.

Only data files are read. No code from a data set's repository ever runs.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, overload
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from detent.data.builtin import Purpose
from detent.data.documents import MESSAGES_FIELD, Document, is_blank, parse_text
from detent.data.files import column_document, find_text_column
from detent.errors import DetentError

#: How calibration samples are made from documents; :func:`detent.data.batches.token_batches` defines each.
Sampling = Literal["documents", "windows", "short_documents", "random_windows"]


class HubUnavailable(DetentError):
    """The data set could not be fetched: no network, no `datasets` package, or the hub answered with an error."""


@dataclass(frozen=True)
class HubDataset:
    """Where a named data set is and how its documents are taken from it."""

    repository: str
    #: None: the first that the data set has of `USUAL_SPLITS`.
    calibration_split: str | None = None
    evaluation_split: str | None = None
    config: str | None = None
    #: The fields that make up a document, joined by line ends; () finds the text column.
    fields: tuple[str, ...] = ("text",)
    sampling: Sampling = "documents"
    #: Seed of the order in which documents are taken, None for the order they are stored in.
    shuffle_seed: int | None = None
    #: Whether an evaluation reads the whole split as one running text, blank lines included.
    whole_split: bool = False

    def split(self, purpose: Purpose) -> str | None:
        return self.calibration_split if purpose == "calibration" else self.evaluation_split


_PILE = HubDataset("mit-han-lab/pile-val-backup", "validation", "validation")
_WIKITEXT = HubDataset("Salesforce/wikitext", "train", "test", config="wikitext-2-raw-v1", whole_split=True)
_ULTRACHAT = HubDataset(
    "HuggingFaceH4/ultrachat_200k", "train_sft", "test_sft", fields=(MESSAGES_FIELD,), shuffle_seed=42
)

#: The data sets that have a short name here.
HUB_DATASETS: dict[str, HubDataset] = {
    "pileval": _PILE,
    "wikitext": _WIKITEXT,
    "pileval_for_awq_benchmark": HubDataset(
        _PILE.repository, "validation", "validation", sampling="short_documents", shuffle_seed=42
    ),
    "wikitext_for_gptq_benchmark": HubDataset(
        _WIKITEXT.repository, "train", "test", config=_WIKITEXT.config, sampling="random_windows", whole_split=True
    ),
    "HuggingFaceH4/ultrachat_200k": _ULTRACHAT,
    "ScienceQA": HubDataset("derek-thomas/ScienceQA", "train", "test", fields=("lecture", "question", "solution")),
    "cnn_dailymail": HubDataset("abisee/cnn_dailymail", "train", "test", config="3.0.0", fields=("article",)),
}

#: The splits to use of a data set that is not in the table, the best first.
USUAL_SPLITS: dict[Purpose, tuple[str, ...]] = {
    "calibration": ("train", "validation", "test"),
    "evaluation": ("test", "validation", "train"),
}
#: An evaluation on a data set other than WikiText reads this many documents, by default.
EVALUATION_DOCUMENTS = 128
#: Seconds to wait for the hub to accept a connection.
PROBE_SECONDS = 3.0


class HubDocuments(Sequence[Document]):
    """The documents of a loaded data set, each read when it is asked for (a whole data set may not fit in memory)."""

    def __init__(self, rows: Any, to_document: Callable[[Mapping[str, Any], str], Document], name: str) -> None:
        self._rows = rows
        self._to_document = to_document
        self._name = name

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> list[Document]: ...
    def __getitem__(self, index: int | slice) -> Document | list[Document]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._to_document(self._rows[index], f"{self._name}, row {index}")


def find_dataset(name: str) -> HubDataset:
    """The entry of the table for `name`, or one made for any other ``organisation/name`` on the hub."""
    if name in HUB_DATASETS:
        return HUB_DATASETS[name]
    for entry in HUB_DATASETS.values():
        if name == entry.repository and entry.sampling == "documents":
            return entry
    return HubDataset(name, fields=())


def load_hub_documents(name: str, purpose: Purpose, limit: int | None = None) -> Sequence[Document]:
    """The documents of a data set on the hub, or of its copy in the local cache of `datasets`.

    Args:
        name: a key of `HUB_DATASETS`, or any ``organisation/name`` on the hub with one text column.
        purpose: decides the split.
        limit: take only the first `limit` documents that are not blank; None takes all that the rule needs.

    Raises:
        HubUnavailable: it is not cached and cannot be fetched; the message gives the reason.
        DetentError: its columns or rows are not text.
    """
    dataset = find_dataset(name)
    whole = purpose == "evaluation" and dataset.whole_split
    if purpose == "evaluation" and not whole and limit is None:
        limit = EVALUATION_DOCUMENTS
    # Only the rules that take the first documents, in order, can do with a part of the data set.
    partial = limit is not None and not whole and dataset.shuffle_seed is None and dataset.sampling == "documents"
    rows = _load_rows(name, dataset, dataset.split(purpose), streaming=partial)
    if dataset.split(purpose) is None:
        rows = rows[_choose_split(list(rows), purpose, name)]
    if dataset.shuffle_seed is not None:
        rows = rows.shuffle(seed=dataset.shuffle_seed)
    fields = dataset.fields or (_text_column(rows, name),)
    if rows.column_names is not None and set(fields) < set(rows.column_names):
        rows = rows.select_columns(list(fields))  # Other columns may hold images, which would be decoded row by row.
    to_document = _document_reader(fields)
    if whole or limit is None or dataset.sampling != "documents":
        return HubDocuments(rows, to_document, name)
    with _as_unavailable(name):
        documents = (to_document(row, f"{name}, row {number}") for number, row in enumerate(rows))
        return list(islice((document for document in documents if not is_blank(document)), limit))


def hub_endpoint() -> str:
    """The address of the hub: the environment's ``HF_ENDPOINT``, or huggingface.co."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def unreachable_reason(timeout: float = PROBE_SECONDS) -> str | None:
    """Why the hub cannot be used now, or None where a connection to it (or to the proxy in between) opens."""
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}:
            return f"{variable} is set"
    address = urlsplit(hub_endpoint())
    proxy = getproxies().get(address.scheme)
    if proxy and not proxy_bypass(address.hostname or ""):
        address = urlsplit(proxy if "//" in proxy else f"//{proxy}", scheme=address.scheme)
    host, port = address.hostname, address.port or (80 if address.scheme == "http" else 443)
    if not host:
        return f"the address {hub_endpoint()!r} names no host"
    return None if _accepts_connection(host, port, timeout) else f"{host} cannot be reached"


def _accepts_connection(host: str, port: int, timeout: float) -> bool:
    # In a thread, because looking up a name has no time limit: without a network it may take half a minute.
    connected = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout).close()
        except OSError:
            return
        connected.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout)
    return connected.is_set()


def _choose_split(splits: list[str], purpose: Purpose, name: str) -> str:
    for split in USUAL_SPLITS[purpose]:
        if split in splits:
            return split
    if len(splits) == 1:
        return splits[0]
    raise DetentError(
        f"{name}: cannot tell which split to use; it has {', '.join(splits)}; "
        f"one must be named {', '.join(USUAL_SPLITS[purpose])}, or there must be only one"
    )


def missing_package(name: str) -> HubUnavailable | None:
    """The error of a data set whose package isn't installed; None where it is."""
    return _needs_package(name) if importlib.util.find_spec("datasets") is None else None


def _needs_package(name: str) -> HubUnavailable:
    return HubUnavailable(
        f'the data set {name!r} needs the datasets package, which is not installed; run: pip install "detent[datasets]"'
    )


def _load_rows(name: str, dataset: HubDataset, split: str | None, streaming: bool) -> Any:
    """The rows of one split (or every split by name): from the local cache where it has them, else from the hub."""
    try:
        import datasets
    except ImportError as error:
        raise _needs_package(name) from error
    arguments: dict[str, Any] = {"path": dataset.repository, "name": dataset.config, "split": split}
    if int(datasets.__version__.split(".")[0]) < 4:
        # Later versions cannot run a repository's code at all, and complain about the argument.
        arguments["trust_remote_code"] = False
    try:
        with _offline(datasets):
            return datasets.load_dataset(**arguments)
    except (OSError, ValueError):
        pass  # Not in the cache, or without this split.
    reason = unreachable_reason()
    if reason is not None:
        raise HubUnavailable(f"the data set {name!r} is not in the local cache, and {reason}")
    with _as_unavailable(name):
        return datasets.load_dataset(**arguments, streaming=streaming)


@contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    """Let `datasets` look only in its cache. It reads the environment once, so setting a variable has no effect."""
    before = datasets.config.HF_HUB_OFFLINE
    level = datasets.logging.get_verbosity()
    datasets.config.HF_HUB_OFFLINE = True
    datasets.logging.set_verbosity_error()  # It warns that it uses the cache, which is what was asked of it.
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
        datasets.logging.set_verbosity(level)


@contextmanager
def _as_unavailable(name: str) -> Iterator[None]:
    """Raise what goes wrong while fetching as one error with one message."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except DetentError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, DatasetsError, *_http_errors()) as error:
        reason = str(error).strip().rstrip(".") or type(error).__name__
        raise HubUnavailable(f"the data set {name!r} cannot be loaded from {hub_endpoint()}: {reason}") from error


def _http_errors() -> list[type[Exception]]:
    """The error class of the HTTP client that `huggingface_hub` uses, which changes with its version."""
    errors: list[type[Exception]] = []
    for name in ("httpx", "httpx2"):
        try:
            errors.append(importlib.import_module(name).HTTPError)
        except ImportError:
            continue
    return errors


def _text_column(rows: Any, name: str) -> str:
    features = rows.features
    if features is None:  # A streamed data set may learn its columns only from its first row.
        with _as_unavailable(name):
            first: Mapping[str, Any] = next(iter(rows), {})
        return find_text_column(list(first), [key for key, value in first.items() if isinstance(value, str)], name)
    texts = [key for key, feature in features.items() if getattr(feature, "dtype", None) in ("string", "large_string")]
    return find_text_column(list(features), texts, name)


def _document_reader(fields: tuple[str, ...]) -> Callable[[Mapping[str, Any], str], Document]:
    """A function that makes a document of a row: one field as it is, several as the lines of one text."""

    def read(row: Mapping[str, Any], where: str) -> Document:
        missing = [field for field in fields if field not in row]
        if missing:
            raise DetentError(f"{where}: expected a column {missing[0]!r}; it has the columns {', '.join(row)}")
        if len(fields) == 1:
            return column_document(fields[0], row[fields[0]], where)
        parts = [parse_text(row[field], f"{where}, column {field!r}") for field in fields]
        return "\n".join(part for part in parts if part)

    return read
