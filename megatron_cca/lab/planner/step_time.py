"""What is known of a step before it runs: its seconds by cause, and what follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from megatron_cca.lab.planner.flops import mfu


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the rank that is busiest, by cause; the parts add up to ``total``.

    Attributes:
        compute: the policy's layers, forward and backward.
        recompute: layers computed again in backward.
        head: the policy's log-probabilities, forward and backward.
        reference: the frozen model's layers and log-probabilities, and waiting for its weights.
        bubble: waiting for other pipeline stages while the pipeline fills and drains.
        tensor_parallel: communication within layers that nothing hides.
        context_parallel: communication of keys and values that nothing hides.
        pipeline: messages between stages that nothing hides.
        data_parallel: gradients and parameters, as far as nothing hides them.
        optimizer: the update.
        overhead: what does not depend on sizes, and waiting for work to be launched.
        cluster: stragglers, congestion and the like, from published runs; see ``cluster_loss.py``.
        samples: of the global batch.
        tokens_per_gpu: positions that the policy computes in a step, divided by the GPUs.
        model_flops_per_gpu: of a step; the policy's forward and backward and the reference's forward, nothing twice.
        peak_flops: of the GPU, averaged over the precisions of the step's products; see ``flops.average_peak``.
        relative_error: one standard deviation of what the parts but ``cluster`` may be off.
        cluster_spread: one of what clusters differ in, as a share of the step.
    """

    compute: float
    recompute: float
    head: float
    reference: float
    bubble: float
    tensor_parallel: float
    context_parallel: float
    pipeline: float
    data_parallel: float
    optimizer: float
    overhead: float
    cluster: float
    samples: int
    tokens_per_gpu: float
    model_flops_per_gpu: float
    peak_flops: float
    relative_error: float
    cluster_spread: float

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by cause."""
        return {name: getattr(self, name) for name in PARTS}

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.parts.values())

    @property
    def error(self) -> float:
        """Two standard deviations, of the model's error and the clusters' spread together, as a share of ``total``."""
        return 2 * math.hypot(self.relative_error, self.cluster_spread)

    @property
    def low(self) -> float:
        """Two standard deviations less."""
        return self.total * max(0.0, 1 - self.error)

    @property
    def high(self) -> float:
        """Two standard deviations more."""
        return self.total * (1 + self.error)

    @property
    def samples_per_second(self) -> float:
        """Of the whole job."""
        return self.samples / self.total

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Positions of the policy's rows, padding included."""
        return self.tokens_per_gpu / self.total

    @property
    def model_flops_per_second(self) -> float:
        """Of one GPU."""
        return self.model_flops_per_gpu / self.total

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, as ``flops.MFU_MEANS`` says."""
        return mfu(self.model_flops_per_gpu, self.total, self.peak_flops)

    @property
    def communication(self) -> float:
        """Seconds of exposed communication of all kinds."""
        return self.tensor_parallel + self.context_parallel + self.pipeline + self.data_parallel


PARTS = tuple(field.name for field in fields(StepTime))[:12]
