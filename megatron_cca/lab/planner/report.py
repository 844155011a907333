"""The output of a search: the printed text, a table, a JSON file, the best run as YAML, and a plot."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_cca import __version__
from megatron_cca.config import Config
from megatron_cca.config.load import config_to_dict
from megatron_cca.io.output_folders import replacing
from megatron_cca.lab import PARTIAL, padded_table
from megatron_cca.lab.planner.candidates import MEMORY_SHARE, Candidate
from megatron_cca.lab.planner.hardware import DEFAULT
from megatron_cca.lab.planner.memory import GIB, MemoryEstimate
from megatron_cca.lab.planner.search import Alternative, Plan
from megatron_cca.lab.planner.sizes import sizes_of
from megatron_cca.lab.planner.workload import MFU_MEANS
from megatron_cca.models import resolve_architecture
from megatron_cca.training import rows_per_sample

HEADER = (
    "layout",
    "micro batch",
    "recompute",
    "reference",
    "precision",
    "GiB",
    "weights + reference + gradients + optimizer + activations + rest",
    "s/step",
    "samples/s",
    "tokens/s/GPU",
    "MFU",
    "bubble",
    "comm.",
)
_WIDTH = 118
YAML_FILE = "plan.yaml"
TABLE_FILE, JSON_FILE, PLOT_FILE = "table.md", "plan.json", "plan.png"
FILES = (TABLE_FILE, YAML_FILE, PLOT_FILE, JSON_FILE)


def layout_name(config: Config, num_gpus: int) -> str:
    """Return the layout's name, such as ``TP 2 x PP 4 (VPP 2) x DP 8``, without sizes of 1."""
    parallel = config.parallel
    tensor, pipeline, context = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    virtual = parallel.virtual_pipeline_model_parallel_size
    stages = f"PP {pipeline}" + (f" (VPP {virtual})" if virtual else "")
    parts = [(tensor, f"TP {tensor}"), (pipeline, stages), (context, f"CP {context}")]
    data = num_gpus // (tensor * pipeline * context)
    return " x ".join([*(text for size, text in parts if size > 1), f"DP {data}"])


def recompute_name(config: Config) -> str:
    """Return the name of what backward recomputes."""
    training = config.training
    if training.recompute_granularity == "selective":
        return " + ".join(training.recompute_modules)
    if training.recompute_granularity == "full" and training.recompute_method == "block":
        return f"{training.recompute_num_layers} layers a chunk"
    return training.recompute_granularity or "none"


def reference_name(config: Config) -> str:
    """Return the name of the reference's strategy."""
    if not config.objective.needs_reference:
        return "none"
    return config.reference.strategy + (", FP8 weights" if config.reference.fp8_param else "")


def row(candidate: Candidate) -> list[str]:
    """Return a candidate's cells under :data:`HEADER`."""
    config, step = candidate.config, candidate.step
    return [
        layout_name(config, candidate.num_gpus),
        str(config.training.micro_batch_size),
        recompute_name(config),
        reference_name(config),
        config.training.precision,
        f"{candidate.memory.total / GIB:.1f}",
        " + ".join(f"{size / GIB:.1f}" for size in memory_groups(candidate.memory).values()),
        f"{step.total:.3g} ± {step.error * step.total:.2g}",
        f"{step.samples_per_second:.3g}",
        f"{step.tokens_per_second_per_gpu:,.0f}",
        f"{step.mfu:.1%}",
        f"{step.bubble / step.total:.1%}",
        f"{step.communication / step.total:.1%}",
    ]


def memory_groups(memory: MemoryEstimate) -> dict[str, int]:
    """Return the bytes of a rank by the groups that users ask for.

    ``rest`` is the head, communication and overhead.
    """
    return {
        "weights": memory.weights,
        "reference": memory.reference,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "rest": memory.head + memory.communication + memory.overhead,
    }


def as_yaml(config: Config, before: Config, head: Sequence[str]) -> str:
    """Return the configuration as YAML text.

    :func:`load_config` reads the same configuration from it.

    Args:
        config: the run.
        before: the configuration that the search started from; keys that differ get a mark.
        head: lines above the configuration, without the comment sign.
    """
    # A file that does not name its objective has the default objective. The other defaults belong to this run's
    # objective.
    usual = replace(Config(), objective=type(config.objective)())
    defaults, given = config_to_dict(usual), config_to_dict(before)
    defaults["objective"]["name"] = Config().objective.name
    lines = [f"# {line}".rstrip() for text in head for line in textwrap.wrap(text, _WIDTH - 2) or [""]]
    for section, keys in config_to_dict(config).items():
        different = {key: value for key, value in keys.items() if value != defaults[section][key]}
        if not different:
            continue
        comment = "  # sizes written out: weights of another model are refused" if section == "model" else ""
        lines.append(f"{section}:{comment}")
        for key, value in different.items():
            mark = _mark(section, key, value != given[section][key])
            lines.append(f"  {_entry(key, value)}{mark}")
    return "\n".join(lines) + "\n"


def _entry(key: str, value: Any) -> str:
    """Return the key and its value as one line of YAML."""
    in_a_list = yaml.safe_dump([value], default_flow_style=True, width=10**9, allow_unicode=False)
    return f"{key}: {in_a_list.strip()[1:-1]}"


def _mark(section: str, key: str, is_planned: bool) -> str:
    if not is_planned or section == "model":
        return ""
    if (section, key) == ("reference", "cache"):
        return "  # compute it beforehand: megatron-cca cache-reference"
    return "  # planned"


@dataclass(frozen=True)
class Report:
    """A plan and its explanations.

    Attributes:
        plan: the result of the search.
        before: the configuration that the search started from.
        alternatives: the usual layouts, and why they are not the best.
    """

    plan: Plan
    before: Config
    alternatives: list[Alternative]

    @property
    def best(self) -> Candidate:
        """The fastest candidate that fits."""
        return self.plan.best[0]


