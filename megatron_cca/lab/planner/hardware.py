"""GPUs by name, with their makers' figures, and a cluster of them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cca.config import Precision
from megatron_cca.errors import UserError

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
