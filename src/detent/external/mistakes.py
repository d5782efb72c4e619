"""What other libraries raise over files and values that they cannot use, as one `DetentError`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from detent.errors import DetentError

#: Whatever a library that reads odd values may raise, or Python code that comes with a checkpoint. Bugs can't be
#: distinguished from faults of the values.
MISTAKES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


@contextmanager
def as_detent_error(
    tell: Callable[[BaseException], str],
    *,
    more: tuple[type[BaseException], ...] = (),
    but: tuple[type[BaseException], ...] = (),
) -> Iterator[None]:
    """Raise what a library raises in the block as a `DetentError`.

    Args:
        tell: makes the message from it.
        more: the library's own errors, in addition to `MISTAKES`.
        but: those of `MISTAKES` that pass as they are; `DetentError` always does.
    """
    try:
        yield
    except BaseException as error:
        # The tokenizers library raises the class Exception itself.
        theirs = isinstance(error, (*MISTAKES, *more)) or type(error) is Exception
        if theirs and not isinstance(error, (DetentError, *but)):
            raise DetentError(tell(error)) from error
        raise


def first_line(error: BaseException) -> str:
    """The first line of an error's text, which may quote a whole file, cut to 400 characters; or its name."""
    lines = str(error).strip().splitlines()
    return lines[0].strip()[:400] if lines else type(error).__name__
