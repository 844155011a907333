"""The plot of a plan: memory and seconds of its layouts by cause."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_cca.io.figures import BLUE, GREEN, GREY, INK, LEGEND, ORANGE, PINK, RED, SKY, YELLOW, save, style_axes
from megatron_cca.lab.planner.candidates import Candidate
from megatron_cca.lab.planner.memory import GIB
from megatron_cca.lab.planner.report import layout_name, memory_groups, recompute_name, reference_name
from megatron_cca.lab.planner.search import Plan
from megatron_cca.lab.planner.throughput import StepTime

_MEMORY = {
    "weights": BLUE,
    "reference": ORANGE,
    "gradients": GREEN,
    "optimizer": PINK,
    "activations": SKY,
    "rest": GREY,
}
_TIME = {
    "layers": BLUE,
    "recomputation": SKY,
    "LM head": GREEN,
    "reference": ORANGE,
    "pipeline bubble": RED,
    "communication": YELLOW,
    "optimizer": PINK,
    "overhead": GREY,
    "stragglers and the like": INK,
}


def plot(path: Path, plan: Plan) -> None:
    """Draw the plan's best candidates, the fastest on top."""
    names = [_name(candidate) for candidate in plan.best]
    figure = Figure(figsize=(13.5, 1.5 + 0.52 * len(names)), dpi=150)
    memory, time = figure.subplots(1, 2, sharey=True)
    gpu = plan.inputs.cluster.gpu
    _bars(memory, [{k: v / GIB for k, v in memory_groups(one.memory).items()} for one in plan.best], _MEMORY)
    memory.axvline(gpu.memory_bytes / GIB, color=INK, linewidth=1.2)
    memory.axvline(plan.inputs.memory_limit / GIB, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
    memory.set_xlim(0, 1.06 * gpu.memory_bytes / GIB)
    _style(memory, f"GiB on the fullest GPU; lines: what may be filled, and all of {gpu.name}")
    _bars(time, [_time_groups(one.step) for one in plan.best], _TIME)
    steps = [one.step for one in plan.best]
    totals = [step.total for step in steps]
    errors = [[step.total - step.low for step in steps], [step.high - step.total for step in steps]]
    time.errorbar(totals, range(len(steps)), xerr=errors, fmt="none", ecolor=INK, elinewidth=1.0, capsize=2.5)
    _style(time, "seconds of a step; whiskers: two standard deviations")
    memory.set_yticks(range(len(names)), names, fontsize=7.5, color=INK)
    memory.invert_yaxis()
    figure.suptitle(
        f"{plan.inputs.cluster.num_gpus} x {gpu.name}: the fastest layouts that fit, predicted", fontsize=11, color=INK
    )
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    save(figure, path)


def _name(candidate: Candidate) -> str:
    config = candidate.config
    return (
        f"{layout_name(config, candidate.num_gpus)}, micro batch {config.training.micro_batch_size}, "
        f"{config.training.precision}\n"
        f"recompute {recompute_name(config)}; reference {reference_name(config)}"
    )


def _time_groups(step: StepTime) -> dict[str, float]:
    return {
        "layers": step.compute,
        "recomputation": step.recompute,
        "LM head": step.head,
        "reference": step.reference,
        "pipeline bubble": step.bubble,
        "communication": step.communication,
        "optimizer": step.optimizer,
        "overhead": step.overhead,
        "stragglers and the like": step.cluster,
    }


def _bars(axes: Axes, rows: list[dict[str, float]], colours: dict[str, str]) -> None:
    left = [0.0] * len(rows)
    for part, colour in colours.items():
        widths = [row[part] for row in rows]
        axes.barh(range(len(rows)), widths, left=left, height=0.62, color=colour, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]


def _style(axes: Axes, label: str) -> None:
    style_axes(axes, across=label, grid="x")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, **LEGEND)
