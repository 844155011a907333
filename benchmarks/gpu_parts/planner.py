"""The planner against measurements: with its defaults, and calibrated on this device."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gpu_parts.lines import milliseconds
from gpu_parts.training import configured, draw_on_the_device, known_gpu, predictions
from megatron_cca import platform
from megatron_cca.lab.planner import measuring
from megatron_cca.lab.planner.calibrate import calibrate
from megatron_cca.lab.planner.hardware import CPU, calibration_json, read_calibration
from megatron_cca.lab.planner.workload import image_workload

_NUMBERS = (
    *("matmul_efficiency", "fp8_matmul_efficiency", "attention_efficiency", "memory_efficiency"),
    *("microbatch_overhead_seconds", "step_overhead_seconds", "relative_error"),
)
# The calibration of this process; None before it.
_calibration: str | None = None


def measure(values: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Calibrate, or predict a measured step."""
    return _predicted(values) if "line" in values else _calibrated(values)


def _calibrated(values: dict[str, Any]) -> dict[str, Any]:
    global _calibration
    config, images = configured(values)
    if not platform.current().is_cuda:
        # A processor's bf16 products take seconds each. A rehearsal needs no exact calibration.
        measuring._ENOUGH_REPEATS = 2
    found = calibrate(config, images, None, values["repeats"], initialize=draw_on_the_device)
    _calibration = calibration_json(found.calibration, found.gpu, steps=values["repeats"])
    numbers = {name: getattr(found.calibration, name) for name in _NUMBERS}
    return {**numbers, "errors": found.errors, "calibration": _calibration}


def _predicted(values: dict[str, Any]) -> dict[str, Any]:
    """Predict the milliseconds and bytes of one line; return them with the measured ones."""
    line, text = values["line"], _calibration or values["calibration"]
    config, images = configured(line["settings"])
    workload, gpu = image_workload(config, images), known_gpu()
    plain = predictions(config, workload)
    calibrated = None
    if text is not None:
        with TemporaryDirectory() as folder:
            file = Path(folder) / "calibration.json"
            file.write_text(text)
            calibration, device = read_calibration(file, CPU if gpu is None else gpu.name)
        calibrated = predictions(config, workload, device, calibration)["ms"]
    return {
        "measured_ms": milliseconds(line)["median"],
        "predicted_ms": plain["ms"],
        "calibrated_ms": calibrated,
        "measured_bytes": line["figures"]["peak_bytes"],
        "predicted_bytes": plain["peak_bytes"],
    }
