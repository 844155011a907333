"""The one exception that a user is meant to read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input. The message is one line: which key or file, what is wrong, what would be right.

    Command-line programs print it without a traceback and exit with status 2.
    """


@contextmanager
def said_of(where: object) -> Iterator[None]:
    """Begin every :class:`UserError` from inside with the option, file or folder that it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
