"""The execution of a study's tasks: by workers of one process each, or by all ranks of the job together."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Collection
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from megatron_cca import platform
from megatron_cca.lab.studies.plan import Plan, Planner, expected_tasks, make_plan
from megatron_cca.lab.studies.tasks import FAILED, Outcome, Task, do, outcome_of, start
from megatron_cca.parallel.process_groups import initialize_distributed


class Board:
    """The outcomes of a study's tasks, and the tasks that can start next."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self._known: dict[Path, Outcome] = {}

    def outcome(self, task: Task) -> Outcome | None:
        """Return a task's outcome; None before the task has ended."""
        if task.folder not in self._known:
            outcome = outcome_of(task)
            if outcome is None:
                return None
            self._known[task.folder] = outcome
        return self._known[task.folder]

    @property
    def plan(self) -> Plan:
        """The plan with all tasks that are known by now."""
        return make_plan(self.planner, self.outcome)

    def ready(self, running: Collection[Path] = ()) -> list[Task]:
        """Return the tasks that can start, in the order of the plan.

        ``running`` has the folders of the tasks that run already.
        """
        return [
            task
            for task in self.plan.tasks
            if task.folder not in running
            and self.outcome(task) is None
            and (task.after is None or self.outcome(task.after) is not None)
        ]


class Progress:
    """A bar over tasks on a terminal; otherwise one line for each task that has ended."""

    def __init__(self, board: Board, *, is_shown: bool = True) -> None:
        self.board, self.is_shown = board, is_shown
        self.expected = expected_tasks(board.planner)
        self.bar = tqdm(
            total=self.expected,
            initial=self._count()[0],
            unit="task",
            desc=board.planner.study.settings.name,
            disable=None if is_shown else True,
            dynamic_ncols=True,
        )

    def _count(self) -> tuple[int, int]:
        tasks = self.board.plan.tasks
        return sum(self.board.outcome(task) is not None for task in tasks), len(tasks)

    def ended(self, task: Task, outcome: Outcome) -> None:
        """Count a task that has ended."""
        self.bar.n, known = self._count()
        self.bar.total = max(self.expected, known)
        self.bar.set_postfix_str(task.title, refresh=False)
        self.bar.refresh()
        has_failed = outcome["status"] == FAILED
        if self.is_shown and (self.bar.disable or has_failed):
            how = f"failed, {outcome['reason']}" if has_failed else f"{outcome['seconds']:.1f} s"
            self.bar.write(f"{self.bar.n}/{self.bar.total} {task.title}: {how}", file=sys.stdout)
            sys.stdout.flush()


def run_in_pool(board: Board, workers: int) -> None:
    """Do all tasks with ``workers`` processes.

    Each process takes a ready task, on one device with one thread, until none is left.

    Raises:
        UserError: anything that a task refuses; finished tasks keep their results.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    options = {
        "mp_context": context,
        "initializer": start,
        "initargs": (platform.current().device_type, context.Value("i")),
    }
    pool = ProcessPoolExecutor(workers, **options)
    progress, running = Progress(board), {}
    try:
        while True:
            folders = {task.folder for task in running.values()}
            for task in board.ready(folders)[: workers - len(running)]:
                running[pool.submit(do, task)] = task
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                progress.ended(running.pop(future), future.result())
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        progress.bar.close()
    pool.shutdown()


def run_together(board: Board) -> None:
    """Do all tasks one after another, each with all ranks of the job.

    Raises:
        UserError: anything that a task refuses; finished tasks keep their results.
    """
    initialize_distributed(board.planner.layout)
    is_first = dist.get_rank() == 0
    progress = Progress(board, is_shown=is_first)
    try:
        while (task := _agreed(board.ready()[:1] if is_first else [])) is not None:
            outcome = do(task)
            if is_first:
                progress.ended(task, outcome)
    finally:
        progress.bar.close()
    dist.destroy_process_group()


def _agreed(ready: list[Task]) -> Task | None:
    """Return on each rank the task that rank 0 takes next."""
    choice = [ready[0] if ready else None]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(choice, src=0, device=platform.device())
    return choice[0]
