"""Being asked to go: a signal lets a run finish its step, save, and leave in a way that launchers restart."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType

from megatron_cca.signals import STOPPING, handle, restore

# A terminal and a launcher may both pass on one Ctrl-C.
_SAME_SECONDS = 1.0


class StopRequest:
    """Within its block, notes the first of :data:`signals.STOPPING` instead of dying of it.

    A Ctrl-C that follows is taken at its word: it raises KeyboardInterrupt.

    Attributes:
        number: of the signal that came; 0 while none has.
    """

    def __init__(self) -> None:
        self.number = 0
        self._came = 0.0
        self._before: dict = {}

    def __enter__(self) -> StopRequest:
        self._before = handle(STOPPING, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        restore(self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number:
            if number == signal.SIGINT and now - self._came > _SAME_SECONDS:
                raise KeyboardInterrupt
            return
        self.number, self._came = number, now
        if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
            # Not print, which this may have interrupted.
            with contextlib.suppress(OSError):
                os.write(2, b"\nmegatron_cca: the run ends this step and saves; Ctrl-C again ends it at once\n")
