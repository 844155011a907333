"""Exceptions whose messages are for users."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_MAX_LENGTH = 2000


class UserError(ValueError):
    """Invalid input. The message is one line: which key or file, what is wrong, what would be right.

    Command-line programs print it without a traceback and exit with status 2. Names and values in it are often foreign.
    The message is therefore escaped and shortened to one line that a terminal can show.
    """

    def __init__(self, message: object) -> None:
        super().__init__(shortened(one_line(str(message)), _MAX_LENGTH))


class SurroundingsError(Exception):
    """A fault of a cache, a temporary folder or the like. The message is one line: which folder, which variable to set.

    It is no :class:`UserError`, since readers take that for a fault of the file that they read. Programs end in the
    same way for both.
    """

    def __init__(self, message: object) -> None:
        super().__init__(shortened(one_line(str(message)), _MAX_LENGTH))


def one_line(text: str) -> str:
    """Return the text with escapes in place of line breaks, other control characters and lone surrogates."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )


def shortened(text: str, length: int) -> str:
    """Return the text, with "..." in place of its middle if it is longer than ``length``."""
    return text if len(text) <= length else f"{text[: length // 2]}...{text[-length // 2 :]}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class where there is no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class Stopped(Exception):
    """The end of a run that has saved because it was asked to stop. The message is one line.

    Attributes:
        status: the exit code, 128 + the signal's number. Launchers restart a job that ends with it.
    """

    def __init__(self, line: str, signal_number: int) -> None:
        super().__init__(line)
        self.status = 128 + signal_number


@contextmanager
def error_context(where: object) -> Iterator[None]:
    """Prefix every :class:`UserError` from inside the block with the option, file or folder that it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
