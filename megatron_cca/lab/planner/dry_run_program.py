"""The command ``dry-run`` of ``tools/plan.py``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from megatron_cca import __version__, platform
from megatron_cca.config import Config
from megatron_cca.config.load import load_config
from megatron_cca.errors import UserError
from megatron_cca.io.outputs import check_file, file_system_errors, write_json
from megatron_cca.lab.planner.candidates import check_candidate
from megatron_cca.lab.planner.hardware import Gpu, gpu_named
from megatron_cca.lab.planner.memory import GIB, MemoryEstimate, predict_memory
from megatron_cca.lab.planner.options import DryRunSettings
from megatron_cca.lab.planner.program import check_known_weights, image_shape
from megatron_cca.lab.planner.workload import Workload, image_workload
from megatron_cca.lab.tables import padded_table


def run_dry(settings: DryRunSettings) -> None:
    """Count a step, print the result, and write the file if the settings name one.

    Raises:
        UserError: a run that training would refuse on that cluster, with training's message; a rank that does not fit
            its GPU.
    """
    gpu = gpu_named(settings.gpu) if settings.gpu is not None else None
    config = load_config(settings.config, settings.overrides)
    workload = _checked(config, settings, gpu)
    # Megatron-Core must not be imported before the platform is installed.
    platform.install("cpu")
    from megatron_cca.lab.planner.dry_run import dry_run

    rank = _fullest_rank(config, settings.gpus, workload, gpu) if settings.rank is None else settings.rank
    stage = _stage_of(config, settings.gpus, rank)
    found = dry_run(config, settings.gpus, rank, workload, like_gpu=gpu is not None)
    predicted = predict_memory(
        config,
        settings.gpus,
        workload,
        on_gpu=gpu is not None,
        pipeline_rank=stage,
        sharing_rank=_sharing_rank(config, settings.gpus, rank),
    )
    print("\n".join(_lines(config, settings, workload, rank, found, predicted)))
    if settings.output is not None:
        about = {"version": __version__, "gpus": settings.gpus, "gpu": settings.gpu, "rank": rank}
        contents = about | {"workload": asdict(workload), "counted": asdict(found), "predicted": asdict(predicted)}
        with file_system_errors(settings.output):
            write_json(settings.output, contents)
        print(f"\nwrote {settings.output}")
    if gpu is not None:
        _check_fits(found.peak + _unseen(predicted), gpu, rank)


def _checked(config: Config, settings: DryRunSettings, gpu: Gpu | None) -> Workload:
    if settings.rank is not None and not 0 <= settings.rank < settings.gpus:
        raise UserError(f"--rank: must be 0 to {settings.gpus - 1}, found {settings.rank}")
    if settings.output is not None:
        check_file(settings.output, overwrite=settings.overwrite)
    check_known_weights(config)
    check_candidate(config, settings.gpus)
    if gpu is not None:
        gpu.peak_flops(config.training.precision)
        if config.reference.precision is not None:
            gpu.peak_flops(config.reference.precision, "reference.precision")
    return image_workload(config, image_shape(config, settings.image_grid, settings.caption_tokens))


def _stage_of(config: Config, gpus: int, rank: int) -> int:
    """Return the pipeline stage of a rank.

    In Megatron's order, ranks of one stage are neighbours.
    """
    return rank // (gpus // config.parallel.pipeline_model_parallel_size)


def _sharing_rank(config: Config, gpus: int, rank: int) -> int:
    within = rank % (gpus // config.parallel.pipeline_model_parallel_size)
    return within // config.parallel.tensor_model_parallel_size


def _fullest_rank(config: Config, gpus: int, workload: Workload, gpu: Gpu | None) -> int:
    stages = config.parallel.pipeline_model_parallel_size
    options = {"on_gpu": gpu is not None}
    totals = [predict_memory(config, gpus, workload, pipeline_rank=stage, **options).total for stage in range(stages)]
    return totals.index(max(totals)) * (gpus // stages)


def _unseen(predicted: MemoryEstimate) -> int:
    """Return the bytes that no tensor shows.

    These are the CUDA context, libraries, NCCL's buffers and fragmentation.
    """
    return predicted.overhead + predicted.communication


def _check_fits(needed: int, gpu: Gpu, rank: int) -> None:
    if needed > gpu.memory_bytes:
        raise UserError(
            f"--gpu: rank {rank} needs {needed / GIB:.1f} GiB, {gpu.name} has {gpu.memory_bytes / GIB:.1f}; "
            "tools/plan.py search says which layouts fit"
        )


def _lines(config: Config, settings: DryRunSettings, workload: Workload, rank: int, found, predicted) -> Iterator[str]:
    kind = settings.gpu or "CPU"
    yield (
        f"rank {rank} of {settings.gpus} x {kind}, pipeline stage {_stage_of(config, settings.gpus, rank)}; rows of "
        f"{workload.seq_length:,} tokens, {workload.image_tokens:,} of them the image's. Counted in one step of the "
        "real model:\n"
    )
    # The count has one number for all memory that is not held during the whole step.
    moving = predicted.activations + predicted.head + (predicted.communication if settings.gpu is None else 0)
    rows = [
        ("parameters", found.parameters, predicted.weights),
        ("reference", found.reference, predicted.reference),
        ("gradients", found.gradients, predicted.gradients),
        ("optimizer", found.optimizer, predicted.optimizer),
        ("activations, head, at the peak", found.activations, moving),
        ("peak of all tensors", found.peak, found.peak - found.activations + moving),
    ]
    yield padded_table(("bytes on this rank", "counted", "GiB", "predicted", "off by"), [_row(*one) for one in rows])
    if settings.gpu is not None:
        unseen = _unseen(predicted)
        yield (
            f"\nWith {unseen / GIB:.1f} GiB assumed for the CUDA context, NCCL and fragments: "
            f"{(found.peak + unseen) / GIB:.1f} GiB."
        )
    if config.training.precision == "fp8" or config.reference.precision == "fp8":
        yield "FP8 layers were counted as bf16; the prediction has their FP8 copies of the weights besides."
    if config.optimizer.use_precision_aware_optimizer:
        yield "The optimizer's state was counted in fp32 on the GPU."
    yield "\nPeak by phase: " + ", ".join(f"{phase} {peak / GIB:.2f} GiB" for phase, peak in found.peaks.items())
    yield "\nSent and received in a step:\n"
    traffic = [
        (one.group, str(one.group_size), one.operation, one.phase, f"{one.calls:,}", f"{one.num_bytes:,}")
        for one in found.traffic
    ]
    yield padded_table(("group", "ranks", "operation", "phase", "calls", "bytes"), traffic)


def _row(name: str, counted: int, predicted: int) -> tuple[str, ...]:
    off = f"{predicted / counted - 1:+.1%}" if counted else ("+0.0%" if not predicted else "")
    return name, f"{counted:,}", f"{counted / GIB:.3f}", f"{predicted:,}", off
