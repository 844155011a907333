"""The order of the parts: one after the other, each in processes of its own and within its share of the time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_parts import lines
from gpu_parts.lines import Line
from gpu_parts.process import PartProcess
from gpu_parts.settings import TESTS, WEIGHTS, Setting, settings_of

# A test does not start with less time left.
TEST_SECONDS = 10.0
# The time that a process needs before its first setting: imports, and the device's context.
START_SECONDS = 15.0
# pytest has run all tests. A later call does not start it again.
ALL_TESTS = "(all)"


def shares(weights: dict[str, float], seconds: float) -> dict[str, float]:
    """Return the seconds of each part by weight, if all start now.

    The parts that follow share the time that one leaves over.

    Args:
        weights: weights of the parts that have something left to do.
        seconds: time for all of them.
    """
    whole = sum(weights.values())
    return {part: seconds * weight / whole for part, weight in weights.items()}


@dataclass
class Runner:
    """One call of the program.

    Attributes:
        output: the file of results.
        about: the card and the versions, which each line has.
        deadline: end of the call, by ``time.time()``.
        overrides: overrides of configuration keys, by part.
        again: whether to measure settings that have a result, too.
        command: returns the command of a part's process; None means the usual one.
        say: prints a line.
    """

    output: Path
    about: dict[str, Any]
    deadline: float
    overrides: dict[str, list[str]] = field(default_factory=dict)
    again: bool = False
    command: Callable[[str], list[str] | None] = lambda part: None
    say: Callable[[str], None] = print

    def __post_init__(self) -> None:
        lines.end_whole_lines(self.output)
        self._before = self._lines()
        # In this call, by part: the settings with a line, and those without time to start.
        self._finished: dict[str, set[str]] = {part: set() for part in WEIGHTS}
        self._not_started: dict[str, str] = {}

    @property
    def rehearses(self) -> bool:
        """Whether there is no GPU."""
        return not self.about["cuda_visible"]

    @property
    def left_out(self) -> list[str]:
        """The parts and settings without time to start, each with the reason."""
        return [f"{name}: {reason}" for name, reason in self._not_started.items()]

    def run(self, parts: Sequence[str]) -> None:
        """Run the parts in order, then again those whose share was too small, as long as there are new results.

        Each part begins with a clean device, however the one before ended.
        """
        ordered = [part for part in WEIGHTS if part in parts]
        for part in ordered:
            if not self.has_work(part):
                self.say(f"{part}: nothing is left to measure; --again measures it anew")
        if time.time() >= self.deadline:
            for part in filter(self.has_work, ordered):
                self.leave_out(part, "no time was left to start it")
        results = -1
        while results < self._count() and time.time() < self.deadline:
            results = self._count()
            self._not_started.clear()
            for position, part in enumerate(ordered):
                later = {one: WEIGHTS[one] for one in ordered[position:] if self.has_work(one)}
                if part in later:
                    now = time.time()
                    share = shares(later, self.deadline - now)[part]
                    # A rehearsal must be complete. The time of a CPU says nothing about a GPU.
                    self._run_part(part, self.deadline if self.rehearses else now + share)

    def pending(self, part: str) -> list[Setting]:
        """Return the settings of a part without a result."""
        done = self.done(part)
        return [one for one in settings_of(part, self.rehearses, self._lines()) if one.name not in done]

    def done(self, part: str) -> set[str]:
        """Return the names of settings that must not run again, because they have a result."""
        if self.again:
            return self._finished[part]
        alike = {"part": part, "overrides": self.overrides.get(part, []), **self._common()}
        mine = [line for line in self._before if lines.key(line) == lines.key({**alike, "setting": line["setting"]})]
        # A later call may have more time for settings that ran out of it.
        return self._finished[part] | {line["setting"] for line in mine if line["status"] != lines.OUT_OF_TIME}

    def has_work(self, part: str) -> bool:
        """Check whether a part has something left to do."""
        return ALL_TESTS not in self.done(part) if part == TESTS else bool(self.pending(part))

    def record(self, part: str, result: dict[str, Any]) -> None:
        """Write a result: ``setting``, ``status``, and ``figures`` or a ``reason``."""
        date = datetime.now(UTC).isoformat(timespec="seconds")
        line = {
            "part": part,
            "date": date,
            "settings": {},
            "overrides": self.overrides.get(part, []),
            **result,
            **self._common(),
        }
        baseline = self._baseline(line)
        if baseline is not None:
            line["beside"] = lines.beside(line, baseline)
        self._finished[part].add(line["setting"])
        lines.append(self.output, line)
        if line["status"] in (lines.PASSED, lines.SKIPPED):
            # There are hundreds of them. The table counts them.
            return
        told = result.get("reason") or lines.short(line)
        note = "rehearsal: " if self.rehearses else ""
        self.say(f"  {note}{line['setting']}: {line['status']}{'; ' * bool(told)}{told}")

    def leave_out(self, name: str, reason: str) -> None:
        """Note that something does not start, and why."""
        self._not_started[name] = reason

    def _run_part(self, part: str, deadline: float) -> None:
        self.say(f"{part}: up to {max(0.0, deadline - time.time()):.0f} s")
        while self.has_work(part):
            pending = self.pending(part)
            least = START_SECONDS + (TEST_SECONDS if part == TESTS else min(one.seconds for one in pending))
            left = deadline - time.time()
            if left < (1.0 if self.rehearses else least):
                self.leave_out(part, f"its next process needs {least:.0f} s, {max(0.0, left):.0f} s were left")
                return
            if not PartProcess(self, part, pending, deadline).run():
                return

    def _baseline(self, line: Line) -> Line | None:
        """Return the last measured line of the setting's baseline."""
        found = {one.name: one for one in settings_of(line["part"], self.rehearses, [])}.get(line["setting"])
        if found is None or line["status"] != lines.MEASURED:
            return None
        wanted = lines.key({**line, "setting": found.baseline})
        alike = [one for one in self._lines() if lines.key(one) == wanted and one["status"] == lines.MEASURED]
        return alike[-1] if alike else None

    def _lines(self) -> list[Line]:
        return lines.read([self.output]) if self.output.exists() else []

    def _common(self) -> dict[str, Any]:
        return {"about": self.about, **({"rehearsal": lines.REHEARSAL} if self.rehearses else {})}

    def _count(self) -> int:
        return sum(map(len, self._finished.values()))
