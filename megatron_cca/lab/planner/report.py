"""What a search leaves behind: a table, a JSON file with every number, the best run as YAML, a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from megatron_cca import __version__
from megatron_cca.config.load import config_to_dict
from megatron_cca.io.outputs import check_output, claimed, replacing
from megatron_cca.lab.planner.summary import YAML_FILE, Report, text, yaml_of
from megatron_cca.lab.planner.trials import Candidate
from megatron_cca.lab.planner.words import layout_name, memory_groups, recompute_name, reference_name
from megatron_cca.models import resolve_architecture

TABLE_FILE, JSON_FILE, PLOT_FILE = "table.md", "plan.json", "plan.png"
_FILES = (TABLE_FILE, YAML_FILE, PLOT_FILE, JSON_FILE)
_PARTIAL = ".partial"


@contextmanager
def reserved(output: Path, *, overwrite: bool) -> Iterator[None]:
    """Keep the folder for a plan, from before the work to the end of writing.

    Raises:
        UserError: it holds something that is not to be replaced, or another process writes there.
    """
    with claimed(output):
        check_output(output, _FILES, {_PARTIAL}, overwrite=overwrite)
        yield


def write_report(output: Path, report: Report) -> list[str]:
    """Write all files into a :func:`reserved` folder, or none; a former plan's go.

    Returns:
        The files' names. ``plan.json`` arrives last: where it is, all is there.

    Raises:
        UserError: the file system refuses.
    """
    # Imported late: matplotlib takes a second, which a plan without a folder need not wait for.
    from megatron_cca.lab.planner.plots import plot

    with replacing(output, _FILES, _PARTIAL, JSON_FILE) as partial:
        (partial / TABLE_FILE).write_text(text(report) + "\n", encoding="utf-8")
        (partial / YAML_FILE).write_text(yaml_of(report), encoding="utf-8")
        plot(partial / PLOT_FILE, report.plan)
        contents = json.dumps(as_json(report), indent=1, ensure_ascii=False)
        (partial / JSON_FILE).write_text(contents + "\n", encoding="utf-8")
    return list(_FILES)


def as_json(report: Report) -> dict:
    """Every number of the plan."""
    plan, wishes = report.plan, report.plan.wishes
    architecture = asdict(resolve_architecture(report.best.config.model))
    architecture["vocabulary"] = {"size": architecture["vocabulary"]["size"]}
    return {
        "version": __version__,
        "gpu": asdict(wishes.cluster.gpu),
        "num_gpus": wishes.cluster.num_gpus,
        "gpus_per_node": wishes.cluster.gpus_per_node,
        "images": asdict(wishes.images),
        "vary": list(wishes.vary),
        "memory_limit_bytes": wishes.memory_limit,
        "calibration": asdict(wishes.calibration),
        "model": architecture,
        "considered": plan.considered,
        "best": [_candidate(one) for one in plan.best],
        "cached": None if plan.cached is None else _candidate(plan.cached),
        "others": [asdict(other) for other in report.others],
        "config": config_to_dict(report.best.config),
    }


def _candidate(candidate: Candidate) -> dict:
    config, step = candidate.config, candidate.step
    return {
        "layout": layout_name(config, candidate.num_gpus),
        "parallel": config_to_dict(config)["parallel"],
        "micro_batch_size": config.training.micro_batch_size,
        "recompute": recompute_name(config),
        "reference": reference_name(config),
        "precision": config.training.precision,
        "seq_length": candidate.workload.seq_length,
        "memory_bytes": {**asdict(candidate.memory), "total": candidate.memory.total},
        "memory_groups_bytes": memory_groups(candidate.memory),
        "step_seconds": {**step.parts, "total": step.total, "low": step.low, "high": step.high},
        "samples_per_second": step.samples_per_second,
        "tokens_per_second_per_gpu": step.tokens_per_second_per_gpu,
        "model_flops_per_second_per_gpu": step.model_flops_per_second,
        "mfu": step.mfu,
    }
