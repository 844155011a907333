"""Clusters: the peaks of GPUs and links, the shares of them that are reached, and what a growing cluster loses.

Published runs of one model on a growing number of GPUs show the share of a GPU's speed that remains. The planner
explains a part of the loss. The rest goes to stragglers, congestion and slow links. It is fitted as one number: the
share lost at each doubling of the nodes. Its spread is the difference between the runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import linear_regression
from typing import Any

from megatron_cca.config import Precision
from megatron_cca.errors import UserError, error_context, shortened
from megatron_cca.io.file_contents import json_object

_MIB = 2**20
_MAY_BE_ZERO = ("_seconds", "_overlap", "_half_size", "_error")


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
        raise UserError("--gpu: cpu needs --calibration with what megatron-cca plan calibrate measured on it")
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
    the runs and their sources, and checks this. ``megatron-cca plan calibrate`` measures another machine.

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
    """Read the file of ``megatron-cca plan calibrate``: the calibration, and the device that it belongs to.

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


def calibrated_device(name: str, calibration: Path | None) -> tuple[Gpu, Calibration]:
    """Return the device to plan for, and its calibration.

    Args:
        name: name of the GPU, or :data:`CPU`.
        calibration: the file of ``megatron-cca plan calibrate``; None means the defaults.

    Raises:
        UserError: an unknown GPU, a processor without a calibration, or a file of another device.
    """
    if calibration is None:
        return gpu_named(name), DEFAULT
    found, measured = read_calibration(calibration, name)
    # The project has no data sheet of a processor. Its measurement replaces one.
    return (measured if name == CPU else gpu_named(name)), found


def _checked(values: Any, kind: type, may_be_zero: tuple[str, ...]) -> dict[str, Any]:
    """Return plain data as keyword arguments.

    All keys must be present. Numbers must be finite and not negative.
    """
    names = {field.name: field.type for field in fields(kind)}
    if not isinstance(values, dict) or set(values) != set(names):
        raise UserError("not what megatron-cca plan calibrate writes; measure again")
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


@dataclass(frozen=True)
class PublishedSpeeds:
    """Published speeds of one program and model on a growing number of GPUs.

    Attributes:
        name: program, model, GPU, and whether the batch grows (weak) or stays the same (strong).
        source: the publication.
        gpus: numbers of GPUs of the runs.
        published: speed of one GPU in any unit, such as tokens/s or MFU.
        modelled: speed that the planner predicts without this loss, in any unit; ``tests/unit/test_cluster_loss.py``
            computes it again.
    """

    name: str
    source: str
    gpus: tuple[int, ...]
    published: tuple[float, ...]
    modelled: tuple[float, ...]

    @property
    def doublings(self) -> float:
        """Number of doublings from the fewest GPUs to the most."""
        return math.log2(self.gpus[-1] / self.gpus[0])

    @property
    def loss(self) -> float:
        """Loss of each doubling by least squares, as the logarithm of a share."""
        x = [math.log2(count) for count in self.gpus]
        y = [math.log(model / found) for model, found in zip(self.modelled, self.published, strict=True)]
        return linear_regression(x, y).slope


_MEGASCALE = "MegaScale, arXiv 2402.15627, table 2"
_WEAK_530B = "MegaScale, arXiv 2402.15627, figure 9"
_TORCHTITAN = "pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md"
_FOUNDRY = "mosaicml/llm-foundry, scripts/train/benchmarking/README.md"
_README = "NVIDIA/Megatron-LM, README.md"
_LLAMA = "Llama 3, arXiv 2407.21783, table 4"
# Columns of several series: numbers of GPUs, and modelled speeds. These are 1 where a GPU's work and layout stay alike.
_SAME2, _SAME3, _SAME4 = (1.0,) * 2, (1.0,) * 3, (1.0,) * 4
_GPUS_530B, _USUAL, _LARGE = (2240, 4480, 11200), (256, 512, 768, 1024), (3072, 6144, 8192, 12288)
_USUAL_MODELLED, _LARGE_MODELLED = (158, 154, 151, 147), (155, 150, 147, 140)

PUBLISHED = (
    PublishedSpeeds("torchtitan 8B, H100, bf16, weak", _TORCHTITAN, (8, 128), (6667, 6514), (8173, 8232)),
    PublishedSpeeds("torchtitan 8B, H100, FP8, weak", _TORCHTITAN, (8, 128), (8532, 8380), (9990, 10078)),
    PublishedSpeeds("llm-foundry 13B, H100, weak", _FOUNDRY, (8, 16, 32, 64), (4792, 4767, 4811, 4800), _SAME4),
    PublishedSpeeds("llm-foundry 1B, H100, weak", _FOUNDRY, (16, 32, 64), (46037, 45130, 44402), _SAME3),
    PublishedSpeeds("llm-foundry 3B, H100, weak", _FOUNDRY, (32, 64), (23021, 22525), _SAME2),
    PublishedSpeeds("Megatron-LM 530B, A100, weak", _WEAK_530B, _GPUS_530B, (49.2, 48.8, 48.2), _SAME3),
    PublishedSpeeds("MegaScale 530B, A100, weak", _WEAK_530B, _GPUS_530B, (54.3, 54.1, 54.3), _SAME3),
    PublishedSpeeds("Megatron-LM 175B, H100, strong", _README, (96, 4608), (47, 42), (441, 379)),
    PublishedSpeeds("Megatron-LM 175B, A100, strong", _MEGASCALE, _USUAL, (53.0, 49.9, 46.7, 44.7), _USUAL_MODELLED),
    PublishedSpeeds(
        "Megatron-LM 175B, A100, strong, large batch", _MEGASCALE, _LARGE, (48.7, 47.8, 43.3, 41.2), _LARGE_MODELLED
    ),
    PublishedSpeeds("MegaScale 175B, A100, strong", _MEGASCALE, _USUAL, (65.3, 63.5, 61.3, 59.0), _USUAL_MODELLED),
    PublishedSpeeds(
        "MegaScale 175B, A100, strong, large batch", _MEGASCALE, _LARGE, (59.1, 57.3, 54.9, 55.2), _LARGE_MODELLED
    ),
    PublishedSpeeds("Llama 3 405B, H100, strong", _LLAMA, (8192, 16384), (430, 400), (194, 180)),
)


def fit(series: Sequence[PublishedSpeeds]) -> tuple[float, float]:
    """Fit the loss of a doubling and its spread to the series.

    Returns:
        The mean loss of the series, as a logarithm, and one standard deviation of the losses. The weight of a series
        is its number of doublings.
    """
    weights = sum(one.doublings for one in series)
    loss = sum(one.doublings * one.loss for one in series) / weights
    variance = sum(one.doublings * (one.loss - loss) ** 2 for one in series) / weights
    return loss, math.sqrt(variance)


LOSS, SPREAD = fit(PUBLISHED)


def doublings_beyond_a_node(cluster: Cluster) -> float:
    """Return the number of doublings from one node to all nodes; 0 for one node."""
    return max(0.0, math.log2(cluster.num_gpus / cluster.gpus_per_node))


def lost_share(cluster: Cluster) -> float:
    """Return by how much a step takes longer than its parts, as a share of them."""
    return math.expm1(LOSS * doublings_beyond_a_node(cluster))


def lost_spread(cluster: Cluster) -> float:
    """Return one standard deviation of the step time between clusters, as a share of it."""
    return SPREAD * doublings_beyond_a_node(cluster)
