"""Four strategies for the log-probabilities of the frozen reference, with one interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_cca import platform
from megatron_cca.config import Config
from megatron_cca.data.microbatches import StepBatch
from megatron_cca.training.forward import LogpsPass

if TYPE_CHECKING:
    from megatron_cca.data.reference_cache import ReferenceCache, Split
    from megatron_cca.models.streaming import StreamedChunks


class Reference(Protocol):
    """The frozen model that an objective on pairs compares with."""

    def logps(self, batch: StepBatch, step: int, split: Split = "training") -> dict[int, Tensor]:
        """Return the log-probability of each row's image tokens, float32 ``[R]`` by microbatch, on the last stage.

        The result is empty on other stages. Collective over all ranks of the model.

        Args:
            batch: this rank's share of a step.
            step: the number of the step within ``split``.
            split: the stream of batches that the step belongs to.
        """


@dataclass(frozen=True)
class ResidentReference:
    """A reference that stays on the device beside the policy."""

    forward: LogpsPass
    chunks: Sequence[torch.nn.Module]

    def logps(self, batch: StepBatch, step: int, split: Split = "training") -> dict[int, Tensor]:
        """See :class:`Reference`."""
        _set_mode(self.chunks, split)
        return self.forward.logps(self.chunks, batch)


@dataclass(frozen=True)
class OffloadedReference:
    """A reference in host memory that passes through the device one layer at a time."""

    forward: LogpsPass
    streamed: StreamedChunks

    def logps(self, batch: StepBatch, step: int, split: Split = "training") -> dict[int, Tensor]:
        """See :class:`Reference`."""
        with self.streamed.running() as chunks:
            _set_mode(chunks, split)
            return self.forward.logps(chunks, batch)


@dataclass(frozen=True)
class SharedReference:
    """A reference that is the policy itself, without its LoRA adapters."""

    forward: LogpsPass
    policy: Sequence[torch.nn.Module]

    def logps(self, batch: StepBatch, step: int, split: Split = "training") -> dict[int, Tensor]:
        """See :class:`Reference`."""
        from megatron_cca.models.lora import adapters_off

        with adapters_off(self.policy):
            return self.forward.logps(self.policy, batch)


@dataclass(frozen=True)
class CachedReference:
    """A reference without a model. Its log-probabilities come from disk."""

    cache: ReferenceCache

    def logps(self, batch: StepBatch, step: int, split: Split = "training") -> dict[int, Tensor]:
        """See :class:`Reference`."""
        if not parallel_state.is_pipeline_last_stage():
            return {}
        rows = torch.from_numpy(self.cache.read(split, step)).to(platform.device())
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        microbatches = rows.chunk(size)[rank].chunk(len(batch.microbatches))
        # A microbatch's positives come first, then its negatives.
        return {index: microbatch.t().flatten() for index, microbatch in enumerate(microbatches)}


def _set_mode(chunks: Sequence[torch.nn.Module], split: Split) -> None:
    """Turn dropout on in training and off in validation, as for the policy."""
    for chunk in chunks:
        chunk.train(split == "training")


def own_reference(config: Config, forward: LogpsPass, chunks: Sequence[torch.nn.Module]) -> Reference:
    """Return a reference with its own frozen chunks, for strategies of ``has_own_weights``."""
    if config.reference.strategy == "offload":
        from megatron_cca.models.streaming import StreamedChunks

        return OffloadedReference(forward, StreamedChunks(chunks))
    return ResidentReference(forward, chunks)


def borrowed_reference(config: Config, forward: LogpsPass, policy: Sequence[torch.nn.Module]) -> Reference:
    """Return a reference without its own weights: log-probabilities from disk, or the policy without adapters."""
    if config.reference.strategy == "cached":
        from megatron_cca.data.reference_cache import ReferenceCache

        return CachedReference(ReferenceCache(Path(config.reference.cache)))
    return SharedReference(forward, policy)
