"""GPUs by name, with their makers' figures, a cluster of them, and how near a machine comes to its data sheet."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_cca.config import Precision
from megatron_cca.errors import UserError, error_context, shortened
from megatron_cca.io.external_files import json_object

_MIB = 2**20


@dataclass(frozen=True)
class Gpu:
    """One accelerator and what connects it; rates are peaks, per second and, of links, per direction.

    Attributes:
        name: as users write it.
        memory_bytes: what the driver says it has.
        flops: dense FLOP/s by precision; of a precision that it cannot compute in there is none. fp32 is without TF32.
        memory_bandwidth: bytes/s of its own memory.
        nvlink_bandwidth: bytes/s to the other GPUs of its node.
        network_bandwidth: bytes/s to other nodes: its share of the node's network cards.
        host_bandwidth: bytes/s to host memory.
        gpus_per_node: how many there usually are.
    """

    name: str
    memory_bytes: int
    flops: dict[str, float]
    memory_bandwidth: float
    nvlink_bandwidth: float
    network_bandwidth: float
    host_bandwidth: float
    gpus_per_node: int = 8

    def peak_flops(self, precision: Precision, key: str = "training.precision") -> float:
        """Dense FLOP/s of matrix products.

        Raises:
            UserError: a precision that this GPU has no units for; names ``key``.
        """
        if precision not in self.flops:
            raise UserError(f"{key}: {self.name} computes no {precision}; use {' or '.join(self.flops)}")
        return self.flops[precision]


# Memory is what nvidia-smi lists as total. Products are dense: data sheets give them with sparsity, twice as much. They
# give links with both directions together, twice as much as here. Network: eight cards a node, 400 Gb/s each in DGX
# H100, H200 and B200, 200 Gb/s in DGX A100.
_GPUS = (
    # NVIDIA A100 Tensor Core GPU data sheet (SXM): 312 TFLOP/s BF16, 19.5 FP32, 600 GB/s NVLink, PCIe 4.
    Gpu("a100-40gb", 40_960 * _MIB, {"fp32": 19.5e12, "bf16": 312e12}, 1.555e12, 300e9, 25e9, 32e9),
    Gpu("a100-80gb", 81_920 * _MIB, {"fp32": 19.5e12, "bf16": 312e12}, 2.039e12, 300e9, 25e9, 32e9),
    # NVIDIA H100 Tensor Core GPU data sheet (SXM): 1,979 TFLOP/s BF16 and 3,958 FP8 with sparsity, 67 FP32, 3.35 TB/s,
    # 900 GB/s NVLink, PCIe 5.
    Gpu(
        "h100-80gb",
        81_559 * _MIB,
        {"fp32": 67e12, "bf16": 989.5e12, "fp8": 1979e12},
        3.35e12,
        450e9,
        50e9,
        64e9,
    ),
    # NVIDIA H200 Tensor Core GPU data sheet (SXM): the H100's products, 141 GB at 4.8 TB/s.
    Gpu("h200", 143_771 * _MIB, {"fp32": 67e12, "bf16": 989.5e12, "fp8": 1979e12}, 4.8e12, 450e9, 50e9, 64e9),
    # NVIDIA DGX B200 data sheet, an eighth: 72 PFLOP/s FP8 training with sparsity, 64 TB/s, 14.4 TB/s NVLink; HGX B200:
    # 36 PFLOP/s BF16 with sparsity, 600 TFLOP/s FP32.
    Gpu("b200", 183_359 * _MIB, {"fp32": 75e12, "bf16": 2250e12, "fp8": 4500e12}, 8e12, 900e9, 50e9, 64e9),
)
# The name under which a processor is measured.
CPU = "cpu"
GPUS = {gpu.name: gpu for gpu in _GPUS}
# As the drivers call them.
_DEVICE_NAMES = {"H200": "h200", "H100 80GB": "h100-80gb", "B200": "b200", "A100-SXM4-80GB": "a100-80gb"}


def name_of_device(called: str) -> str | None:
    """Our name of what a driver calls a device; None for what is not known here."""
    return next((ours for theirs, ours in _DEVICE_NAMES.items() if theirs in called), None)


def gpu_named(name: str) -> Gpu:
    """The GPU that ``--gpu`` names.

    Raises:
        UserError: an unknown one; lists those that are known.
    """
    if name == CPU:
        raise UserError("--gpu: cpu needs --calibration with what tools/plan.py calibrate measured on it")
    if name not in GPUS:
        raise UserError(f"--gpu: {name!r} is unknown; known: {', '.join(GPUS)}")
    return GPUS[name]


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind in nodes that are all alike.

    Attributes:
        gpu: the kind.
        num_gpus: all of them; a job has a process on each.
        gpus_per_node: those that NVLink connects.
    """

    gpu: Gpu
    num_gpus: int
    gpus_per_node: int


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
    with error_context(f"--calibration {path}"):
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
