"""Seconds that ranks wait for each other's bytes, by where their group lies: Megatron's order is TP, CP, DP, PP."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_cca.lab.planner.calibration import Calibration
from megatron_cca.lab.planner.hardware import Cluster


@dataclass(frozen=True)
class Group:
    """Ranks ``stride`` apart.

    Attributes:
        size: how many.
        stride: from one to the next, in global ranks.
        cluster: they are on.
        calibration: of its links.
    """

    size: int
    stride: int
    cluster: Cluster
    calibration: Calibration

    @property
    def ranks_per_node(self) -> int:
        """How many of them share a node."""
        return max(1, min(self.size, self.cluster.gpus_per_node // self.stride))

    @property
    def is_within_a_node(self) -> bool:
        """Whether NVLink connects them all."""
        return self.size == 1 or self.size * self.stride <= self.cluster.gpus_per_node

    def collective(self, whole_bytes: float) -> float:
        """Seconds of an all-gather or reduce-scatter of ``whole_bytes`` (an all-reduce is both).

        Across nodes each rank within a node has a network card of its own, and rings use all of them.
        """
        if self.size == 1:
            return 0.0
        bandwidth = self._nvlink()
        if not self.is_within_a_node:
            bandwidth = min(bandwidth, self.ranks_per_node * self._network())
        latency = math.log2(self.size) * self.calibration.collective_latency_seconds
        return whole_bytes * (self.size - 1) / self.size / bandwidth + latency

    def send(self, message_bytes: float) -> float:
        """Seconds of a message to the next rank of the group, over the slowest link between two neighbours."""
        if self.size == 1:
            return 0.0
        bandwidth = self._nvlink() if self.is_within_a_node else self._network()
        return message_bytes / bandwidth + self.calibration.collective_latency_seconds

    def _nvlink(self) -> float:
        return self.cluster.gpu.nvlink_bandwidth * self.calibration.nvlink_efficiency

    def _network(self) -> float:
        return self.cluster.gpu.network_bandwidth * self.calibration.network_efficiency
