"""Ranks that stay: processes that take one job after another, so that a test need not wait until they have started."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

# Ranks are forked from one server that has imported Megatron-Core already, and what else is slow to import: that costs
# more than most tests, and forked ranks share its memory.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        # First: it installs the platform, before the others import Megatron-Core.
        "tests.distributed.ranks",
        "tests.distributed.checkpoint_workers",
        "tests.distributed.family_workers",
        "tests.distributed.logits_workers",
        "tests.distributed.timing_workers",
        "tests.distributed.workers",
        "matplotlib.pyplot",
        "nvidia.dali.fn",
        "sklearn.datasets",
        "sklearn.svm",
        "transformers",
    ]
)
_SECONDS_TO_TELL = 1.0
# After so many jobs without one for it a rank leaves: it holds some 200 MB, and another one is forked in no time.
_IDLE_JOBS = 20


@dataclass
class _Rank:
    """A process that waits for jobs, the line to it, and the file where it says where it stands."""

    process: multiprocessing.process.BaseProcess
    line: Connection
    stack: Path
    idle: int = 0

    @classmethod
    def start(cls) -> _Rank:
        from tests.distributed.ranks import serve

        handle, stack = tempfile.mkstemp(prefix="stack-of-a-rank-")
        os.close(handle)
        ours, its = SERVER.Pipe()
        process = SERVER.Process(target=serve, args=(its, stack))
        process.start()
        its.close()
        return cls(process, ours, Path(stack))

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.line.close()
        self.stack.unlink(missing_ok=True)


class Pool:
    """As many ranks as the largest job so far wanted; a smaller job takes the first of them.

    Ranks leave after a job that failed, since nobody knows what it left behind; the next job gets new ones.
    """

    def __init__(self) -> None:
        self._ranks: list[_Rank] = []

    def pids(self) -> list[int]:
        """The processes that wait for a job."""
        return [rank.process.pid for rank in self._ranks]

    def run(self, name: str, jobs: list, timeout: float) -> list:
        """Give each of the first ranks its job, and return what they answer.

        Args:
            name: of the whole, for messages.
            jobs: one a rank; each is called there without arguments.
            timeout: seconds.

        Raises:
            AssertionError: a rank raised, ended, or was still at work after ``timeout``. The message holds its
                traceback, or the line at which it stands.
        """
        ranks = self._lend(len(jobs))
        for rank, job in zip(ranks, jobs, strict=True):
            rank.line.send(job)
        answers, problems = _answers(ranks, timeout)
        if problems or len(answers) < len(jobs):
            told = _where_they_stand({index: ranks[index] for index in range(len(jobs)) if index not in answers})
            self.close()
            raise AssertionError("\n".join([f"{name} on {len(jobs)} ranks:", *_in_order({**told, **problems})]))
        return [answers[index] for index in range(len(jobs))]

    def _lend(self, count: int) -> list[_Rank]:
        if not all(rank.process.is_alive() for rank in self._ranks):
            # A program that a test ends in its own process ends that process's children, too: these.
            self.close()
        while len(self._ranks) < count:
            self._ranks.append(_Rank.start())
        for index, rank in enumerate(self._ranks):
            rank.idle = rank.idle + 1 if index >= count else 0
        while self._ranks[-1].idle > _IDLE_JOBS:
            self._ranks.pop().stop()
        return self._ranks[:count]

    def close(self) -> None:
        """End all ranks."""
        for rank in self._ranks:
            rank.stop()
        self._ranks = []


def _answers(ranks: list[_Rank], timeout: float) -> tuple[dict, dict[int, str]]:
    """Collect answers until all ranks have answered or one cannot; return them, and what went wrong, by rank."""
    answers, problems = {}, {}
    deadline = time.monotonic() + timeout
    while len(answers) < len(ranks) and not problems:
        lines = {rank.line: index for index, rank in enumerate(ranks) if index not in answers}
        ready = wait(list(lines), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for line in ready:
            index = lines[line]
            try:
                answers[index], problem = line.recv()
            except EOFError:
                ranks[index].process.join()
                problem = f"ended with exit code {ranks[index].process.exitcode}"
            if problem is not None:
                problems[index] = problem
    return answers, problems


def _where_they_stand(hanging: dict[int, _Rank]) -> dict[int, str]:
    alive = {index: rank for index, rank in hanging.items() if rank.process.is_alive()}
    for rank in alive.values():
        os.kill(rank.process.pid, signal.SIGUSR1)
    if alive:
        time.sleep(_SECONDS_TO_TELL)
    return {index: f"still at work:\n{rank.stack.read_text()}" for index, rank in alive.items()}


def _in_order(problems: dict[int, str]) -> list[str]:
    return [f"rank {index}: {problems[index]}" for index in sorted(problems)]


POOL = Pool()
# Before multiprocessing's own, which would wait for the ranks to end by themselves.
atexit.register(POOL.close)
