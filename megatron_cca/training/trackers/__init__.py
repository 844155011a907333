"""Trackers of experiments beside TensorBoard: one file each, one interface, and no way to stop or slow a run.

Rank 0 reports to them. Each has a thread of its own, which opens it and feeds it, so that training waits for no server.
What fails there is said in one line, and that tracker gets no more.
"""

from __future__ import annotations

import importlib.machinery
import json
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Full, Queue
from types import TracebackType
from typing import Protocol

from megatron_cca.config import Config, LoggingConfig
from megatron_cca.errors import Stopped, UserError, shortened
from megatron_cca.io.outputs import write_json
from megatron_cca.parallel.ranks import described
from megatron_cca.training.run_log import LOGGER, RunLog

IDS_FILE = "trackers.json"
# Events that a person wants to be told of at once.
ALERTS = ("alarm", "failed", "hang")
FINISHED, FAILED, STOPPED = "finished", "failed", "stopped"
_KEYS = ("wandb", "mlflow")
# A step is one entry. A tracker that is so far behind does not catch up.
_LONGEST_QUEUE = 10_000
_SECONDS_TO_END, _SECONDS_TO_SAY = 60.0, 5.0
_END = object()
_ids_lock = threading.Lock()


class Tracker(Protocol):
    """A tracker. One thread makes it and calls it. Any exception from it ends it, and nothing else."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of a step, which counts from 0. All are finite."""

    def picture(self, step: int, name: str, file: Path) -> None:
        """Log a PNG file, drawn after ``step`` steps, under a name."""

    def event(self, event: str, line: str, details: Mapping[str, object]) -> None:
        """Log an event as ``events.jsonl`` has it. ``line`` is its text for a person, and may be empty."""

    def close(self, how: str) -> None:
        """Write the rest. ``how`` the run ended: ``finished``, ``failed`` or ``stopped``."""


def check_trackers(config: LoggingConfig) -> None:
    """Refuse trackers whose package is missing, and a ``logging.wandb`` that names no project.

    Raises:
        UserError: the message names the key.
    """
    for name in _KEYS:
        if getattr(config, name) is None:
            continue
        # Asked of the path alone, whatever has been imported or hidden: see megatron_compat/start.py.
        found = importlib.machinery.PathFinder.find_spec(name)
        if found is None or found.origin is None:
            raise UserError(
                f"logging.{name}: needs a package that is not installed; pip install 'megatron-cca[trackers]', or "
                "leave it out"
            )
    parts = [] if config.wandb is None else config.wandb.split("/")
    if len(parts) > 2 or not all(parts):
        raise UserError(f"logging.wandb: {config.wandb}: must be a project, or an entity and a project: me/images")


class Trackers(logging.Handler):
    """The trackers of a run, open within a ``with`` block on rank 0.

    Args:
        config: of the run.
        log: its ``metrics`` are set. They feed the trackers from now on, and so do the logger's events.
    """

    def __init__(self, config: Config, log: RunLog) -> None:
        super().__init__()
        self._log = log
        self._feeds = [
            _Feed(f"logging.{name}", opening, config)
            for name, opening in (("wandb", _open_wandb), ("mlflow", _open_mlflow))
            if getattr(config.logging, name) is not None
        ]

    def createLock(self) -> None:
        """Have no lock: events only join a queue, and the thread that reports a hang must not wait for another one."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        """Pass an event on. Any thread may call it."""
        event = getattr(record, "event", None)
        if event is not None:
            self._give(lambda tracker: tracker.event(event, record.getMessage(), record.details))

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Pass the metrics of a step on, without those that are not finite."""
        finite = {name: value for name, value in values.items() if value is not None}
        self._give(lambda tracker: tracker.scalars(step, finite))

    def picture(self, step: int, name: str, file: Path) -> None:
        """Pass a PNG file on, which stays in its place."""
        self._give(lambda tracker: tracker.picture(step, name, file))

    def _give(self, call: Callable[[Tracker], None]) -> None:
        for feed in self._feeds:
            feed.give(call)

    def __enter__(self) -> Trackers:
        self._log.metrics.trackers = self
        LOGGER.addHandler(self)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        how = FINISHED if error is None else STOPPED if isinstance(error, Stopped) else FAILED
        LOGGER.removeHandler(self)
        self._log.metrics.trackers = None
        for feed in self._feeds:
            feed.end(how)
        for feed in self._feeds:
            feed.wait()


class _Feed:
    """The thread of one tracker."""

    def __init__(self, key: str, opening: Callable[[Config], Tracker], config: Config) -> None:
        self._key, self._opening, self._config = key, opening, config
        self._queue: Queue = Queue(_LONGEST_QUEUE)
        self._is_lost, self._lost_lock, self._said = False, threading.Lock(), threading.Event()
        self._how = FINISHED
        # It must not keep a process alive whose run has failed.
        self._thread = threading.Thread(target=self._run, name=key, daemon=True)
        self._thread.start()

    def give(self, call: Callable[[Tracker], None]) -> None:
        if self._is_lost:
            return
        try:
            self._queue.put_nowait(call)
        except Full:
            self._lose(f"is {_LONGEST_QUEUE} entries behind")

    def end(self, how: str) -> None:
        self._how = how
        if not self._is_lost:
            self.give(_END)

    def wait(self) -> None:
        if self._is_lost:
            # The line about it may be on its way in the other thread, and the log is closed next.
            self._said.wait(_SECONDS_TO_SAY)
            return
        self._thread.join(_SECONDS_TO_END)
        if self._thread.is_alive():
            self._lose(f"has not taken everything {_SECONDS_TO_END:g} seconds after the end")

    def _run(self) -> None:
        try:
            tracker = self._opening(self._config)
            while (call := self._queue.get()) is not _END and not self._is_lost:
                call(tracker)
            tracker.close(self._how)
        except Exception as error:
            self._lose(shortened(described(error), 300))

    def _lose(self, why: str) -> None:
        with self._lost_lock:
            was_lost, self._is_lost = self._is_lost, True
        if not was_lost:
            line = f"{self._key}: {why}; the run goes on without it"
            LOGGER.info(line, extra={"event": "logs_lost", "details": {"reason": line}})
            self._said.set()


def known_id(folder: Path, name: str, where: str) -> str | None:
    """Return the id of this run in a tracker, which :func:`keep_id` has kept in the run's folder. None without one.

    Args:
        folder: of the run.
        name: of the tracker.
        where: the project or experiment. A run of another one is not continued.

    Raises:
        UserError: the file is not one that a run wrote.
    """
    entry = _ids(folder / IDS_FILE).get(name, {})
    return entry["id"] if entry.get("where") == where else None


def keep_id(folder: Path, name: str, where: str, run_id: str) -> None:
    """Keep the id of this run in a tracker for :func:`known_id`."""
    path = folder / IDS_FILE
    with _ids_lock:
        write_json(path, _ids(path) | {name: {"where": where, "id": run_id}})


def _ids(path: Path) -> dict[str, dict[str, str]]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        valid = all(isinstance(one["id"], str) and isinstance(one["where"], str) for one in found.values())
    except (ValueError, TypeError, KeyError, AttributeError):
        valid = False
    if not valid:
        raise UserError(f"{path}: is not the file of ids that a run writes; remove it to begin anew")
    return found


def _open_wandb(config: Config) -> Tracker:
    from megatron_cca.training.trackers.to_wandb import WandbTracker

    return WandbTracker(config)


def _open_mlflow(config: Config) -> Tracker:
    from megatron_cca.training.trackers.to_mlflow import MlflowTracker

    return MlflowTracker(config)
