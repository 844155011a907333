"""What is said about a plan: the printed text, and the best run as YAML."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_cca.config import Config
from megatron_cca.lab.planner.calibration import DEFAULT
from megatron_cca.lab.planner.flops import MFU_MEANS
from megatron_cca.lab.planner.memory import GIB
from megatron_cca.lab.planner.others import Other
from megatron_cca.lab.planner.search import Plan
from megatron_cca.lab.planner.sizes import sizes_of
from megatron_cca.lab.planner.trials import MEMORY_SHARE, Candidate
from megatron_cca.lab.planner.words import layout_name, recompute_name, row, table
from megatron_cca.lab.planner.yaml_text import as_yaml
from megatron_cca.training.shapes import rows_per_sample

YAML_FILE = "plan.yaml"


@dataclass(frozen=True)
class Report:
    """A plan and what is said about it.

    Attributes:
        plan: the search's result.
        before: the configuration that it started from.
        others: why the obvious layouts are not the best.
    """

    plan: Plan
    before: Config
    others: list[Other]

    @property
    def best(self) -> Candidate:
        """The fastest that fits."""
        return self.plan.best[0]


def text(report: Report) -> str:
    """What is printed: the best layouts, then what else there is to know."""
    plan, wishes = report.plan, report.plan.wishes
    cluster, best = wishes.cluster, report.best
    rows = "a row" if rows_per_sample(best.config) == 1 else "two rows"
    lines = [
        f"{cluster.num_gpus} x {cluster.gpu.name}, {cluster.gpus_per_node} a node. A sample is {rows} of "
        f"{best.workload.seq_length:,} tokens, {best.workload.image_tokens:,} of them the image's; the global batch is "
        f"{best.config.training.global_batch_size}.",
        f"{plan.considered:,} candidates; the fastest of those within {wishes.memory_limit / GIB:.1f} GiB, "
        f"{MEMORY_SHARE:.0%} of a GPU's memory:",
        "",
        table([row(candidate) for candidate in plan.best]),
        "",
        _trust(report),
        MFU_MEANS,
        *_remarks(report),
    ]
    if report.others:
        lines += ["", "Why not:", *(f"- {other.name}: {other.verdict}" for other in report.others)]
    return "\n".join(lines)


def _layout(candidate: Candidate) -> str:
    return layout_name(candidate.config, candidate.num_gpus)


def _samples(candidate: Candidate) -> int:
    return candidate.config.training.micro_batch_size


def _trust(report: Report) -> str:
    calibration = report.plan.wishes.calibration
    error = f"± is two standard deviations, {report.best.step.error:.0%}"
    if report.best.step.cluster_spread:
        error += ", with what clusters differ in (docs/scaling.md)"
    if calibration == DEFAULT:
        return f"{error}: how far the model is off published runs. Measure yours with tools/plan.py calibrate."
    return f"{error}: how far the model is off the steps that were measured for the calibration."


def _remarks(report: Report) -> Iterator[str]:
    best, cached = report.best, report.plan.cached
    if cached is not None:
        faster = cached.step.samples_per_second / best.step.samples_per_second
        yield (
            f"With reference.strategy cached, after tools/cache_reference.py has passed over the data once: "
            f"{_layout(cached)}, micro batch {_samples(cached)}, recompute {recompute_name(cached.config)}: "
            f"{cached.step.samples_per_second:.3g} samples/s, {faster:.2f} times as many."
        )
    if best.config.reference.strategy == "offload" and best.config.objective.needs_reference:
        sizes = sizes_of(best.config, best.num_gpus, best.workload)
        on_node = (sizes.layers * sizes.layer_weights + sizes.head_weights) * _per_node(report)
        yield f"The offloaded reference takes {2 * on_node / GIB:.1f} GiB of host memory on each node."


def _per_node(report: Report) -> int:
    cluster = report.plan.wishes.cluster
    return min(cluster.num_gpus, cluster.gpus_per_node)


def yaml_of(report: Report) -> str:
    """The best run's configuration."""
    best, cluster = report.best, report.plan.wishes.cluster
    per_node = _per_node(report)
    nodes = cluster.num_gpus // per_node
    launch = f"--nnodes {nodes} --nproc_per_node {per_node}" if nodes > 1 else f"--nproc_per_node {per_node}"
    step = best.step
    head = [
        f"Planned by tools/plan.py for {cluster.num_gpus} x {cluster.gpu.name}: {_layout(best)}.",
        f"Predicted: {step.total:.3g} s/step ({step.low:.3g} to {step.high:.3g}), {step.samples_per_second:.3g} "
        f"samples/s, {best.memory.total / GIB:.1f} of {cluster.gpu.memory_bytes / GIB:.1f} GiB.",
        f"torchrun {launch} examples/pretrain_cca_emu3.sh --config {YAML_FILE}",
    ]
    return as_yaml(best.config, report.before, head)
