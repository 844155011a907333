"""How long this thread stands in collectives and messages: what gloo's communication costs, all of it exposed."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Work

from megatron_cca.lab.scaling.spans import Span

# ProcessGroup's methods that communicate; every function of torch.distributed ends in one of them.
_COMMUNICATES = re.compile(r"_?(all|reduce|broadcast|gather|scatter|send|recv|barrier|monitored_barrier)")
_METHODS = [name for name in vars(dist.ProcessGroup) if _COMMUNICATES.match(name)]

StageOf = Callable[[int], int]


@dataclass
class _Call:
    kind: str
    crosses_stages: bool
    work: Any
    seconds: float


class CollectiveTimer:
    """What the thread that made it has waited, call by call. Nothing else may time the same process meanwhile.

    Args:
        stage_of: the pipeline stage of a rank of the job.
    """

    def __init__(self, stage_of: StageOf) -> None:
        self._stage_of = stage_of
        self._thread = threading.get_ident()
        self._calls: list[_Call] = []
        # By the work's identity; the call holds it, so that no other gets the same.
        self._pending: dict[int, _Call] = {}
        self._is_inside = False

    @property
    def spans(self) -> list[Span]:
        """What was timed."""
        return [Span(one.kind, one.crosses_stages, one.seconds, one.seconds) for one in self._calls]

    def call(self, name: str, method: Callable, group: dist.ProcessGroup, arguments: tuple, options: dict) -> Any:
        """Make a call and time it; what it starts is timed on when it is waited for."""
        # A job of one has nobody to wait for. Other threads do not keep this one.
        if group.size() == 1 or self._is_inside or threading.get_ident() != self._thread:
            return method(group, *arguments, **options)
        stages = {self._stage_of(rank) for rank in dist.get_process_group_ranks(group)}
        started = time.perf_counter()
        self._is_inside = True
        try:
            work = method(group, *arguments, **options)
        finally:
            self._is_inside = False
        seconds = time.perf_counter() - started
        one = _Call(f"{name} {_num_bytes(arguments)}", len(stages) > 1, work, seconds)
        self._calls.append(one)
        if work is not None:
            self._pending[id(work)] = one
        return work

    def wait(self, method: Callable, work: Work, arguments: tuple, options: dict) -> Any:
        """Wait for what a call has started."""
        one = self._pending.get(id(work))
        if one is None or self._is_inside or threading.get_ident() != self._thread:
            return method(work, *arguments, **options)
        started = time.perf_counter()
        try:
            return method(work, *arguments, **options)
        finally:
            one.seconds += time.perf_counter() - started


def _num_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(_num_bytes(one) for one in value) if isinstance(value, list | tuple) else 0


@contextmanager
def timed_collectives(stage_of: StageOf) -> Iterator[CollectiveTimer]:
    """Time everything that this thread communicates inside the block."""
    timer = CollectiveTimer(stage_of)
    # The methods of torch 2.15's class, not torch.distributed's functions, to which Megatron-Core keeps references.
    # What stands in the class and not what it gives when asked: only the former becomes a method again.
    before = {name: vars(dist.ProcessGroup)[name] for name in _METHODS}
    wait, waits = Work.wait, vars(Work)["wait"]
    for name in before:
        setattr(dist.ProcessGroup, name, _timed_method(timer, name, getattr(dist.ProcessGroup, name)))
    Work.wait = lambda work, *arguments, **options: timer.wait(wait, work, arguments, options)
    try:
        yield timer
    finally:
        Work.wait = waits
        for name, method in before.items():
            setattr(dist.ProcessGroup, name, method)


def _timed_method(timer: CollectiveTimer, name: str, method: Callable) -> Callable:
    return lambda group, *arguments, **options: timer.call(name, method, group, arguments, options)
