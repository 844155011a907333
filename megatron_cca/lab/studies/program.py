"""A study from its file to its folder of results: the command of ``tools/study.py``."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cca import platform
from megatron_cca.errors import UserError
from megatron_cca.io.outputs import claimed, write_json, write_text
from megatron_cca.lab.studies.study import Study, open_study

if TYPE_CHECKING:
    from megatron_cca.lab.studies.running import Board

TABLE, RESULTS = "table.md", "results.json"


def run_study(path: Path, output: Path, workers: int, device: platform.DeviceChoice) -> None:
    """Do the missing tasks of a study; write its table, numbers and plots to ``output/<name>``.

    Under torchrun (WORLD_SIZE above 1) all ranks do each task together.

    Args:
        path: the study's file.
        output: the folder that studies share; tasks with a result in it are not done again.
        workers: number of processes, each of which does whole tasks; 1 under torchrun.
        device: the device of the processes.

    Raises:
        UserError: a study that cannot run or that compares unequal runs (before any task), or anything that a task
            refuses.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if workers > 1 and world_size > 1:
        raise UserError(f"--workers: {workers} is for one process, this job has {world_size}; leave it out")
    study = open_study(path)
    platform.install_option(device)
    _run(study, output, workers, world_size)


def _run(study: Study, output: Path, workers: int, world_size: int) -> None:
    # Imported late: Megatron-Core must not be imported before the platform is installed.
    from megatron_cca.lab.studies.checks import check_study
    from megatron_cca.lab.studies.plan import Planner
    from megatron_cca.lab.studies.running import Board, run_in_pool, run_together

    check_study(study, world_size)
    is_first = os.environ.get("RANK", "0") == "0"
    with claimed(output) if is_first else nullcontext():
        board = Board(Planner(study, output.resolve()))
        if world_size > 1 or board.ready():
            run_in_pool(board, workers) if workers > 1 else run_together(board)
        if is_first:
            _write(study, board)


def _write(study: Study, board: Board) -> None:
    # Imported late: the import of matplotlib takes a second. A mistyped file name must fail faster.
    from megatron_cca.lab.studies.plots import plot
    from megatron_cca.lab.studies.report import table
    from megatron_cca.lab.studies.results import as_json, collect

    results = collect(study, board.plan, board.outcome)
    folder = board.planner.output / study.settings.name
    folder.mkdir(parents=True, exist_ok=True)
    for one in study.settings.plots:
        plot(folder, results, one)
    write_json(folder / RESULTS, as_json(results))
    write_text(folder / TABLE, table(results))
    print(f"wrote {folder / TABLE}, {RESULTS} and {len(study.settings.plots)} plot(s)")
