"""The process that writes a checkpoint while training goes on."""

from __future__ import annotations

import ctypes
import functools
import os
import pickle
import queue
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from megatron_cca import platform
from megatron_cca.checkpoint import records
from megatron_cca.checkpoint.records import file_system_cause
from megatron_cca.megatron_compat.checkpoint_writer import watched_writes
from megatron_cca.parallel.agreement import described
from megatron_cca.signals import STOPPING

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Written:
    """What a rank's writer adds to Megatron's own results.

    Attributes:
        checksums: of the files it wrote, by name.
        problem: why it could not write, in one line; None if it could.
    """

    checksums: dict[str, str]
    problem: str | None


class ResultsFile:
    """What Megatron's writer process answers, through a file in memory that parent and forked child share.

    Megatron would start a server process for it that survives a killed rank, and takes seconds to import torch.
    """

    def __init__(self) -> None:
        # A file object, so that it goes with this one: a run saves many times.
        self._file = os.fdopen(os.memfd_create("checkpoint_results"), "r+b", buffering=0)
        self._read = 0

    def put(self, item: object) -> None:
        """Append an item."""
        data = pickle.dumps(item)
        rest = memoryview(len(data).to_bytes(8, "little") + data)
        while rest:
            rest = rest[self._file.write(rest) :]

    def get_nowait(self) -> object:
        """The next item; raises :class:`queue.Empty` where there is none."""
        size = int.from_bytes(os.pread(self._file.fileno(), 8, self._read), "little")
        data = os.pread(self._file.fileno(), size, self._read + 8)
        if not size or len(data) < size:
            raise queue.Empty
        self._read += 8 + size
        # From this rank's own forked child, through memory that no one else can open.
        return pickle.loads(data)  # noqa: S301


def writes_in_background(wanted: bool | None) -> bool:
    """Whether a forked process writes while training goes on.

    Args:
        wanted: ``training.async_save``; None is true on a CPU alone: CUDA does not support a fork after its start.
    """
    return not platform.current().is_cuda if wanted is None else wanted


def hashing(request: AsyncRequest, folder: Path, results: ResultsFile, *, in_background: bool) -> AsyncRequest:
    """The request to write this rank's files, and to hash them; a :class:`Written` follows as one more result."""
    if request.async_fn is None:
        return request
    write = functools.partial(_write, request.async_fn, folder, dist.get_rank(), results, os.getpid(), in_background)
    return request._replace(async_fn=write)


def _write(
    write: Callable, folder: Path, rank: int, results: ResultsFile, parent: int, in_background: bool, *arguments
) -> None:
    if in_background:
        _die_with(parent)
    problems: list[str] = []
    # Megatron's writer reports that something went wrong but not what.
    with watched_writes(lambda error: problems.append(described(file_system_cause(error)))):
        write(*arguments)
    checksums = {}
    try:
        checksums = records.checksums(folder, [path.name for path in folder.glob(f"__{rank}_*.distcp")])
    except OSError as error:
        problems.append(described(error))
    results.put(Written(checksums, next(iter(problems), None)))


def _die_with(parent: int) -> None:
    """Let this process end when its rank is killed, so that it cannot write into what the next attempt writes."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    for number in STOPPING:
        # They go to the whole job; the rank decides what they mean, and waits for this process.
        signal.signal(number, signal.SIG_IGN)
