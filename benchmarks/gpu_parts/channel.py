"""Messages of a part's process to the process that started it.

They are JSON lines through a pipe. The output of libraries does not mix with them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# The variable with the path of the task's file.
VARIABLE = "GPU_PARTS_TASK"


class Channel:
    """The writing end of the pipe.

    Args:
        descriptor: the inherited file descriptor of the pipe.
    """

    def __init__(self, descriptor: int) -> None:
        # The processes that this one starts must not keep the pipe open.
        os.set_inheritable(descriptor, False)
        self._file = os.fdopen(descriptor, "w", buffering=1)

    def started(self, setting: str, limit: float) -> None:
        """Send that a setting begins; after ``limit`` seconds the process must be ended."""
        self._send(started=setting, limit=limit)

    def result(self, setting: str, status: str, **more: Any) -> None:
        """Send that a setting has ended."""
        self._send(result={"setting": setting, "status": status, **more})

    def not_started(self, setting: str, reason: str) -> None:
        """Send that there is too little time for a setting."""
        self._send(not_started=setting, reason=reason)

    def _send(self, **message: Any) -> None:
        self._file.write(json.dumps(message) + "\n")


def task() -> dict[str, Any]:
    """Read the task of this process.

    It has ``part``, ``settings``, ``deadline``, ``descriptor`` of the pipe, and more.
    """
    return json.loads(Path(os.environ[VARIABLE]).read_text())
