"""How near a machine comes to its data sheet, and how far predictions may be off."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_cca.errors import UserError, said_of, shortened
from megatron_cca.io.external_files import json_object
from megatron_cca.lab.planner.hardware import Gpu


@dataclass(frozen=True)
class Calibration:
    """Shares of peak rates that are reached, and times that do not depend on sizes.

    The defaults are round numbers chosen so that predictions of ten published runs on H100, B200 and A100 are off by
    chance only: no bias, and ``relative_error`` no smaller than what they scatter.
    ``tests/unit/test_planner_anchors.py`` has the runs and their sources, and holds this. ``tools/plan.py calibrate``
    measures one's own machine.

    Attributes:
        matmul_efficiency: of the peak in bf16 and fp32, by products all of whose sides are large.
        fp8_matmul_efficiency: likewise in FP8.
        matmul_half_size: the shortest side at which products reach half of that.
        attention_efficiency: of the bf16 (or fp32) peak, by causal attention.
        memory_efficiency: of memory bandwidth, by element-wise work and the optimizer.
        nvlink_efficiency: of NVLink's bandwidth, by collectives within a node.
        network_efficiency: of the network's, by collectives across nodes.
        host_efficiency: of the bandwidth to host memory.
        tensor_parallel_overlap: share of tensor-parallel communication that ``parallel.tp_comm_overlap`` hides.
        data_parallel_overlap: share of a data-parallel collective that can hide behind compute.
        collective_latency_seconds: of each doubling of a collective's ranks.
        layer_launch_seconds: the least that a layer's forward takes, for want of work to launch.
        microbatch_overhead_seconds: of a microbatch in each pass.
        step_overhead_seconds: of a step.
        host_adam_bytes_per_second: at which a rank's host updates what ``optimizer_cpu_offload`` keeps there.
        relative_error: one standard deviation of measured by predicted step times.
        gpu: what it was measured on; None for the defaults.
    """

    matmul_efficiency: float = 0.70
    fp8_matmul_efficiency: float = 0.55
    matmul_half_size: float = 96.0
    attention_efficiency: float = 0.50
    memory_efficiency: float = 0.80
    nvlink_efficiency: float = 0.75
    network_efficiency: float = 0.80
    host_efficiency: float = 0.80
    tensor_parallel_overlap: float = 0.70
    data_parallel_overlap: float = 0.90
    collective_latency_seconds: float = 1e-5
    layer_launch_seconds: float = 3e-4
    microbatch_overhead_seconds: float = 5e-3
    step_overhead_seconds: float = 5e-2
    host_adam_bytes_per_second: float = 2e10
    relative_error: float = 0.15
    gpu: str | None = None

    def matmul(self, precision: str, shortest_side: float) -> float:
        """Share of the peak that a product reaches whose shortest side is so long."""
        best = self.fp8_matmul_efficiency if precision == "fp8" else self.matmul_efficiency
        return best / (1 + self.matmul_half_size / shortest_side)


DEFAULT = Calibration()


def read_calibration(path: Path, gpu: str) -> tuple[Calibration, Gpu]:
    """What ``tools/plan.py calibrate`` wrote: the numbers, and the device that they are of.

    Args:
        path: its JSON file.
        gpu: the GPU to plan for.

    Raises:
        UserError: unreadable, not such a file, or measured on another GPU; names the file.
    """
    try:
        found = json_object(path)
    except UserError as error:
        raise UserError(f"--calibration: {error}") from None
    with said_of(f"--calibration {path}"):
        calibration = Calibration(**_checked(found.get("calibration"), Calibration, _MAY_BE_ZERO))
        device = _checked(found.get("device"), Gpu, ())
        device["flops"] = _checked_flops(device["flops"])
        if calibration.gpu != gpu:
            raise UserError(f"measured on {calibration.gpu}, not on {gpu}; calibrate there, or leave it out")
    return calibration, Gpu(**device)


_MAY_BE_ZERO = ("_seconds", "_overlap", "_half_size", "_error")


def _checked(values: Any, kind: type, may_be_zero: tuple[str, ...]) -> dict[str, Any]:
    """Plain data as keyword arguments: all keys there, numbers finite and not negative."""
    names = {field.name: field.type for field in fields(kind)}
    if not isinstance(values, dict) or set(values) != set(names):
        raise UserError("not what tools/plan.py calibrate writes; measure again")
    for name, value in values.items():
        if names[name] not in ("int", "float"):
            continue
        if not _is_number(value) or (value == 0 and not name.endswith(may_be_zero or ("\n",))):
            raise UserError(f"{name} must be a positive number, found {shortened(repr(value), 40)}")
    return dict(values)


def _checked_flops(flops: Any) -> dict[str, float]:
    if not isinstance(flops, dict) or not all(_is_number(value) and value > 0 for value in flops.values()):
        raise UserError("flops must be positive numbers by precision; measure again")
    return flops


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def calibration_json(calibration: Calibration, device: Gpu, **about: object) -> str:
    """The file's text: the numbers, the device, and what the measurement was done with."""
    whole = {**about, "device": asdict(device), "calibration": asdict(calibration)}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
