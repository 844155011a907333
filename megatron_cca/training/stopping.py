"""Stop a run on a signal: it finishes its step, saves, and exits in a way that lets launchers restart it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType

from megatron_cca.signals import STOPPING, handle, restore

# A terminal and a launcher may both send the signal of one Ctrl-C.
_SAME_SECONDS = 1.0


class StopRequest:
    """A block that records the first signal of :data:`signals.STOPPING`, so that it does not end the process.

    A later Ctrl-C raises KeyboardInterrupt.

    Attributes:
        number: of the signal that came. 0 while none has come.
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
            # Not print, since the signal may have interrupted one.
            with contextlib.suppress(OSError):
                os.write(2, b"\nmegatron_cca: the run ends this step and saves; Ctrl-C again ends it at once\n")
