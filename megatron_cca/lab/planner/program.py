"""The commands of ``megatron-cca plan``: search for layouts, calibrate on a device, and run any rank of a layout."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cca import __version__, platform
from megatron_cca.config import Config
from megatron_cca.config.load import load_config
from megatron_cca.errors import UserError
from megatron_cca.io.output_folders import check_file
from megatron_cca.io.outputs import file_system_errors, write_json, write_text
from megatron_cca.lab import padded_table, reserved_folder
from megatron_cca.lab.planner import CalibrateSettings, DryRunSettings, PlanSettings
from megatron_cca.lab.planner.candidates import DEFAULT_VARIABLES, VARIABLES, SearchInputs, check_candidate
from megatron_cca.lab.planner.hardware import Cluster, Gpu, calibrated_device, calibration_json, gpu_named
from megatron_cca.lab.planner.memory import GIB, MemoryEstimate, predict_memory
from megatron_cca.lab.planner.report import FILES, Report, text, write_report
from megatron_cca.lab.planner.search import search, usual_alternatives
from megatron_cca.lab.planner.workload import ImageShape, Workload, image_workload
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import only_grid
from megatron_cca.training.checks import PRETRAINED, REFERENCE, check_weights
from megatron_cca.version import installed_versions

if TYPE_CHECKING:
    from megatron_cca.lab.planner.calibrate import Measured

_USUAL_GRID = "90x90"
# Packages whose versions change the times.
PACKAGES = ("torch", "megatron-core", "transformer-engine")


def run_search(settings: PlanSettings) -> None:
    """Search, print the table, and write the folder if the settings name one.

    Raises:
        UserError: an invalid option, weights of another model, or a cluster that does not suit the model.
    """
    config = load_config(settings.config, settings.overrides)
    inputs = _search_inputs(settings, config)
    check_known_weights(config)
    if settings.output:
        # Needed only at the end. If it is missing, fail before the search.
        import matplotlib  # noqa: F401
    with reserved_folder(settings.output, FILES, overwrite=settings.overwrite) if settings.output else nullcontext():
        plan = search(config, inputs, settings.top)
        report = Report(plan, config, usual_alternatives(plan.best[0], inputs))
        print(text(report))
        if settings.output:
            print(f"\nwrote {', '.join(write_report(settings.output, report))} to {settings.output}")


def image_shape(config: Config, grid: str | None, caption_tokens: int) -> ImageShape:
    """Return the image shape that ``--image-grid`` and ``--caption-tokens`` describe.

    Without a grid, it is the model's own grid if it has one.

    Raises:
        UserError: the grid is not of the form ``HxW``.
    """
    if grid is None:
        own = only_grid(resolve_architecture(config.model))
        grid = _USUAL_GRID if own is None else "{}x{}".format(*own)
    found = re.fullmatch(r"([1-9]\d{0,5})[x*]([1-9]\d{0,5})", grid)
    if found is None:
        raise UserError(f"--image-grid: {grid!r} is not of the form HxW, such as 90x90")
    return ImageShape(int(found[1]), int(found[2]), caption_tokens)


def check_known_weights(config: Config) -> None:
    """Refuse weights on this machine that belong to another model.

    Weights on other machines are not checked.

    Raises:
        UserError: the weights belong to another model; the message is that of training.
    """
    for key, path in ((PRETRAINED, config.training.pretrained_checkpoint), (REFERENCE, config.reference.checkpoint)):
        if path is not None and Path(path).exists():
            check_weights(config, path, key)


def _search_inputs(settings: PlanSettings, config: Config) -> SearchInputs:
    gpu, calibration = calibrated_device(settings.gpu, settings.calibration)
    per_node = gpu.gpus_per_node if settings.gpus_per_node is None else settings.gpus_per_node
    shape = image_shape(config, settings.image_grid, settings.caption_tokens)
    return SearchInputs(Cluster(gpu, settings.gpus, per_node), shape, _variables(settings.vary), calibration)


def _variables(text: str | None) -> tuple[str, ...]:
    if text is None:
        return DEFAULT_VARIABLES
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in VARIABLES]
    if unknown:
        raise UserError(f"--vary: {unknown[0]!r} is unknown; known: {', '.join(VARIABLES)}")
    return names


def run_calibrate(settings: CalibrateSettings) -> None:
    """Measure the device, write the file, and print the result.

    Raises:
        UserError: an invalid option, a run that training refuses on this device, or an existing file.
    """
    config = load_config(settings.config, settings.overrides)
    images = image_shape(config, settings.image_grid, settings.caption_tokens)
    # Called for its refusals. The measurement of the processor alone can take a minute.
    image_workload(config, images)
    check_file(settings.output, overwrite=settings.overwrite)
    platform.install_option(settings.device)
    # Imported late: Megatron-Core must not be imported before the platform is installed.
    from megatron_cca.lab.planner.calibrate import calibrate

    found = calibrate(config, images, settings.gpu, settings.steps)
    about = {
        "version": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device_name": platform.device_name(),
        "packages": installed_versions(PACKAGES),
        "not_measured": _not_measured(found),
        "runs": [
            {
                "layers": one.config.model.num_layers,
                "global_batch_size": one.config.training.global_batch_size,
                "recompute": one.config.training.recompute_granularity,
                "seconds": one.seconds,
                "spread": one.spread,
                "error": error,
            }
            for one, error in zip(found.observations, found.errors, strict=True)
        ],
    }
    with file_system_errors(settings.output):
        write_text(settings.output, calibration_json(found.calibration, found.gpu, **about))
    print(f"{_summary(found)}\nwrote {settings.output}")


def _not_measured(measured: Measured) -> str:
    products = "" if measured.has_fp8 else ", FP8 products"
    return f"NVLink, network, host bandwidth, overlaps{products}: the defaults"


def _fp8_words(measured: Measured) -> str:
    if measured.has_fp8:
        return f"those in FP8 {measured.calibration.fp8_matmul_efficiency:.0%} of theirs"
    if "fp8" not in measured.gpu.flops:
        return "there are none in FP8 here"
    return "those in FP8 were not measured, whose widths must be multiples of 16"


def _summary(measured: Measured) -> str:
    found = measured.calibration
    return (
        f"{platform.device_name()} as {found.gpu}: products reach {found.matmul_efficiency:.0%} of the peak, "
        f"{_fp8_words(measured)}, attention {found.attention_efficiency:.0%}, memory {found.memory_efficiency:.0%}; a "
        f"microbatch costs {found.microbatch_overhead_seconds * 1e3:.1f} ms besides, a step "
        f"{found.step_overhead_seconds * 1e3:.1f}.\n"
        f"Short runs predicted from the others are off by {found.relative_error:.0%} (root mean square). Links between "
        "GPUs were not measured."
    )


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
            "megatron-cca plan search says which layouts fit"
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
