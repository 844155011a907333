"""What ``tools/plan.py calibrate`` does."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from megatron_cca import __version__, platform
from megatron_cca.config.load import load_config
from megatron_cca.io.outputs import check_file, file_system_errors, write_text
from megatron_cca.lab.planner.calibration import calibration_json
from megatron_cca.lab.planner.options import CalibrateSettings
from megatron_cca.lab.planner.program import image_shape
from megatron_cca.lab.planner.workload import image_workload
from megatron_cca.version import installed_versions

if TYPE_CHECKING:
    from megatron_cca.lab.planner.calibrate import Measured

# That times depend on.
PACKAGES = ("torch", "megatron-core", "transformer-engine")


def run_calibrate(settings: CalibrateSettings) -> None:
    """Measure, write the file, and print what was found.

    Raises:
        UserError: an option that cannot be, what training refuses on this device, a file that is in the way.
    """
    config = load_config(settings.config, settings.overrides)
    images = image_shape(config, settings.image_grid, settings.caption_tokens)
    # For its refusals: measuring the processor alone can take a minute.
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
