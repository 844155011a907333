"""The exceptions that a user is meant to read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input. The message is one line: which key or file, what is wrong, what would be right.

    Command-line programs print it without a traceback and exit with status 2.
    """


class Stopped(Exception):
    """A run that was asked to go has saved and goes. The message is one line.

    Attributes:
        status: the exit code, 128 + the signal's number: launchers know it as one to restart on.
    """

    def __init__(self, line: str, signal_number: int) -> None:
        super().__init__(line)
        self.status = 128 + signal_number


@contextmanager
def said_of(where: object) -> Iterator[None]:
    """Begin every :class:`UserError` from inside with the option, file or folder that it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
