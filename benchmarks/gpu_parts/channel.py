"""Send what a part's process tells the one that started it: JSON lines through a pipe, apart from libraries' prints."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# Names the file with the task.
VARIABLE = "GPU_PARTS_TASK"


class Channel:
    """The writing end.

    Args:
        descriptor: of the pipe, inherited.
    """

    def __init__(self, descriptor: int) -> None:
        # What this process starts must not keep the pipe open.
        os.set_inheritable(descriptor, False)
        self._file = os.fdopen(descriptor, "w", buffering=1)

    def started(self, setting: str, limit: float) -> None:
        """A setting begins; after ``limit`` seconds the process is to be ended."""
        self._send(started=setting, limit=limit)

    def result(self, setting: str, status: str, **more: Any) -> None:
        """A setting has ended."""
        self._send(result={"setting": setting, "status": status, **more})

    def not_started(self, setting: str, reason: str) -> None:
        """There is too little time for a setting."""
        self._send(not_started=setting, reason=reason)

    def _send(self, **message: Any) -> None:
        self._file.write(json.dumps(message) + "\n")


def task() -> dict[str, Any]:
    """Read what this process is to do: ``part``, ``settings``, ``deadline``, ``descriptor`` of the pipe, and more."""
    return json.loads(Path(os.environ[VARIABLE]).read_text())