def text(report: Report) -> str:
    """Return the printed text: the best layouts, then remarks."""
    plan, inputs = report.plan, report.plan.inputs
    cluster, best = inputs.cluster, report.best
    rows = "a row" if rows_per_sample(best.config) == 1 else "two rows"
    lines = [
        f"{cluster.num_gpus} x {cluster.gpu.name}, {cluster.gpus_per_node} a node. A sample is {rows} of "
        f"{best.workload.seq_length:,} tokens, {best.workload.image_tokens:,} of them the image's; the global batch is "
        f"{best.config.training.global_batch_size}.",
        f"{plan.considered:,} candidates; the fastest of those within {inputs.memory_limit / GIB:.1f} GiB, "
        f"{MEMORY_SHARE:.0%} of a GPU's memory:",
        "",
        padded_table(HEADER, [row(candidate) for candidate in plan.best]),
        "",
        _trust(report),
        MFU_MEANS,
        *_remarks(report),
    ]
    if report.alternatives:
        lines += ["", "Why not:", *(f"- {one.name}: {one.verdict}" for one in report.alternatives)]
    return "\n".join(lines)


def _layout(candidate: Candidate) -> str:
    return layout_name(candidate.config, candidate.num_gpus)


def _samples(candidate: Candidate) -> int:
    return candidate.config.training.micro_batch_size


def _trust(report: Report) -> str:
    calibration = report.plan.inputs.calibration
    error = f"± is two standard deviations, {report.best.step.error:.0%}"
    if report.best.step.cluster_spread:
        error += ", with what clusters differ in (docs/scaling.md)"
    if calibration == DEFAULT:
        return f"{error}: how far the model is off published runs. Measure yours with megatron-cca plan calibrate."
    return f"{error}: how far the model is off the steps that were measured for the calibration."


def _remarks(report: Report) -> Iterator[str]:
    best, cached = report.best, report.plan.cached
    if cached is not None:
        faster = cached.step.samples_per_second / best.step.samples_per_second
        yield (
            f"With reference.strategy cached, after megatron-cca cache-reference has passed over the data once: "
            f"{_layout(cached)}, micro batch {_samples(cached)}, recompute {recompute_name(cached.config)}: "
            f"{cached.step.samples_per_second:.3g} samples/s, {faster:.2f} times as many."
        )
    if best.config.reference.strategy == "offload" and best.config.objective.needs_reference:
        sizes = sizes_of(best.config, best.num_gpus, best.workload)
        on_node = sizes.trained_weights * _per_node(report)
        yield f"The offloaded reference takes {2 * on_node / GIB:.1f} GiB of host memory on each node."


def _per_node(report: Report) -> int:
    cluster = report.plan.inputs.cluster
    return min(cluster.num_gpus, cluster.gpus_per_node)


def yaml_of(report: Report) -> str:
    """Return the best run's configuration as YAML text."""
    best, cluster = report.best, report.plan.inputs.cluster
    per_node = _per_node(report)
    nodes = cluster.num_gpus // per_node
    launch = f"--nnodes {nodes} --nproc_per_node {per_node}" if nodes > 1 else f"--nproc_per_node {per_node}"
    step = best.step
    head = [
        f"Planned by megatron-cca plan for {cluster.num_gpus} x {cluster.gpu.name}: {_layout(best)}.",
        f"Predicted: {step.total:.3g} s/step ({step.low:.3g} to {step.high:.3g}), {step.samples_per_second:.3g} "
        f"samples/s, {best.memory.total / GIB:.1f} of {cluster.gpu.memory_bytes / GIB:.1f} GiB.",
        f"torchrun {launch} examples/pretrain_cca_emu3.sh --config {YAML_FILE}",
    ]
    return as_yaml(best.config, report.before, head)


def write_report(output: Path, report: Report) -> list[str]:
    """Write all files into a :func:`reserved_folder`, or none.

    They replace those of a former plan.

    Returns:
        The files' names. ``plan.json`` arrives last: if it exists, all files exist.

    Raises:
        UserError: the file system reports an error.
    """
    # Imported late: the import of matplotlib takes a second. A plan without a folder does not need it.
    from megatron_cca.lab.planner.plots import plot

    with replacing(output, FILES, PARTIAL, JSON_FILE) as partial:
        (partial / TABLE_FILE).write_text(text(report) + "\n", encoding="utf-8")
        (partial / YAML_FILE).write_text(yaml_of(report), encoding="utf-8")
        plot(partial / PLOT_FILE, report.plan)
        contents = json.dumps(as_json(report), indent=1, ensure_ascii=False)
        (partial / JSON_FILE).write_text(contents + "\n", encoding="utf-8")
    return list(FILES)


def as_json(report: Report) -> dict:
    """Return all numbers of the plan as plain data."""
    plan, inputs = report.plan, report.plan.inputs
    architecture = asdict(resolve_architecture(report.best.config.model))
    architecture["vocabulary"] = {"size": architecture["vocabulary"]["size"]}
    return {
        "version": __version__,
        "gpu": asdict(inputs.cluster.gpu),
        "num_gpus": inputs.cluster.num_gpus,
        "gpus_per_node": inputs.cluster.gpus_per_node,
        "images": asdict(inputs.images),
        "vary": list(inputs.vary),
        "memory_limit_bytes": inputs.memory_limit,
        "calibration": asdict(inputs.calibration),
        "model": architecture,
        "considered": plan.considered,
        "best": [_candidate(one) for one in plan.best],
        "cached": None if plan.cached is None else _candidate(plan.cached),
        "others": [asdict(one) for one in report.alternatives],
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
