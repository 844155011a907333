"""Where a rank is in its step, for whoever watches whether it moves."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

PHASES = (
    "reading the batch",
    "receiving the batch",
    "reference pass",
    "policy pass",
    "optimizer step",
    "validation",
    "drawing pictures",
    "saving",
)


@dataclass(frozen=True)
class Place:
    """A moment of a rank's work.

    Attributes:
        step, phase: what it works on; one of :data:`PHASES`.
        since: ``time.monotonic()`` of the last sign of progress.
        patience: how many times longer than usual this may take.
    """

    step: int
    phase: str
    since: float
    patience: float


class Progress:
    """Told by the training loop, read by the watchdog's thread."""

    def __init__(self) -> None:
        self.place = Place(0, PHASES[0], time.monotonic(), 1.0)
        self._launcher_heartbeat = _launcher_heartbeat()

    def at(self, phase: str, step: int | None = None, *, patience: float = 1.0) -> None:
        """A phase begins."""
        self.place = Place(self.place.step if step is None else step, phase, time.monotonic(), patience)

    def beat(self) -> None:
        """The present phase goes on: another microbatch, another picture."""
        self.at(self.place.phase, patience=self.place.patience)

    def step_done(self) -> None:
        """Tell NVIDIA's fault-tolerant launcher, where it has started this rank, that a step has ended."""
        self._launcher_heartbeat()


def _launcher_heartbeat() -> Callable[[], None]:
    """``send_heartbeat`` of nvidia-resiliency-ext under its ``ft_launcher``; elsewhere nothing."""
    if "FT_RANK_MONITOR_IPC_SOCKET" not in os.environ or find_spec("nvidia_resiliency_ext") is None:
        return lambda: None
    from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient

    client = RankMonitorClient()
    client.init_workload_monitoring()
    return client.send_heartbeat
