"""What every configuration class shares: fields that are checked, mapping access, and errors in one sentence.

Invariants: an object that exists is valid, also after an assignment (a refused one changes nothing); whatever the user
got wrong surfaces as one `DetentError`, never as pydantic's own list of errors.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from detent.errors import DetentError


def ConfigField(default: Any = ..., **details: Any) -> Any:  # noqa: N802 (used like pydantic's Field)
    """A field of a configuration class: its default, and what `pydantic.Field` takes (title, description, limits).

    Example:
        >>> from detent.config.base import ConfigField, ConfigModel
        >>> class MyConfig(ConfigModel):
        ...     strength: float = ConfigField(0.5, ge=0, le=1)
        >>> MyConfig(strength=0.25)["strength"]
        0.25
    """
    return Field(default, **details)


#: The name that existing configuration classes import.
ModeloptField = ConfigField


class ConfigModel(BaseModel, Mapping[str, Any]):
    """A checked set of named values that can also be used like a dictionary: ``c["x"]``, ``c.get("x")``, ``**c``.

    Raises:
        DetentError: a name that isn't a field, or a value that the field doesn't take; on creation and on assignment.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, arbitrary_types_allowed=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _one_sentence(type(self), error) from None

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """The object that `obj` (a mapping, or an object of this class) describes. Raises DetentError."""
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise _one_sentence(cls, error) from None

    def __setattr__(self, name: str, value: Any) -> None:
        before = dict(self.__dict__)
        try:
            super().__setattr__(name, value)
        except (ValidationError, DetentError) as error:
            self.__dict__.update(before)  # a validator of the whole object runs after the field has changed
            if isinstance(error, DetentError):
                raise
            raise _one_sentence(type(self), error) from None

    def __getitem__(self, name: str) -> Any:
        if name not in type(self).model_fields:
            raise KeyError(name)
        return getattr(self, name)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]
        return iter(type(self).model_fields)

    def __len__(self) -> int:
        return len(type(self).model_fields)

    def __contains__(self, name: object) -> bool:
        return name in type(self).model_fields

    def copy(self) -> Self:  # type: ignore[override]
        """A deep copy."""
        return self.model_copy(deep=True)


def nearest(word: str, known: Mapping[str, Any] | list[str], count: int = 1) -> list[str]:
    """The known words most like `word`, best first, without those that have little in common with it."""
    return difflib.get_close_matches(word, list(known), n=count, cutoff=0.6)


def shown(value: Any) -> str:
    """`value` as an error message shows it: `repr`, cut where it is long, and something else where it has none."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; an object that holds itself
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def size_in_bytes(text: str) -> int | None:
    """The bytes of a size such as 4GiB, 500MB or 8G; None where it is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B?", text, re.IGNORECASE)
    if found is None or not float(found[1]):
        return None
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " "))


def as_keywords(values: Mapping[Any, Any]) -> dict[str, Any]:
    """`values` for ``**``: what isn't text as a key becomes the text that a message about it shows."""
    return {name if isinstance(name, str) else shown(name): value for name, value in values.items()}


#: Characters of a value that a message shows.
_SHOWN = 200


def _one_sentence(cls: type[BaseModel], error: ValidationError) -> DetentError:
    return DetentError(f"{cls.__name__}: " + "; ".join(_problem(cls, problem) for problem in error.errors()))


def _problem(cls: type[BaseModel], problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        close = nearest(where, list(cls.model_fields))
        hint = f"did you mean {close[0]!r}?" if close else f"fields: {', '.join(cls.model_fields)}"
        return f"unknown field {shown(where)}; {hint}"
    if problem["type"] == "missing":
        return f"field {where!r} is required"
    if problem["type"] == "value_error":  # raised by our own validators: complete sentences already
        return str(problem["ctx"]["error"])
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{where}: {message}, not {shown(problem['input'])}"
