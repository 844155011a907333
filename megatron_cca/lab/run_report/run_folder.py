"""Read what a run left in its folder: configuration, metrics, events and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

from megatron_cca.config import Config
from megatron_cca.config.load import config_from_dict, read_yaml
from megatron_cca.errors import UserError
from megatron_cca.training.run_log import METRICS_FILE, read_events, read_metrics

CONFIG_FILE, PICTURES = "config.yaml", "samples"
_BEGINNINGS = ("started", "resumed")
# The first steps build kernels and fill queues.
_WARM_UP = 3


@dataclass(frozen=True)
class RunFolder:
    """A run's folder.

    Attributes:
        folder: the folder.
        config: the run's configuration; None if this version does not read it.
        config_problem: why it does not.
        config_text: the configuration as the run wrote it.
        metrics: a row for each step, in order.
        events: in order.
        pictures: PNG files by the number of completed steps.
    """

    folder: Path
    config: Config | None
    config_problem: str
    config_text: str
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    pictures: dict[int, Path]

    @property
    def beginning(self) -> dict[str, Any]:
        """The newest event of a start; empty if there is none."""
        return next((one for one in reversed(self.events) if one["event"] in _BEGINNINGS), {})

    @property
    def steps(self) -> int:
        """Number of completed steps."""
        return int(self.metrics[-1]["step"]) + 1 if self.metrics else 0

    @property
    def seconds_of_steps(self) -> list[float]:
        """Seconds of each step that has a speed, without the first ones of each process."""
        fresh = {int(one["step"]) for one in self.events if one["event"] in _BEGINNINGS and "step" in one}
        skipped = {step + offset for step in fresh for offset in range(_WARM_UP)}
        rows = [row for row in self.metrics if row["step"] not in skipped] or self.metrics
        if self.config is None:
            return []
        batch = self.config.training.global_batch_size
        return [batch / speed for row in rows if (speed := row.get("samples_per_second"))]

    @property
    def seconds_a_step(self) -> float | None:
        """Median of :attr:`seconds_of_steps`."""
        return median(self.seconds_of_steps) if self.seconds_of_steps else None

    @property
    def peak_memory_gib(self) -> float | None:
        """Largest ``peak_memory_gib``, that of rank 0."""
        found = [row["peak_memory_gib"] for row in self.metrics if row.get("peak_memory_gib") is not None]
        return max(found, default=None)

    def state(self) -> tuple[str, bool]:
        """Return how the run ended in words, and whether it ended as it should."""
        kinds = ("finished", "stopped", "failed", *_BEGINNINGS)
        last = next((one for one in reversed(self.events) if one["event"] in kinds), None)
        if last is None:
            return f"{self.steps} steps; its events do not say how it ended", False
        if last["event"] == "finished":
            return f"finished at step {last.get('step', self.steps)}", True
        if last["event"] == "stopped":
            return f"stopped at step {last.get('step', '?')} by {last.get('signal', 'a signal')}", False
        if last["event"] == "failed":
            return f"failed at step {last.get('step', '?')}: {last.get('error', 'see its output')}", False
        return f"no end is on record after step {self.steps}: it still trains, or was killed", False

    def wall_time(self) -> timedelta | None:
        """Return the time between the first and the last event."""
        times = [one["time"] for one in self.events if isinstance(one.get("time"), str)]
        try:
            return datetime.fromisoformat(times[-1]) - datetime.fromisoformat(times[0]) if times else None
        except ValueError:
            return None


def read_run(folder: Path) -> RunFolder:
    """Read a run's folder.

    Raises:
        UserError: no folder of a run, or a damaged file in it; names it.
    """
    if not folder.is_dir():
        raise UserError(f"run: {folder} is no folder; give the training.output_dir of a run")
    file = folder / CONFIG_FILE
    if not file.is_file() or not (folder / METRICS_FILE).is_file():
        missing = METRICS_FILE if file.is_file() else CONFIG_FILE
        raise UserError(f"run: {folder} has no {missing}; give the training.output_dir of a run{_runs_below(folder)}")
    config, problem = _config(file)
    metrics = read_metrics(folder)
    if not metrics:
        raise UserError(f"run: {folder / METRICS_FILE} has no step yet; wait for the first")
    text = file.read_text(encoding="utf-8", errors="replace")
    return RunFolder(folder, config, problem, text, metrics, read_events(folder), _pictures(folder / PICTURES))


def _config(file: Path) -> tuple[Config | None, str]:
    tree = read_yaml(file, "run", "sections", Config)
    try:
        return config_from_dict(tree), ""
    except UserError as error:
        return None, f"{file.name} is of another version: {error}"


def _runs_below(folder: Path) -> str:
    found: Sequence[str] = sorted(path.parent.name for path in folder.glob(f"*/{METRICS_FILE}"))
    return f", such as {folder / found[0]}" if found else ""


def _pictures(folder: Path) -> dict[int, Path]:
    found = {}
    for path in folder.glob("step_*.png"):
        number = path.stem.removeprefix("step_")
        if number.isdecimal():
            found[int(number)] = path
    return dict(sorted(found.items()))
