"""One document of a data set: a text, or a conversation that a tokenizer's chat template turns into one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from detent.errors import DetentError

#: Fields of a record that hold its text, the most specific name first.
TEXT_FIELDS = ("text", "content", "prompt")
#: The field of a record that holds a chat.
MESSAGES_FIELD = "messages"


@dataclass(frozen=True)
class Conversation:
    """A chat, as (role, content) pairs in order."""

    messages: tuple[tuple[str, str], ...]


Document = str | Conversation


def parse_document(record: object, where: str) -> Document:
    """Turn one entry of a data file into a document.

    Args:
        record: a string, or a mapping with a ``text``, ``content`` or ``prompt`` string, or with a list of ``messages``
            ``{"role": ..., "content": ...}``. A null text is an empty one.
        where: how an error names the entry, such as ``"notes.jsonl, line 7"``.

    Raises:
        DetentError: the entry is none of these.
    """
    if isinstance(record, str):
        return _checked_text(record, where)
    if not isinstance(record, Mapping):
        raise DetentError(f"{where}: expected a string or an object with {_field_names()}, found {_kind(record)}.")
    if MESSAGES_FIELD in record:
        return _parse_messages(record[MESSAGES_FIELD], where)
    for field in TEXT_FIELDS:
        if field in record:
            return parse_text(record[field], f"{where}, field {field!r}")
    found = ", ".join(repr(str(key)) for key in record) or "none"
    raise DetentError(f"{where}: the object has no {_field_names()}; its fields are {found}.")


def parse_text(value: object, where: str) -> str:
    """The text of one field: a string, or "" for null.

    Raises:
        DetentError: the value is something else, or holds characters that no encoding has.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DetentError(f"{where}: expected a string, found {_kind(value)}.")
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
        DetentError: the chat template refuses the conversation.
    """
    if isinstance(document, str):
        return document, True
    if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
        return "\n".join(content for _, content in document.messages), True
    from jinja2 import TemplateError

    messages = [{"role": role, "content": content} for role, content in document.messages]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False)), False
    except (TemplateError, ImportError) as error:
        roles = ", ".join(role for role, _ in document.messages)
        raise DetentError(
            f"The tokenizer's chat template refuses a conversation with the roles {roles}: {error}. "
            "Give the data as plain text instead."
        ) from error


def _parse_messages(messages: object, where: str) -> Conversation:
    if not isinstance(messages, list) or not messages:
        raise DetentError(f"{where}: 'messages' must be a list with at least one message, found {_kind(messages)}.")
    pairs = []
    for number, message in enumerate(messages, start=1):
        place = f"{where}, message {number}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            found = _kind(message)
            raise DetentError(f"{place}: expected an object with a 'role' string and a 'content', found {found}.")
        pairs.append((message["role"], _message_text(message["content"], place)))
    return Conversation(tuple(pairs))


def _message_text(content: object, where: str) -> str:
    """The text of a message, whose content may also be a list of parts (text, images, ...)."""
    if not isinstance(content, list):
        return parse_text(content, f"{where}, field 'content'")
    parts = [part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
    return _checked_text("\n".join(parts), where)


def _checked_text(text: str, where: str) -> str:
    # JSON can spell half of a surrogate pair ("\ud800"), which is no character: tokenizers fail on it with a TypeError.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DetentError(
            f"{where}: character {error.start} is half of a surrogate pair, which is not valid text. Remove it."
        ) from error
    return text


def _field_names() -> str:
    return ", ".join(repr(field) for field in TEXT_FIELDS) + f" or {MESSAGES_FIELD!r}"


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
