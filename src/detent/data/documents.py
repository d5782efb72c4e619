"""One document of a data set: a text, or a conversation that a tokenizer's chat template turns into one."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from detent.errors import DetentError
from detent.external.mistakes import as_detent_error, first_line

#: Fields of a record that hold its text, the most specific name first.
TEXT_FIELDS = ("text", "content", "prompt")
#: The fields of a record that hold a chat: OpenAI's, a list of {"role": ..., "content": ...}, and ShareGPT's, a list of
#: {"from": ..., "value": ...}.
MESSAGES_FIELD = "messages"
SHAREGPT_FIELD = "conversations"
CHAT_FIELDS = (MESSAGES_FIELD, SHAREGPT_FIELD)
#: ShareGPT's names of the speakers, in OpenAI's words; others are the same in both.
_SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
_CHAT_KEYS = {
    MESSAGES_FIELD: [("role", "content")],
    SHAREGPT_FIELD: [("from", "value"), ("role", "content")],
}
#: The most lines that a chat template may run for one conversation: far more than any that ends.
TEMPLATE_STEPS = 1_000_000


@dataclass(frozen=True)
class Conversation:
    """A chat, as (role, content) pairs in order."""

    messages: tuple[tuple[str, str], ...]


Document = str | Conversation


def parse_document(record: object, where: str) -> Document:
    """Turn one entry of a data file into a document.

    Args:
        record: a string, or a mapping with a ``text``, ``content`` or ``prompt`` string, with a list of ``messages``
            ``{"role": ..., "content": ...}``, or with a list of ``conversations`` ``{"from": ..., "value": ...}``
            (ShareGPT). A null text is an empty one.
        where: how an error names the entry, such as ``"notes.jsonl, line 7"``.

    Raises:
        DetentError: the entry is none of these.
    """
    if isinstance(record, str):
        return _checked_text(record, where)
    if not isinstance(record, Mapping):
        raise DetentError(f"{where}: expected a string or an object with {_field_names()}, found {_kind(record)}")
    for field in CHAT_FIELDS:
        if field in record:
            return _parse_chat(record[field], field, where)
    for field in TEXT_FIELDS:
        if field in record:
            return parse_text(record[field], f"{where}, field {field!r}")
    found = ", ".join(repr(str(key)) for key in record) or "none"
    raise DetentError(f"{where}: the object has no {_field_names()}; its fields are {found}")


def parse_text(value: object, where: str) -> str:
    """The text of one field: a string, or "" for null.

    Raises:
        DetentError: the value is something else, or holds characters that no encoding has.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DetentError(f"{where}: expected a string, found {_kind(value)}")
    return _checked_text(value, where)


def is_blank(document: Document) -> bool:
    """Whether the document holds nothing but white space."""
    if isinstance(document, str):
        return not document.strip()
    return not any(content.strip() for _, content in document.messages)


def render(document: Document, tokenizer: Any) -> tuple[str, bool]:
    """The document as one text, and whether the tokenizer must add its special tokens to it.

    A conversation goes through the tokenizer's chat template, which writes the special tokens itself. Without a
    tokenizer or a template, its messages are joined by line ends.

    Raises:
        DetentError: the chat template refuses the conversation, fails, or doesn't end.
    """
    if isinstance(document, str):
        return document, True
    if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
        return "\n".join(content for _, content in document.messages), True
    messages = [{"role": role, "content": content} for role, content in document.messages]
    from jinja2 import TemplateError

    roles = ", ".join(role for role, _ in document.messages)
    with (
        as_detent_error(
            lambda error: (
                f"the tokenizer's chat template fails on a conversation with the roles {roles}: {first_line(error)}; "
                "fix the template, or give the data as plain text"
            ),
            more=(TemplateError, _Endless, MemoryError),
        ),
        _bounded_template(),
    ):
        return str(tokenizer.apply_chat_template(messages, tokenize=False)), False


class _Endless(Exception):
    """A chat template that does not seem to end."""


@contextmanager
def _bounded_template() -> Iterator[None]:
    """Stop a template that runs more than `TEMPLATE_STEPS` lines: jinja's sandbox does not bound nested loops.
    Lines are counted by tracing, which looks only at compiled templates."""
    steps = 0

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > TEMPLATE_STEPS:
            raise _Endless(f"it runs more than {TEMPLATE_STEPS} steps, so its loops may not end")
        return line

    def call(frame: FrameType, event: str, argument: Any) -> Any:
        return line if frame.f_code.co_filename == "<template>" else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)


def _parse_chat(messages: object, field: str, where: str) -> Conversation:
    if not isinstance(messages, list) or not messages:
        raise DetentError(f"{where}: {field!r} must be a list with at least one message, found {_kind(messages)}")
    pairs = []
    for number, message in enumerate(messages, start=1):
        place = f"{where}, message {number}"
        # Some data sets have OpenAI's messages under ShareGPT's name.
        keys = ("role", "content")
        if field == SHAREGPT_FIELD and isinstance(message, Mapping) and "from" in message:
            keys = ("from", "value")
        if not isinstance(message, Mapping) or not isinstance(message.get(keys[0]), str) or keys[1] not in message:
            wanted = " or ".join(f"a {a!r} string and a {b!r}" for a, b in _CHAT_KEYS[field])
            raise DetentError(f"{place}: expected an object with {wanted}, found {_kind(message)}")
        role = str(message[keys[0]])
        pairs.append((_SPEAKERS.get(role, role), _message_text(message[keys[1]], keys[1], place)))
    return Conversation(tuple(pairs))


def _message_text(content: object, field: str, where: str) -> str:
    """The text of a message, whose content may also be a list of parts (text, images, ...)."""
    if not isinstance(content, list):
        return parse_text(content, f"{where}, field {field!r}")
    parts = [part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
    return _checked_text("\n".join(parts), where)


def _checked_text(text: str, where: str) -> str:
    # JSON can spell half of a surrogate pair ("\ud800"), which isn't a character; tokenizers raise TypeError for it.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DetentError(
            f"{where}: character {error.start} is half of a surrogate pair, which is not valid text; remove it"
        ) from error
    return text


def _field_names() -> str:
    return f"{', '.join(map(repr, (*TEXT_FIELDS, MESSAGES_FIELD)))} or {SHAREGPT_FIELD!r}"


def _kind(value: object) -> str:
    """What a JSON value is called in an error message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a true/false value"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, Mapping):
        return "an object"
    return f"a value of type {type(value).__name__}"
