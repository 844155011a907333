"""Hands a rank its batches, read ahead of their use."""

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
class Place:
    """What a rank needs of the data.

    Attributes:
        data_parallel_rank, data_parallel_size: which share of a global batch is this rank's.
        needs_tokens: whether it holds the first or the last layers; others work on hidden states alone.
        group: ranks that need the same tokens (tensor and context parallel); its first rank reads them for all. None
            stands for this rank alone.
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
    """A rank's batches, one step after the other, prefetched and on its device.

    Args:
        batches: how they are built.
        place: this rank's.
        device: where the tokens go.
        prefetch: so many steps are read ahead.
        loader: who takes them there, as ``data.loader``.
    """

    def __init__(
        self, batches: BatchBuilder, place: Place, device: torch.device, prefetch: int, loader: str | None = None
    ) -> None:
        self._batches, self._place, self._device, self._prefetch = batches, place, device, prefetch
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
        """Whether this rank reads from disk; others are sent what it read, or need nothing."""
        return self._place.reads

    @cached_property
    def loader(self) -> str | None:
        """Who takes the batches to the device: ``dali`` or ``torch``; None where this rank reads nothing.

        Raises:
            UserError: DALI is wanted and not installed.
        """
        # Asking imports DALI, which takes a second.
        return loader_in_force(self._wanted) if self._place.reads else None

    def start(self, step: int) -> None:
        """Begin to read ahead for this step; :meth:`get` does so by itself, but then has to wait the first time."""
        if not self._place.reads:
            return
        self.close()
        place, batches, plans = self._place, self._batches, self._plans

        # Without this object, so that the thread that calls it does not keep it, its process groups among it, alive.
        def sequences(turn: int) -> np.ndarray:
            plans[step + turn] = plan = batches.plan(step + turn)
            return batches.sequences(plan, place.data_parallel_rank, place.data_parallel_size)

        rows = batches.rows_per_rank(place.data_parallel_size)
        self._feed = SequenceFeed(sequences, rows, self._device, self._prefetch, self.loader)
        self._next_step = step

    def get(self, step: int) -> StepBatch:
        """The batch of a step; steps are best asked for in order. Collective over the place's group.

        Raises:
            UserError: as :meth:`BatchBuilder.plan` and :meth:`BatchBuilder.sequences` do.
        """
        return self._get(step, self._read(step) if self._place.reads else None)

    def attempt(self, step: int) -> tuple[StepBatch, str | None]:
        """As :meth:`get`, for ranks that are to meet trouble together.

        Returns:
            The batch, and why this rank could not read it, in one line. A batch that was not read holds zeros and must
            change nothing; the loader is of no further use.
        """
        try:
            return self.get(step), None
        except (UserError, OSError) as error:
            problem = described(error)
        plan = self._plans.setdefault(step, self._batches.plan(step))
        return self._get(step, self._room_for(plan).zero_() if self._place.reads else None), problem

    def _get(self, step: int, ids: Tensor | None) -> StepBatch:
        place = self._place
        plan = self._plans.pop(step) if place.reads else self._batches.plan(step)
        if place.needs_tokens:
            ids = self._shared(plan, ids)
        return self._batches.assemble(plan, ids, place.data_parallel_rank, place.data_parallel_size, self._device)

    def close(self) -> None:
        """Stop reading ahead."""
        if self._feed is not None:
            self._feed.close()
        self._feed = None
        self._plans.clear()

    def _shared(self, plan: StepPlan, ids: Tensor | None) -> Tensor:
        if ids is None:
            ids = self._room_for(plan)
        group = self._place.group
        if group is not None and group.size() > 1:
            dist.broadcast(ids, src=dist.get_global_rank(group, 0), group=group)
        return ids

    def _room_for(self, plan: StepPlan) -> Tensor:
        rows = self._batches.rows_per_rank(self._place.data_parallel_size)
        return torch.empty(rows, plan.seq_length + 1, dtype=torch.int64, device=self._device)

    def _read(self, step: int) -> Tensor:
        if self._feed is None or step != self._next_step:
            self.start(step)
        self._next_step = step + 1
        return self._feed.next()
