"""How plans are put into words and rows of tables."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_cca.config import Config
from megatron_cca.lab.planner.memory import GIB, MemoryEstimate
from megatron_cca.lab.planner.trials import Candidate

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


def layout_name(config: Config, num_gpus: int) -> str:
    """Such as ``TP 2 x PP 4 (VPP 2) x DP 8``; sizes of 1 are left out."""
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
    """What is computed again in backward."""
    training = config.training
    if training.recompute_granularity == "selective":
        return " + ".join(training.recompute_modules)
    if training.recompute_granularity == "full" and training.recompute_method == "block":
        return f"{training.recompute_num_layers} layers a chunk"
    return training.recompute_granularity or "none"


def reference_name(config: Config) -> str:
    """Where the frozen model is."""
    if not config.objective.needs_reference:
        return "none"
    return config.reference.strategy + (", FP8 weights" if config.reference.fp8_param else "")


def row(candidate: Candidate) -> list[str]:
    """A candidate under :data:`HEADER`."""
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
    """Bytes by what people ask for; ``rest`` is head, communication and overhead."""
    return {
        "weights": memory.weights,
        "reference": memory.reference,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "rest": memory.head + memory.communication + memory.overhead,
    }


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = HEADER) -> str:
    """A Markdown table whose columns also line up on a terminal."""
    columns = [[name, *column] for name, column in zip(header, zip(*rows, strict=True), strict=True)]
    widths = [max(map(len, column)) for column in columns]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines
    )
