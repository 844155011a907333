"""A pytest plug-in: each test has a result as soon as it ends.

Tests that have a result already do not run.
"""

from __future__ import annotations

import time

import pytest

from gpu_parts.channel import Channel, task
from gpu_parts.lines import FAILED, MEASURED, PASSED, SKIPPED


def pytest_configure(config: pytest.Config) -> None:
    """Read the task of this process."""
    todo = task()
    config.pluginmanager.register(_Lines(todo, Channel(todo["descriptor"])))


class _Lines:
    def __init__(self, todo: dict, channel: Channel) -> None:
        self._todo, self._channel = todo, channel
        self._reports: list[pytest.TestReport] = []
        self._stopped = False

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Deselect the tests that have a result."""
        done = set(self._todo["done"])
        left_out = [item for item in items if item.nodeid in done]
        items[:] = [item for item in items if item.nodeid not in done]
        config.hook.pytest_deselected(items=left_out)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Send a failure for a file that cannot be imported."""
        if report.failed:
            text = str(report.longrepr).strip().splitlines()
            self._channel.result(report.nodeid, FAILED, reason=text[-1] if text else "cannot be collected")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        """Stop before a test for which there is too little time."""
        left = self._todo["deadline"] - time.time()
        if left < self._todo["least"]:
            self._stopped = True
            self._channel.not_started(item.nodeid, f"and those after it: {max(0, left):.0f} s were left")
            # pytest looks at shouldstop only after a test.
            raise item.session.Interrupted("the part's time is up")
        self._reports.clear()
        self._channel.started(item.nodeid, self._todo["limit"])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Send the result after the test's teardown."""
        self._reports.append(report)
        if report.when != "teardown":
            return
        outcomes = {one.outcome for one in self._reports}
        status = FAILED if "failed" in outcomes else SKIPPED if "skipped" in outcomes else PASSED
        seconds = sum(one.duration for one in self._reports)
        reason = self._reason(status)
        self._channel.result(report.nodeid, status, seconds=seconds, **({"reason": reason} if reason else {}))

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Send that no test is left."""
        if not self._stopped and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, 5):
            self._channel.result("(all)", MEASURED)

    def _reason(self, status: str) -> str | None:
        wanted = next((one for one in self._reports if one.outcome == status), None)
        if wanted is None or status == PASSED:
            return None
        if isinstance(wanted.longrepr, tuple):
            return wanted.longrepr[2].removeprefix("Skipped: ")
        crash = getattr(wanted.longrepr, "reprcrash", None)
        return str(crash.message if crash else wanted.longrepr).partition("\n")[0]
