"""Load the batches of a rank ahead of their use."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import TracebackType

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cca.data.microbatches import BatchBuilder, StepBatch, StepPlan
from megatron_cca.data.sequence_feed import SequenceFeed, loader_in_force
from megatron_cca.errors import UserError
from megatron_cca.parallel.across_ranks import described


@dataclass(frozen=True)
class RankShare:
    """The part of a global batch that a rank reads and uses.

    Attributes:
        data_parallel_rank, data_parallel_size: which share of a global batch is this rank's.
        needs_tokens: whether it holds the first or the last layers. Other ranks work on hidden states alone.
        group: ranks that need the same tokens (tensor and context parallel). Its first rank reads them for all. None
            means this rank alone.
    """

    data_parallel_rank: int = 0
    data_parallel_size: int = 1
    needs_tokens: bool = True
    group: dist.ProcessGroup | None = None

    @property
    def reads(self) -> bool:
        """Whether this rank reads from disk."""
        return self.needs_tokens and (self.group is None or dist.get_group_rank(self.group, dist.get_rank()) == 0)


class BatchLoader:
    """A loader of a rank's batches, step by step, prefetched and on its device.

    Args:
        batches: builds the batches.
        share: this rank's.
        device: where the tokens go.
        prefetch: how many steps are read ahead.
        loader: the value of ``data.loader``, see :func:`~megatron_cca.data.sequence_feed.loader_in_force`.
    """

    def __init__(
        self, batches: BatchBuilder, share: RankShare, device: torch.device, prefetch: int, loader: str | None = None
    ) -> None:
        self._batches, self._share, self._device, self._prefetch = batches, share, device, prefetch
        self._wanted = loader
        self._feed: SequenceFeed | None = None
        self._plans: dict[int, StepPlan] = {}
        self._next_step: int | None = None

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def reads(self) -> bool:
        """Whether this rank reads from disk. Other ranks receive the tokens, or need none."""
        return self._share.reads

    @cached_property
    def loader(self) -> str | None:
        """The library that copies batches to the device, ``dali`` or ``torch``. None where this rank reads nothing.

        Raises:
            UserError: DALI is wanted and not installed.
        """
        # This imports DALI, which takes a second.
        return loader_in_force(self._wanted) if self._share.reads else None

    def start(self, step: int) -> None:
        """Begin to read ahead for this step. :meth:`get` does so by itself, but its first call then has to wait."""
        if not self._share.reads:
            return
        self.close()
        share, batches, plans = self._share, self._batches, self._plans

        # The function must not refer to this object: the calling thread would keep it and its process groups alive.
        def sequences(turn: int) -> np.ndarray:
            plans[step + turn] = plan = batches.plan(step + turn)
            return batches.sequences(plan, share.data_parallel_rank, share.data_parallel_size)

        rows = batches.rows_per_rank(share.data_parallel_size)
        self._feed = SequenceFeed(sequences, rows, self._device, self._prefetch, self.loader)
        self._next_step = step

    def get(self, step: int) -> StepBatch:
        """Return the batch of a step. Steps in order are fastest. Collective over the share's group.

        Raises:
            UserError: as :meth:`BatchBuilder.plan` and :meth:`BatchBuilder.sequences` do.
        """
        return self._get(step, self._read(step) if self._share.reads else None)

    def attempt(self, step: int) -> tuple[StepBatch, str | None]:
        """Return the batch of a step, or the reason why it could not be read, where :meth:`get` would raise.

        It is for ranks that have to fail together.

        Returns:
            The batch, and why this rank could not read it, in one line. A batch that was not read holds zeros and must
            not be used. The loader cannot be used afterwards.
        """
        try:
            return self.get(step), None
        except (UserError, OSError) as error:
            problem = described(error)
        plan = self._plans.setdefault(step, self._batches.plan(step))
        return self._get(step, self._room_for(plan).zero_() if self._share.reads else None), problem

    def _get(self, step: int, ids: Tensor | None) -> StepBatch:
        share = self._share
        plan = self._plans.pop(step) if share.reads else self._batches.plan(step)
        if share.needs_tokens:
            ids = self._shared(plan, ids)
        return self._batches.assemble(plan, ids, share.data_parallel_rank, share.data_parallel_size, self._device)

    def close(self) -> None:
        """Stop reading ahead."""
        if self._feed is not None:
            self._feed.close()
        self._feed = None
        self._plans.clear()

    def _shared(self, plan: StepPlan, ids: Tensor | None) -> Tensor:
        if ids is None:
            ids = self._room_for(plan)
        group = self._share.group
        if group is not None and group.size() > 1:
            dist.broadcast(ids, src=dist.get_global_rank(group, 0), group=group)
        return ids

    def _room_for(self, plan: StepPlan) -> Tensor:
        rows = self._batches.rows_per_rank(self._share.data_parallel_size)
        return torch.empty(rows, plan.seq_length + 1, dtype=torch.int64, device=self._device)

    def _read(self, step: int) -> Tensor:
        if self._feed is None or step != self._next_step:
            self.start(step)
        self._next_step = step + 1
        return self._feed.next()
