"""How near a machine comes to its data sheet, and how far predictions may be off."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_cca.errors import UserError
from megatron_cca.foreign import json_object


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


def read_calibration(path: Path, gpu: str) -> Calibration:
    """What ``tools/plan.py calibrate`` wrote.

    Args:
        path: its JSON file.
        gpu: the GPU to plan for.

    Raises:
        UserError: unreadable, not such a file, or measured on another GPU; names the file.
    """
    try:
        values = json_object(path).get("calibration")
    except UserError as error:
        raise UserError(f"--calibration: {error}") from None
    problem = f"--calibration {path}"
    names = {field.name for field in fields(Calibration)}
    if not isinstance(values, dict) or set(values) != names:
        raise UserError(f"{problem}: not what tools/plan.py calibrate writes; measure again")
    for name in sorted(names - {"gpu"}):
        value = values[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise UserError(f"{problem}: {name} must be a number of 0 or more, found {value!r}")
        if value == 0 and not name.endswith(("_seconds", "_overlap", "_half_size", "_error")):
            raise UserError(f"{problem}: {name} must be more than 0")
    if values["gpu"] != gpu:
        raise UserError(f"{problem}: measured on {values['gpu']!r}, not on {gpu}; calibrate there, or leave it out")
    return Calibration(**values)


def calibration_json(calibration: Calibration, **about: object) -> str:
    """The file's text: the numbers, and what the measurement was done with."""
    return json.dumps({**about, "calibration": asdict(calibration)}, indent=1, ensure_ascii=False) + "\n"
