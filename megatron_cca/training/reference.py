"""Compute the log-probabilities of a batch in the same way for the policy and for the frozen reference.

The reference has four strategies with one interface.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_cca import platform
from megatron_cca.config import Config
from megatron_cca.data.microbatches import Microbatch, StepBatch
from megatron_cca.models.gpt import image_logps
from megatron_cca.models.image_vocabulary import Vocabulary
from megatron_cca.training import head_support

if TYPE_CHECKING:
    from megatron_cca.data.reference_cache import ReferenceCache, Split
    from megatron_cca.models.frozen_weights import StreamedChunks

LossOf = Callable[[int, Microbatch, Tensor], tuple[Tensor, dict]]


def head_options(config: Config, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the keyword arguments of ``sequence_logps`` that a run determines, all but the tensors.

    Args:
        config: of the run.
        vocabulary: of its model.
    """
    return {
        "vocab_size": vocabulary.output_size,
        "support": head_support(config, vocabulary),
        "chunk_size": config.training.logps_chunk_size,
    }


def policy_head(config: Config, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return :func:`head_options`, and what mixes rows if the objective does."""
    head, share = head_options(config, vocabulary), config.objective.conditional_share
    if share is not None:
        from megatron_cca.parallel.mixed_logps import mixed_sequence_logps

        head["logps_of"] = partial(mixed_sequence_logps, share=share)
    return head


@dataclass(frozen=True)
class LogpsPass:
    """A pass of model chunks over the microbatches of a step.

    Attributes:
        rows_per_microbatch: rows of one forward pass.
        head: from :func:`head_options` or :func:`policy_head`.
        beat: called at every microbatch, to tell the watchdog that this rank makes progress.
    """

    rows_per_microbatch: int
    head: dict[str, Any]
    beat: Callable[[], None] = lambda: None

    def logps(self, chunks: Sequence[torch.nn.Module], batch: StepBatch) -> dict[int, Tensor]:
        """Return the log-probability of each row's image tokens, float32 ``[R]`` by microbatch, on the last stage.

        A head that mixes rows gives ``[R / 2]``. The result is empty on other stages. No graph is kept for a backward
        pass. Collective over the pipeline.
        """

        def forward_step(microbatches: Iterator, model: torch.nn.Module):
            index, _, output = self._forward(microbatches, model)
            return output, lambda logps, non_loss_data: (index, logps)

        with torch.no_grad():
            run = get_forward_backward_func()
            schedule = self._schedule(chunks, batch, forward_step)
            return dict(run(**schedule, forward_only=True, collect_non_loss_data=True))

    def settle_scales(self, chunks: Sequence[torch.nn.Module], batch: StepBatch) -> None:
        """Run one pass and drop its results, so that delayed FP8 scaling has an amax history before the first step.

        Transformer Engine records amax values only in passes with gradients enabled. Collective over the pipeline.
        """

        def forward_step(microbatches: Iterator, model: torch.nn.Module):
            _, _, output = self._forward(microbatches, model)
            return output, lambda logps, non_loss_data: None

        with torch.enable_grad():
            run = get_forward_backward_func()
            run(**self._schedule(chunks, batch, forward_step), forward_only=True, collect_non_loss_data=True)

    def train(self, chunks: Sequence[torch.nn.Module], batch: StepBatch, loss_of: LossOf) -> None:
        """Run forward and backward of every microbatch.

        Args:
            chunks: wrapped in DDP, whose gradient buffers receive the gradients.
            batch: this rank's share of a step.
            loss_of: called on the last stage with a microbatch's number, rows and log-probabilities ``[R]``. It returns
                the scalar loss, and a dict that Megatron passes on.
        """

        def forward_step(microbatches: Iterator, model: torch.nn.Module):
            index, rows, output = self._forward(microbatches, model)
            return output, partial(loss_of, index, rows)

        get_forward_backward_func()(**self._schedule(chunks, batch, forward_step), forward_only=False)

    def _forward(self, microbatches: Iterator, model: torch.nn.Module) -> tuple[int, Microbatch, Tensor]:
        self.beat()
        index, rows = next(microbatches)
        return index, rows, image_logps(model, rows.tokens, rows.targets, rows.mask, **self.head)

    def _schedule(self, chunks: Sequence[torch.nn.Module], batch: StepBatch, forward_step: Callable) -> dict[str, Any]:
        """Return the arguments of Megatron's schedule that every pass has."""
        return {
            "forward_step_func": forward_step,
            "data_iterator": [iter(enumerate(batch.microbatches)) for _ in chunks],
            "model": list(chunks),
            "num_microbatches": len(batch.microbatches),
            "seq_length": batch.seq_length,
            "micro_batch_size": self.rows_per_microbatch,
        }


def gathered_rows(mine: Tensor) -> Tensor:
    """Return ``[C, rows of the global batch]`` from each data-parallel rank's ``[C, own rows]``, in order of ranks."""
    group = parallel_state.get_data_parallel_group()
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine.contiguous(), group=group)
    return torch.cat(everyone, dim=1)


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


def own_reference(config: Config, forward: LogpsPass, chunks: Sequence[torch.nn.Module]) -> Reference:
    """Return a reference with its own frozen chunks, for strategies of ``has_own_weights``."""
    if config.reference.strategy == "offload":
        from megatron_cca.models.frozen_weights import StreamedChunks

        return OffloadedReference(forward, StreamedChunks(chunks))
    return ResidentReference(forward, chunks)


def borrowed_reference(config: Config, forward: LogpsPass, policy: Sequence[torch.nn.Module]) -> Reference:
    """Return a reference without its own weights: log-probabilities from disk, or the policy without adapters."""
    if config.reference.strategy == "cached":
        from megatron_cca.data.reference_cache import ReferenceCache

        return CachedReference(ReferenceCache(Path(config.reference.cache)))
    return SharedReference(forward, policy)


def _set_mode(chunks: Sequence[torch.nn.Module], split: Split) -> None:
    """Turn dropout on in training and off in validation, as for the policy."""
    for chunk in chunks:
        chunk.train(split == "training")
