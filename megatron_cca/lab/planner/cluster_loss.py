"""The loss of a cluster beyond bandwidths and latencies: stragglers, congestion, slow links.

Published runs of one model on a growing number of GPUs show the share of a GPU's speed that remains. The planner
explains a part of the loss. The rest is fitted as one number: the share lost at each doubling of the nodes. Its spread
is the difference between the runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import linear_regression

from megatron_cca.lab.planner.hardware import Cluster


@dataclass(frozen=True)
class Series:
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
# The modelled speed of a program whose work and layout on a GPU stay the same.
_SAME2, _SAME3, _SAME4 = (1.0,) * 2, (1.0,) * 3, (1.0,) * 4

SERIES = (
    Series("torchtitan 8B, H100, bf16, weak", _TORCHTITAN, (8, 128), (6667, 6514), (8173, 8232)),
    Series("torchtitan 8B, H100, FP8, weak", _TORCHTITAN, (8, 128), (8532, 8380), (9990, 10078)),
    Series("llm-foundry 13B, H100, weak", _FOUNDRY, (8, 16, 32, 64), (4792, 4767, 4811, 4800), _SAME4),
    Series("llm-foundry 1B, H100, weak", _FOUNDRY, (16, 32, 64), (46037, 45130, 44402), _SAME3),
    Series("llm-foundry 3B, H100, weak", _FOUNDRY, (32, 64), (23021, 22525), _SAME2),
    Series("Megatron-LM 530B, A100, weak", _WEAK_530B, (2240, 4480, 11200), (49.2, 48.8, 48.2), _SAME3),
    Series("MegaScale 530B, A100, weak", _WEAK_530B, (2240, 4480, 11200), (54.3, 54.1, 54.3), _SAME3),
    Series("Megatron-LM 175B, H100, strong", _README, (96, 4608), (47, 42), (441, 379)),
    Series(
        "Megatron-LM 175B, A100, strong",
        _MEGASCALE,
        (256, 512, 768, 1024),
        (53.0, 49.9, 46.7, 44.7),
        (158, 154, 151, 147),
    ),
    Series(
        "Megatron-LM 175B, A100, strong, large batch",
        _MEGASCALE,
        (3072, 6144, 8192, 12288),
        (48.7, 47.8, 43.3, 41.2),
        (155, 150, 147, 140),
    ),
    Series(
        "MegaScale 175B, A100, strong",
        _MEGASCALE,
        (256, 512, 768, 1024),
        (65.3, 63.5, 61.3, 59.0),
        (158, 154, 151, 147),
    ),
    Series(
        "MegaScale 175B, A100, strong, large batch",
        _MEGASCALE,
        (3072, 6144, 8192, 12288),
        (59.1, 57.3, 54.9, 55.2),
        (155, 150, 147, 140),
    ),
    Series("Llama 3 405B, H100, strong", _LLAMA, (8192, 16384), (430, 400), (194, 180)),
)


def fit(series: Sequence[Series]) -> tuple[float, float]:
    """Fit the loss of a doubling and its spread to the series.

    Returns:
        The mean loss of the series, as a logarithm, and one standard deviation of the losses. The weight of a series
        is its number of doublings.
    """
    weights = sum(one.doublings for one in series)
    loss = sum(one.doublings * one.loss for one in series) / weights
    variance = sum(one.doublings * (one.loss - loss) ** 2 for one in series) / weights
    return loss, math.sqrt(variance)


LOSS, SPREAD = fit(SERIES)


def doublings_beyond_a_node(cluster: Cluster) -> float:
    """Return the number of doublings from one node to all nodes; 0 for one node."""
    return max(0.0, math.log2(cluster.num_gpus / cluster.gpus_per_node))


def lost_share(cluster: Cluster) -> float:
    """Return by how much a step takes longer than its parts, as a share of them."""
    return math.expm1(LOSS * doublings_beyond_a_node(cluster))


def lost_spread(cluster: Cluster) -> float:
    """Return one standard deviation of the step time between clusters, as a share of it."""
    return SPREAD * doublings_beyond_a_node(cluster)
