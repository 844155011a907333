"""Record where each rank is in its step. If a rank hangs, name it and its place, print its stack, and end the job."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from types import TracebackType

import torch.distributed as dist

from megatron_cca.reporting import end_with
from megatron_cca.training.run_log import RunLog

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
_TICKS = 10
_LONGEST_TICK_SECONDS = 5.0
_STACK_FRAMES = 12
# The others exit so much later than the rank at fault. torchrun then names that rank as the root cause.
_OTHERS_WAIT_SECONDS = 5.0
# In jobs of more ranks only one rank of each machine reads what the others posted, to spare the store.
_ALL_ASK = 64


@dataclass(frozen=True)
class Place:
    """The place of a rank in its work.

    Attributes:
        step, phase: what it works on. The phase is one of :data:`PHASES`.
        since: ``time.monotonic()`` of the last sign of progress.
        patience: how many times longer than usual the phase may take.
    """

    step: int
    phase: str
    since: float
    patience: float


class PhaseTracker:
    """The phase that this rank is in. The training loop records it, and the watchdog's thread reads it."""

    def __init__(self) -> None:
        self.place = Place(0, PHASES[0], time.monotonic(), 1.0)
        self._launcher_heartbeat = _launcher_heartbeat()

    def at(self, phase: str, step: int | None = None, *, patience: float = 1.0) -> None:
        """Record that a phase begins."""
        self.place = Place(self.place.step if step is None else step, phase, time.monotonic(), patience)

    def beat(self) -> None:
        """Record progress within the current phase: another microbatch, another picture."""
        self.at(self.place.phase, patience=self.place.patience)

    def step_done(self) -> None:
        """Tell NVIDIA's fault-tolerant launcher, if it started this rank, that a step has ended."""
        self._launcher_heartbeat()


def watched(progress: PhaseTracker, log: RunLog, timeout_seconds: float) -> AbstractContextManager:
    """Return a :class:`Watchdog` around a block, or a context that does nothing if ``timeout_seconds`` is 0."""
    return Watchdog(progress, log, timeout_seconds) if timeout_seconds else nullcontext()


class Watchdog:
    """A thread on every rank that reports where the rank is, and notices when the rank makes no progress.

    Args:
        progress: what the training loop records.
        log: the log of a hang.
        timeout_seconds: longest time without progress. A phase's patience multiplies it.
    """

    def __init__(self, progress: PhaseTracker, log: RunLog, timeout_seconds: float) -> None:
        self._progress, self._log, self._timeout = progress, log, timeout_seconds
        self._tick = min(timeout_seconds / _TICKS, _LONGEST_TICK_SECONDS)
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        # A separate connection, since the main thread may be waiting in its own one.
        self._store = dist.distributed_c10d._get_default_store().clone()
        self._store.set_timeout(timedelta(seconds=max(1.0, self._tick)))
        self._asks = self._ranks <= _ALL_ASK or os.environ.get("LOCAL_RANK", "0") == "0"
        self._stopping = threading.Event()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._progress.beat()
        # Post before the first step, so that a rank which hangs in it has been seen.
        self._post(0, self._progress.place)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopping.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        beats = 0
        while not self._stopping.wait(self._tick):
            beats += 1
            place = self._progress.place
            limit = self._timeout * place.patience
            # If a hang keeps the interpreter's lock, this thread stops, too. This timer needs no interpreter.
            faulthandler.dump_traceback_later(limit + 2 * self._timeout, exit=True)
            self._post(beats, place)
            if time.monotonic() - place.since > limit:
                self._hangs(place, beats)

    def _post(self, beats: int, place: Place) -> None:
        # The process that hosts the store may be the one that hangs.
        with suppress(Exception):
            self._store.set(_key(self._rank), json.dumps([beats, place.step, place.phase]))

    def _hangs(self, place: Place, beats: int) -> None:
        first = self._read_all()
        for number in range(1, 4):
            time.sleep(self._tick)
            self._post(beats + number, place)
        if self._progress.place != place:
            return
        second = self._read_all()
        seconds = time.monotonic() - place.since
        at_fault, reason = (
            ranks_at_fault(first, second, self._rank, self._ranks)
            if self._asks
            else ([], "see what the other ranks say")
        )
        line = f"megatron_cca: no progress for {seconds:.0f} s in step {place.step}, {place.phase}: {reason}"
        silent = {rank for rank in at_fault if first.get(rank) == second.get(rank)}
        if self._rank not in at_fault and not (silent and self._rank == min({*range(self._ranks)} - silent)):
            time.sleep(_OTHERS_WAIT_SECONDS)
        stack = traceback.format_stack(sys._current_frames()[self._main])[-_STACK_FRAMES:]
        self._log.own_event("hang", step=place.step, phase=place.phase, reason=reason, stack=stack)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        end_with(f"{line}\nstack of rank {self._rank}, innermost last:\n{''.join(stack)}{line}", status=1)

    def _read_all(self) -> dict[int, list]:
        """Return what each rank posted last, as far as the store answers."""
        if not self._asks:
            return {}
        everyone = range(self._ranks)
        with suppress(Exception):
            return self._answers(everyone)
        # Some rank has never posted, or the process that hosts the store hangs.
        with suppress(Exception):
            return self._answers([rank for rank in everyone if self._store.check([_key(rank)])])
        return {}

    def _answers(self, ranks: Sequence[int]) -> dict[int, list]:
        answers = self._store.multi_get([_key(rank) for rank in ranks])
        return {rank: json.loads(answer) for rank, answer in zip(ranks, answers, strict=True)}


def ranks_at_fault(
    first: Mapping[int, Sequence], second: Mapping[int, Sequence], rank: int, ranks: int
) -> tuple[list[int], str]:
    """Return which ranks the others wait for, and why, from two readings of what each posted (beats, step, phase).

    Args:
        first, second: the readings, by rank. The second one is several beats later.
        rank: the rank that asks. It is alive.
        ranks: the number of ranks of the job.
    """
    silent = [other for other in first if other != rank and first[other] == second.get(other)]
    if rank not in second:
        return [], "the rendezvous store does not answer: its host, or rank 0, is stopped or gone"
    unseen = [other for other in range(ranks) if other not in second]
    if unseen:
        return unseen, f"no sign of life from {_named(unseen)}: never seen in this attempt"
    if silent:
        _, step, phase = first[silent[0]]
        return silent, f"no sign of life from {_named(silent)}: stopped or gone; last seen in step {step}, {phase}"
    places = {other: (step, PHASES.index(phase)) for other, (_, step, phase) in second.items()}
    behind = min(places.values())
    if behind == max(places.values()):
        return sorted(places), "all ranks are there, in a communication that does not end"
    late = [other for other, place in places.items() if place == behind]
    return late, f"waiting for {_named(late)}, still in step {behind[0]}, {PHASES[behind[1]]}"


def _launcher_heartbeat() -> Callable[[], None]:
    """Return ``send_heartbeat`` of nvidia-resiliency-ext under its ``ft_launcher``. Elsewhere it does nothing."""
    if "FT_RANK_MONITOR_IPC_SOCKET" not in os.environ or find_spec("nvidia_resiliency_ext") is None:
        return lambda: None
    from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient

    client = RankMonitorClient()
    client.init_workload_monitoring()
    return client.send_heartbeat


def _named(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, sorted(ranks)[:8])) + (" and others" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"


def _key(rank: int) -> str:
    # The key lacks torchrun's count of restarts, which differs between machines. A later attempt has another store. On
    # a single machine it has its own prefix (platform.process_group_options).
    return f"watchdog/{rank}"
