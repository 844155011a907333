"""GPUs with their makers' figures, clusters of them, and the share of those figures that a machine reaches."""

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
    """One accelerator and its links; rates are peaks per second, and for links per direction.

    Attributes:
        name: name for the command line.
        memory_bytes: memory that the driver reports.
        flops: dense FLOP/s by precision; a precision that the GPU cannot compute in is absent. fp32 is without TF32.
        memory_bandwidth: bytes/s of the GPU's own memory.
        nvlink_bandwidth: bytes/s to the other GPUs of its node.
        network_bandwidth: bytes/s to other nodes, as its share of the node's network cards.
        host_bandwidth: bytes/s to host memory.
        gpus_per_node: usual number of GPUs in a node.
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
        """Return the dense FLOP/s of matrix products.

        Raises:
            UserError: the GPU does not support the precision; names ``key``.
        """
        if precision not in self.flops:
            raise UserError(f"{key}: {self.name} computes no {precision}; use {' or '.join(self.flops)}")
        return self.flops[precision]


# Memory is the total that nvidia-smi reports. Products are dense. Data sheets give them with sparsity, twice as much.
# Data sheets give links with both directions together, also twice as much. Network: eight cards a node, 400 Gb/s each
# in DGX H100, H200 and B200, 200 Gb/s in DGX A100.
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
# The name for the measurement of a processor.
CPU = "cpu"
GPUS = {gpu.name: gpu for gpu in _GPUS}
# Parts of the drivers' device names, and our names.
_DEVICE_NAMES = {"H200": "h200", "H100 80GB": "h100-80gb", "B200": "b200", "A100-SXM4-80GB": "a100-80gb"}


def name_of_device(called: str) -> str | None:
    """Return our name of the device that a driver names; None for an unknown device."""
    return next((ours for theirs, ours in _DEVICE_NAMES.items() if theirs in called), None)


def gpu_named(name: str) -> Gpu:
    """Return the GPU that ``--gpu`` names.

    Raises:
        UserError: an unknown GPU; lists the known ones.
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
        gpu: the kind of GPU.
        num_gpus: number of all GPUs; a job has a process on each.
        gpus_per_node: number of GPUs that NVLink connects.
    """

    gpu: Gpu
    num_gpus: int
    gpus_per_node: int


@dataclass(frozen=True)
class Calibration:
    """Shares of peak rates that a machine reaches, and times that do not depend on sizes.

    The defaults are round numbers. They were chosen on ten published runs on H100, B200 and A100. On these, the
    predictions have no bias, and ``relative_error`` covers their scatter. ``tests/unit/test_planner_anchors.py`` has
    the runs and their sources, and checks this. ``tools/plan.py calibrate`` measures another machine.

    Attributes:
        matmul_efficiency: share of the bf16 or fp32 peak that products with long sides reach.
        fp8_matmul_efficiency: the same in FP8.
        matmul_half_size: the shortest side at which products reach half of that.
        attention_efficiency: share of the bf16 (or fp32) peak that causal attention reaches.
        memory_efficiency: share of memory bandwidth that element-wise operations and the optimizer reach.
        nvlink_efficiency: share of NVLink's bandwidth that collectives within a node reach.
        network_efficiency: share of the network's bandwidth that collectives across nodes reach.
        host_efficiency: share of the bandwidth to host memory that copies reach.
        tensor_parallel_overlap: share of tensor-parallel communication that ``parallel.tp_comm_overlap`` hides.
        data_parallel_overlap: share of a data-parallel collective that can hide behind compute.
        collective_latency_seconds: latency of each doubling of a collective's ranks.
        layer_launch_seconds: the least time of a layer's forward, set by kernel launches.
        microbatch_overhead_seconds: overhead of a microbatch in each pass.
        step_overhead_seconds: overhead of a step.
        host_adam_bytes_per_second: rate at which a rank's host updates the state that ``optimizer_cpu_offload`` keeps
            there.
        relative_error: one standard deviation of the measured step times divided by the predicted ones.
        gpu: name of the measured device; None for the defaults.
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
        """Return the share of the peak that a product reaches, from the length of its shortest side."""
        best = self.fp8_matmul_efficiency if precision == "fp8" else self.matmul_efficiency
        return best / (1 + self.matmul_half_size / shortest_side)


DEFAULT = Calibration()


def read_calibration(path: Path, gpu: str) -> tuple[Calibration, Gpu]:
    """Read the file of ``tools/plan.py calibrate``: the calibration, and the device that it belongs to.

    Args:
        path: the JSON file.
        gpu: the GPU to plan for.

    Raises:
        UserError: the file is unreadable, has another format, or was measured on another GPU; names the file.
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
    """Return plain data as keyword arguments.

    All keys must be present. Numbers must be finite and not negative.
    """
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
    """Return the text of the file: the calibration, the device, and the conditions of the measurement."""
    whole = {**about, "device": asdict(device), "calibration": asdict(calibration)}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
