"""Points that nobody ran."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_cca.errors import UserError
from megatron_cca.lab.planner.memory import GIB
from megatron_cca.lab.planner.report import layout_name
from megatron_cca.lab.scaling.candidates import planned_candidate
from megatron_cca.lab.scaling.records import Record, read_record, write_failed, write_finished
from megatron_cca.lab.scaling.shapes import ideal_bubble
from megatron_cca.lab.scaling.sweep import Task


def plan_all(output: Path, tasks: Sequence[Task]) -> None:
    """Leave a record of every task that has none."""
    missing = [task for task in tasks if read_record(output, task) is None]
    for task in tqdm(missing, desc="planning", unit="point", disable=None, dynamic_ncols=True):
        try:
            write_finished(output, task, plan(task))
        except UserError as error:
            write_failed(output, task, str(error))


def plan(task: Task) -> Record:
    """What the planner says of a task.

    Raises:
        UserError: what :func:`planned_candidate` refuses.
    """
    candidate = planned_candidate(task)
    step, training = candidate.step, candidate.config.training
    return {
        "step_seconds": [step.total],
        "tokens_per_second_per_gpu": step.tokens_per_second_per_gpu,
        "low": step.tokens_per_gpu / step.high,
        "high": step.tokens_per_gpu / step.low if step.low > 0 else step.tokens_per_second_per_gpu,
        "mfu": step.mfu,
        "peak_flops": step.peak_flops,
        "seq_length": candidate.workload.seq_length,
        "memory_gib": candidate.memory.total / GIB,
        "communication": step.communication / step.total,
        "bubble": step.bubble / step.total,
        "layout": layout_name(candidate.config, candidate.num_gpus),
        "micro_batch_size": training.micro_batch_size,
        "global_batch_size": training.global_batch_size,
        "ideal_bubble": ideal_bubble(candidate.config, task.num_gpus),
        "device": task.how["gpu"],
    }
