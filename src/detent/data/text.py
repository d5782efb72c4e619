"""Where calibration and evaluation text comes from: a local file, a hub data set, or Detent's built-in text."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detent.data.builtin import Purpose, builtin_text
from detent.data.documents import Document, render
from detent.data.files import SUFFIXES, check_data_file, read_documents, split_paragraphs
from detent.data.hub import (
    HUB_DATASETS,
    HubUnavailable,
    Sampling,
    find_dataset,
    load_hub_documents,
    missing_package,
)
from detent.errors import DetentError
from detent.external.files import status, user_path

#: The name of the text that ships with Detent.
BUILTIN = "builtin"
#: What is loaded when no source is named and the hub can be reached.
DEFAULT_SOURCES: dict[Purpose, str] = {"calibration": "pileval", "evaluation": "wikitext"}

_OPTIONS: dict[Purpose, str] = {"calibration": "dataset", "evaluation": "eval_dataset"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class TextSource:
    """Text, and how it is to be used.

    Attributes:
        texts: the documents (strings or conversations), or the paragraphs of one running text.
        description: where the text is from, in a few words, for reports.
        sampling: how :func:`detent.data.batches.token_batches` makes samples of it.
        builtin: whether it is the text that ships with Detent.
        notice: a message for the user about the choice of this source, if any.
    """

    texts: Sequence[Document]
    description: str
    sampling: Sampling = "documents"
    builtin: bool = False
    notice: str | None = None

    @property
    def joined(self) -> bool:
        """Whether samples are cut from the texts run together, rather than each text being one sample."""
        return self.sampling != "documents"

    def joined_text(self, tokenizer: Any = None) -> str:
        """All texts as one, with a blank line between two; conversations go through the tokenizer's chat template."""
        return "\n\n".join(render(document, tokenizer)[0] for document in self.texts)


def load_texts(source: str | os.PathLike[str] | None, purpose: Purpose, limit: int | None = None) -> TextSource:
    """Load text for calibration or for evaluation.

    Args:
        source: a local file (``.txt``, ``.json``, ``.jsonl``, ``.parquet``); the name of a data set in
            :data:`detent.data.hub.HUB_DATASETS`, or any ``organisation/name`` on the hub; ``"builtin"`` for the text
            that ships with Detent; or None: The Pile's validation texts (calibration) or WikiText-2's test text
            (evaluation) where the hub is reachable or they are cached, else the built-in text, with a `notice`.
        purpose: a ``.txt`` file is cut at blank lines for calibration and left whole for evaluation; it also decides
            the split of a hub data set.
        limit: read at most this many documents (the number of calibration samples wanted). It does not shorten running
            text. An evaluation on a hub data set other than WikiText reads 128 where this is None.

    Raises:
        DetentError: the source is unknown, missing, unreadable, empty, or named and not reachable.
    """
    if limit is not None and limit < 1:
        raise DetentError(f"the number of texts to read must be at least 1, found {limit}")
    if source is None:
        return _load_default(purpose, limit)
    name = os.fspath(source)
    if name == BUILTIN:
        return _load_builtin(purpose)
    if isinstance(source, str) and name in HUB_DATASETS:
        return _load_named(name, purpose, limit)
    if _names_a_path(name):
        return _load_file(user_path(name), purpose, limit)
    if _HUB_NAME.fullmatch(name):
        return _load_named(name, purpose, limit)
    raise DetentError(_unknown_source(name))


def check_source(source: str) -> None:
    """Raise DetentError unless `source` could be loaded by its name; nothing is read.

    For a source that is named although nothing needs it: a file must exist, and a data set have a name that is known or
    that a hub data set can have.
    """
    if source == BUILTIN or source in HUB_DATASETS:
        return
    if _names_a_path(source):
        check_data_file(user_path(source))
    elif not _HUB_NAME.fullmatch(source):
        raise DetentError(_unknown_source(source))


def _names_a_path(name: str) -> bool:
    path = user_path(name)
    return (
        status(path) is not None
        or path.suffix.lower() in SUFFIXES
        or name.startswith((".", "/", "~"))
        or path.is_absolute()
    )


def _unknown_source(name: str) -> str:
    known = [*HUB_DATASETS, BUILTIN]
    lowered = {entry.lower(): entry for entry in known}
    near = difflib.get_close_matches(name.lower(), list(lowered), n=1)
    hint = f"; did you mean {lowered[near[0]]!r}?" if near else ""
    return (
        f"unknown data set {name!r}{hint}; give a local file ({', '.join(SUFFIXES)}), a hub data set as "
        f"'organisation/name', or one of: {', '.join(known)}"
    )


def _load_file(path: Path, purpose: Purpose, limit: int | None) -> TextSource:
    documents = read_documents(path)
    if path.suffix.lower() != ".txt":
        return TextSource(documents[:limit], str(path))
    if purpose == "evaluation":
        return TextSource(documents, str(path), sampling="windows")
    paragraphs = [paragraph for text in documents if isinstance(text, str) for paragraph in split_paragraphs(text)]
    return TextSource(paragraphs, str(path), sampling="windows")


def _load_builtin(purpose: Purpose, notice: str | None = None) -> TextSource:
    text = builtin_text(purpose)
    texts = split_paragraphs(text) if purpose == "calibration" else [text]
    return TextSource(texts, f"built-in {purpose} text", sampling="windows", builtin=True, notice=notice)


def _load_named(name: str, purpose: Purpose, limit: int | None) -> TextSource:
    try:
        return _load_hub(name, purpose, limit)
    except HubUnavailable as error:
        raise DetentError(
            f"{error}; name a local file ({', '.join(SUFFIXES)}) as {_OPTIONS[purpose]}, "
            f"or leave out {_OPTIONS[purpose]} (or name it {BUILTIN!r}) to use the built-in text"
        ) from error


def _load_default(purpose: Purpose, limit: int | None) -> TextSource:
    try:
        return _load_hub(DEFAULT_SOURCES[purpose], purpose, limit)
    except HubUnavailable as error:
        return _load_builtin(purpose, notice=_builtin_notice(purpose, error))


def missing_package_notice(purpose: Purpose) -> str | None:
    """What to tell the user at the start where no text is named and the default one needs a package that isn't there;
    `load_texts` gives the same in its `notice`."""
    error = missing_package(DEFAULT_SOURCES[purpose])
    return None if error is None else _builtin_notice(purpose, error)


def _builtin_notice(purpose: Purpose, error: HubUnavailable) -> str:
    use = "calibrating on" if purpose == "calibration" else "measuring perplexity on"
    return (
        f"no {purpose} text was named and the default one is not available ({error}); "
        f"{use} the built-in text; for meaningful results, name your own file ({', '.join(SUFFIXES)}) as "
        f"{_OPTIONS[purpose]}"
    )


def _load_hub(name: str, purpose: Purpose, limit: int | None) -> TextSource:
    documents = load_hub_documents(name, purpose, limit)
    if not documents:
        raise DetentError(f"the data set {name!r} holds no usable text")
    dataset = find_dataset(name)
    parts = [part for part in (dataset.repository, dataset.config, dataset.split(purpose)) if part and part != name]
    description = f"{name} ({', '.join(parts)})" if parts else name
    if purpose == "evaluation" and not dataset.whole_split:
        description += f", first {len(documents)} texts"
    return TextSource(documents, description, sampling=dataset.sampling)
