"""Share an evaluation out over the processes of a job: whole batches in turn, gathered on rank 0.

Batches are those of one process, so that each image passes through a network beside the same others.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

# Rank 0 may compute for hours between two exchanges. That a process has gone is seen at once, whatever the limit.
_PATIENCE = timedelta(days=7)


class Share(NamedTuple):
    """The part of a process in the work of ``ranks`` processes. Rank 0 has the results."""

    rank: int = 0
    ranks: int = 1

    def starts(self, count: int, batch: int) -> range:
        """Return where this process's batches begin, of ``count`` rows in batches of ``batch``."""
        return range(self.rank * batch, count, self.ranks * batch)

    def rows(self, count: int, batch: int) -> np.ndarray:
        """Return whether each row is of this process, bool ``[count]``."""
        return np.arange(count) // batch % self.ranks == self.rank

    def done(self, start: int, count: int, batch: int) -> int:
        """Return the number of rows that all processes have done when this one has done its batch at ``start``."""
        return min(start + batch * self.ranks, count) - start

    def gathered(self, own: Tensor, count: int, batch: int) -> Tensor:
        """Return the rows of all processes on rank 0, and the own ones elsewhere. Collective over all ranks.

        Args:
            own: those of this process in their order, ``[n, ...]``, on the CPU; of one type and width on all ranks.
            count: the number of rows of all.
            batch: rows in a batch.
        """
        if self.ranks == 1:
            return own
        if self.rank:
            if len(own):
                dist.send(own.contiguous(), 0)
            return own
        whole = own.new_empty((count, *own.shape[1:]))
        whole[torch.from_numpy(self.rows(count, batch))] = own
        for rank in range(1, self.ranks):
            theirs = torch.from_numpy(Share(rank, self.ranks).rows(count, batch))
            if theirs.any():
                received = own.new_empty((int(theirs.sum()), *own.shape[1:]))
                dist.recv(received, rank)
                whole[theirs] = received
        return whole

    def collected(self, own: list, count: int, batch: int) -> list:
        """Do what :meth:`gathered` does, with objects of any kind."""
        if self.ranks == 1:
            return own
        parts = None if self.rank else [None] * self.ranks
        dist.gather_object(own, parts)
        if parts is None:
            return own
        whole = [None] * count
        for rank, theirs in enumerate(parts):
            for place, one in zip(np.flatnonzero(Share(rank, self.ranks).rows(count, batch)), theirs, strict=True):
                whole[place] = one
        return whole

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.ranks > 1:
            dist.barrier()


ALONE = Share()


@contextmanager
def joined_job() -> Iterator[Share]:
    """Join the processes that torchrun started, and leave them at the end of the block.

    Only rank 0 writes on standard error meanwhile: notices and progress bars are the same everywhere, and an error ends
    the block. The exchange is over gloo on every device, since results lie in the CPU's memory.
    """
    # Imported late: the platform must be installed first.
    from megatron_cca import platform

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    options = platform.process_group_options() | {"backend": "gloo", "timeout": _PATIENCE}
    options.pop("device_id", None)
    dist.init_process_group(**options)
    share = Share(dist.get_rank(), dist.get_world_size())
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere if share.rank else sys.stderr):
        yield share
    dist.destroy_process_group()
