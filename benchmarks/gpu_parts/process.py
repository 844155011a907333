"""The process of a part: its start, its messages, and its end.

It ends when its time is up or when it hangs.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_parts import lines
from gpu_parts.channel import VARIABLE
from gpu_parts.settings import TESTS, Setting
from gpu_parts.worker import AGAIN

if TYPE_CHECKING:
    from gpu_parts.runner import Runner

ROOT = Path(__file__).resolve().parents[2]
# After so many seconds a test counts as hanging.
TEST_LIMIT = 90.0


class PartProcess:
    """One process that measures settings.

    It reports each start and each result through a pipe.

    Args:
        runner: takes the results.
        part: the name of the part.
        pending: its settings without a result; empty for the tests.
        deadline: end of the part's time, by ``time.time()``.
    """

    def __init__(self, runner: Runner, part: str, pending: list[Setting], deadline: float) -> None:
        self._runner, self._part, self._pending, self._deadline = runner, part, pending, deadline
        self._log = runner.output.with_suffix(".log")
        self._running: str | None = None
        self._kill_at = deadline
        self._results = self._not_started = 0

    def run(self) -> bool:
        """Start the process and listen until it ends.

        Returns:
            Whether another process must continue with the rest of the part.
        """
        with tempfile.TemporaryDirectory() as folder, self._log.open("ab") as log:
            reading, writing = os.pipe()
            task = Path(folder) / "task.json"
            task.write_text(json.dumps(self._task(writing)))
            log_start = log.tell()
            child = subprocess.Popen(  # noqa: S603 - our own program
                self._command(),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env=_environment(task),
                pass_fds=(writing,),
                start_new_session=True,
            )
            os.close(writing)
            closed = False
            try:
                closed = self._listen(reading)
            finally:
                os.close(reading)
                # The pipe closes shortly before the process ends.
                _end(child, patience=20.0 if closed else 0.0)
            return self._ended(child.returncode, closed, log_start)

    def _command(self) -> list[str]:
        other = self._runner.command(self._part)
        if other is not None:
            return other
        if self._part != TESTS:
            return [sys.executable, "-m", "gpu_parts.worker"]
        stamp = datetime.now(UTC).strftime("%H%M%S")
        junit = self._runner.output.with_suffix(f".tests-{stamp}.xml").resolve()
        options = ["-p", "no:cacheprovider", "-p", "gpu_parts.pytest_lines", "-v", "-rN", f"--junitxml={junit}"]
        return [sys.executable, "-m", "pytest", "tests/gpu", *options]

    def _task(self, descriptor: int) -> dict[str, Any]:
        return {
            "part": self._part,
            "settings": [asdict(setting) for setting in self._pending],
            "deadline": self._deadline,
            "overrides": self._runner.overrides.get(self._part, []),
            "descriptor": descriptor,
            "done": sorted(self._runner.done(self._part)),
            "least": 0.0 if self._runner.rehearses else 5.0,
            "limit": TEST_LIMIT,
        }

    def _listen(self, reading: int) -> bool:
        """Take messages; return whether the process closed the pipe in time."""
        rest = b""
        while True:
            ready, _, _ = select.select([reading], [], [], max(0.0, self._kill_at - time.time()))
            if not ready:
                return False
            found = os.read(reading, 1 << 16)
            if not found:
                return True
            *whole, rest = (rest + found).split(b"\n")
            for line in whole:
                self._take(json.loads(line))

    def _take(self, message: dict[str, Any]) -> None:
        if "started" in message:
            self._running = message["started"]
            self._kill_at = min(self._deadline, time.time() + message["limit"])
        elif "result" in message:
            self._runner.record(self._part, message["result"])
            self._running, self._kill_at = None, self._deadline
            self._results += 1
        else:
            self._runner.leave_out(f"{self._part}: {message['not_started']}", message["reason"])
            self._not_started += 1

    def _ended(self, status: int, closed: bool, log_start: int) -> bool:
        """Write the result of the setting that was running; return whether another process must continue."""
        is_late = time.time() >= self._deadline
        if self._running is None:
            if closed:
                return self._ended_by_itself(status, log_start)
            self._runner.leave_out(self._part, "its share of the time was up")
            return False
        if closed:
            told = f"the process ended: {_in_words(status)}; {self._last_words(log_start)}"
            self._record(self._running, lines.FAILED, told)
        elif is_late:
            self._record(self._running, lines.OUT_OF_TIME, "the part's share of the time was up")
        else:
            self._record(self._running, lines.FAILED, "it hangs: ended after its limit")
        return not is_late

    def _ended_by_itself(self, status: int, log_start: int) -> bool:
        if status == AGAIN:
            return True
        # Exit statuses of pytest: 0 and 1 after all tests; 2 when stopped between tests; 5 without tests.
        if status == 0 or (self._part == TESTS and status in (1, 2, 5) and (self._results or self._not_started)):
            return False
        self._record("(start)", lines.FAILED, f"{_in_words(status)}: {self._last_words(log_start)}")
        return False

    def _record(self, setting: str, status: str, reason: str) -> None:
        self._runner.record(self._part, {"setting": setting, "status": status, "reason": reason})

    def _last_words(self, start: int) -> str:
        with self._log.open("rb") as log:
            log.seek(start)
            found = log.read().decode(errors="replace").strip().splitlines()
        return found[-1].strip()[:300] if found else "it said nothing"


def module_path() -> str:
    """Return PYTHONPATH for a process that imports this project and its benchmarks from here."""
    return os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _environment(task: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": module_path(), VARIABLE: str(task), "TQDM_DISABLE": "1"}


def _end(child: subprocess.Popen, patience: float) -> None:
    """End a process and all processes that it has started.

    The next process needs their memory on the device.
    """
    try:
        child.wait(timeout=patience)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _in_words(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"status {status}"
