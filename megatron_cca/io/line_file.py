"""A log file that others may move or remove while a run writes it."""

from __future__ import annotations

import os
from pathlib import Path


class LineFile:
    """A file of lines. Each line is appended in one write, and a missing file is made anew.

    Args:
        path: of the file. Its folder exists.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # Unbuffered, so that no line waits in memory for a full disk.
        self._file = path.open("ab", buffering=0)

    def append(self, line: str) -> bool:
        """Append a line, and return whether the file was missing.

        Raises:
            OSError: an error of the file system. A later line may succeed.
        """
        is_gone = not self._is_there()
        if is_gone:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            anew = self._path.open("ab", buffering=0)
            self.close()
            self._file = anew
        self._file.write(f"{line}\n".encode())
        return is_gone

    def _is_there(self) -> bool:
        # Writing into a removed file raises no error.
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Close the file."""
        self._file.close()
