"""The exceptions that a user is meant to read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_MAX_LENGTH = 2000


class UserError(ValueError):
    """Bad input. The message is one line: which key or file, what is wrong, what would be right.

    Command-line programs print it without a traceback and exit with status 2. Names and values in it are often foreign;
    whatever they hold, it stays one line that a terminal can show.
    """

    def __init__(self, message: object) -> None:
        super().__init__(shortened(one_line(str(message)), _MAX_LENGTH))


class SurroundingsError(Exception):
    """A cache, a temporary folder or the like that cannot be used. The message is one line: which folder, what to set.

    No :class:`UserError`, which readers take for a fault of what they read. Programs end with it in the same way.
    """

    def __init__(self, message: object) -> None:
        super().__init__(shortened(one_line(str(message)), _MAX_LENGTH))


def one_line(text: str) -> str:
    """The text with escapes in place of line breaks, other control characters and lone surrogates."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )


def shortened(text: str, length: int) -> str:
    """The text, with "..." in place of its middle if it is longer than ``length``."""
    return text if len(text) <= length else f"{text[: length // 2]}...{text[-length // 2 :]}"


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
