"""A log in a file that others may move or remove while a run writes it."""

from __future__ import annotations

import os
from pathlib import Path


class LineFile:
    """Appends lines to a file, each in one write. Where the file is gone, it is begun anew.

    Args:
        path: of the file; its folder exists.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # Unbuffered, so that no line waits for room that never comes.
        self._file = path.open("ab", buffering=0)

    def append(self, line: str) -> bool:
        """Append a line; returns whether the file was gone.

        Raises:
            OSError: what the file system refuses. The next line may have more luck.
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
        # What is written into a removed file goes nowhere, without an error.
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Write no more."""
        self._file.close()
