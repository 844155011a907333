"""Estimate the time of gpu.py's settings on a GPU from their sizes alone.

Nothing is measured.

python benchmarks/gpu_parts/estimates.py h200
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from gpu_parts.settings import DENSE, GEMM, HEAD, LLAMAGEN, LORA, OURS, PEERS, STEP, Setting, settings_of
from megatron_cca import platform
from megatron_cca.lab import markdown_table
from megatron_cca.lab.planner.hardware import DEFAULT, Cluster, Gpu, gpu_named
from megatron_cca.lab.planner.memory import predict_memory
from megatron_cca.lab.planner.throughput import predict_step
from megatron_cca.lab.planner.workload import model_flops

GIB = 2**30
# The head and its peers reach this share of the data sheet's bf16 rate: a round number below a plain product's 0.7.
HEAD_SHARE = 0.5
# The dense way reads or writes the bytes of the fp32 logits so many times: results of products in 16 bits (1), their
# copy in fp32 (1.5), log-softmax (3), the gradient of the gather (1), that of log-softmax (3), and this one in 16 bits
# (1.5).
DENSE_PASSES = 11
# The start of a process: imports, and the device's context. The start of a training setting: shards, weights,
# Transformer Engine.
START_SECONDS, BUILD_SECONDS = 15.0, 6.0
WARM_UP_STEPS, HEAD_PASSES = 2, 11


@dataclass(frozen=True)
class Expected:
    """A setting's expected figures.

    Attributes:
        part, name: the part and the name of the setting.
        tflop: useful TFLOP of a step or pass.
        milliseconds: time of a step or pass.
        gib: the peak, without the CUDA context and fragmentation; None if nothing predicts it.
        seconds: time of the whole setting.
    """

    part: str
    name: str
    tflop: float
    milliseconds: float
    gib: float | None
    seconds: float


def expected(gpu: Gpu) -> Iterator[Expected]:
    """Yield the figures of each setting whose time follows from its sizes."""
    for part in (HEAD, STEP, LLAMAGEN, LORA):
        for setting in settings_of(part, False, []):
            yield _head(setting, gpu) if part == HEAD else _training(part, setting, gpu)


def _head(setting: Setting, gpu: Gpu) -> Expected:
    values = setting.values
    # Forward, gradient of the hidden states, gradient of the weight.
    products = 1 if setting.name == GEMM else 3
    flops = 2.0 * products * values["tokens"] * values["hidden_size"] * values["vocabulary"]
    peer = values.get("peer")
    # Backward recomputes tiles that were not kept.
    computed = flops * (4 / 3 if peer in (OURS, *PEERS) and peer != "megatron" else 1)
    seconds = computed / (HEAD_SHARE * gpu.flops["bf16"])
    logits = 4 * values["tokens"] * values["vocabulary"]
    if peer in (DENSE, "megatron"):
        seconds += DENSE_PASSES * logits / (DEFAULT.memory_efficiency * gpu.memory_bandwidth)
    extra = 2.5 * logits / GIB if peer in (DENSE, "megatron") else None
    return Expected(HEAD, setting.name, flops / 1e12, 1e3 * seconds, extra, 1 + HEAD_PASSES * seconds)


def _training(part: str, setting: Setting, gpu: Gpu) -> Expected:
    from gpu_parts.training import configured
    from megatron_cca.lab.planner.workload import image_workload
    from megatron_cca.models import resolve_architecture

    config, images = configured(setting.values)
    workload = image_workload(config, images)
    batch = config.training.global_batch_size
    step = predict_step(config, Cluster(gpu, 1, 1), workload)
    memory = predict_memory(config, 1, workload, on_gpu=True)
    flops = batch * model_flops(config, resolve_architecture(config.model), workload)
    steps = WARM_UP_STEPS + setting.values["repeats"]
    return Expected(
        part,
        setting.name,
        flops / 1e12,
        1e3 * step.total,
        (memory.total - memory.overhead) / GIB,
        BUILD_SECONDS + steps * step.total,
    )


def estimates(name: str) -> str:
    """Return a table of all settings in Markdown, and the seconds of each part."""
    gpu = gpu_named(name)
    found = list(expected(gpu))
    rows = [
        [
            one.part,
            one.name,
            f"{one.tflop:.1f}",
            f"{one.milliseconds:,.0f}",
            "-" if one.gib is None else f"{one.gib:.1f}",
            f"{one.seconds:.0f}",
        ]
        for one in found
    ]
    header = ["part", "setting", "useful TFLOP", "ms", "peak GiB", "seconds in all"]
    parts = {one.part: START_SECONDS for one in found}
    for one in found:
        parts[one.part] += one.seconds
    told = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in parts.items())
    return f"{markdown_table(header, rows)}\n\nWhole parts, with {START_SECONDS:.0f} s to start each: {told}."


if __name__ == "__main__":
    platform.install("cpu")
    print(estimates(sys.argv[1] if len(sys.argv) > 1 else "h200"))
