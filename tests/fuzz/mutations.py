"""Generated input: JSON documents with something changed in them, and files with some of their bytes changed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any, TypeVar

import hypothesis
from hypothesis import strategies as st

from detent.errors import DetentError

T = TypeVar("T")

#: What stands where something else is expected.
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 600, 2**31, 2**63, -(2**63), 10**30, 0.5, 1e308, float("nan"), float("inf"),
    "", "x", "0", "4", "re:(", "~x", "../x", "a\0b", "\ud800", "x" * 5000, "org/name",
    [], [None], [0], [-1, 0], ["x"], [[]], {}, {"x": 1}, {"": None},
]  # fmt: skip

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
_nested = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
#: A copy each time: what is put into a document may be changed there.
values = (st.sampled_from(ODD) | _nested).map(copy.deepcopy)


def dose(share: float) -> Callable[[Any], Any]:
    """So many of the examples that the profile asks for: properties whose examples take long take fewer."""
    settings = hypothesis.settings()
    return hypothesis.settings(
        max_examples=max(1, round(settings.max_examples * share)),
        suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
    )


def places(document: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of everything in a JSON document, itself included."""
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [prefix, *(place for key, value in inner for place in places(value, (*prefix, key)))]


def changed(document: Any) -> st.SearchStrategy[Any]:
    """A document in which one to three things are replaced, removed, renamed or added."""

    @st.composite
    def strategy(draw: Any) -> Any:
        result = copy.deepcopy(document)
        for _ in range(draw(st.integers(1, 3))):
            place = draw(st.sampled_from(places(result)))
            kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
            if not place:
                if kind == "replace" and draw(st.integers(0, 9)) == 0:
                    return draw(values)
                continue
            owner = result
            for key in place[:-1]:
                owner = owner[key]
            if kind == "remove":
                del owner[place[-1]]
            elif kind == "add" and isinstance(owner, dict):
                owner[draw(st.text(max_size=8))] = draw(values)
            else:
                owner[place[-1]] = draw(values)
        return result

    return strategy()


def as_text(document: Any) -> st.SearchStrategy[bytes]:
    """A changed document as text; one in ten is then cut, or has characters put in."""

    @st.composite
    def strategy(draw: Any) -> bytes:
        text = json.dumps(draw(changed(document))).encode()
        if draw(st.integers(0, 9)) == 0:
            at = draw(st.integers(0, len(text)))
            text = text[:at] + draw(st.sampled_from([b"", b"[" * 2000, b"\xff", b"1" * 5000, b'{"a":1,"a":2}', b"\0"]))
        return text

    return strategy()


def flipped(data: bytes, first: int) -> st.SearchStrategy[bytes]:
    """The bytes of a file with one to four of them changed, most among the `first` ones; or cut, or prolonged."""

    @st.composite
    def strategy(draw: Any) -> bytes:
        result = bytearray(data)
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, min(first, len(result)) - 1) | st.integers(0, len(result) - 1))
            result[at] = draw(st.integers(0, 255))
        kind = draw(st.integers(0, 9))
        if kind == 0:
            return bytes(result[: draw(st.integers(0, len(result)))])
        return bytes(result) + (draw(st.binary(min_size=1, max_size=9)) if kind == 1 else b"")

    return strategy()


def clear(function: Callable[..., T], *arguments: Any, **options: Any) -> T | None:
    """What a function returns, or None where it refuses with one clear message. Anything else comes out."""
    try:
        return function(*arguments, **options)
    except DetentError as error:
        message = str(error)
        assert 10 < len(message) < 2000, message
        return None
