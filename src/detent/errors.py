"""The exceptions that a user's mistake raises."""

from __future__ import annotations


class DetentError(ValueError):
    """A request that cannot be met: the message says what, where, what is allowed and what to do.

    The command line prints the message alone and exits with code 2; it never shows a traceback for this class.

    Example:
        >>> import detent
        >>> try:
        ...     detent.parse_scheme("int5_per_moon")
        ... except detent.DetentError as error:
        ...     print(str(error).partition(";")[0])
        unknown scheme 'int5_per_moon'
    """

    #: Whether another process of the same run shows it.
    told = False


class NothingObserved(DetentError):
    """A range or bias is asked of an observer that no data has reached."""
