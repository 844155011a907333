"""The time that ranks wait in a step: for communication, or for other pipeline stages.

On a GPU, the waiting time is the time of NCCL's kernels in a trace of torch.profiler, as far as no other kernel runs
meanwhile. On a CPU, it is the time of this thread in gloo's collectives and messages. All of that is exposed.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Work
from torch.profiler import ProfilerActivity, profile

from megatron_cca.errors import UserError

Interval = tuple[float, float]
# Maps a rank of the job to its pipeline stage.
StageOf = Callable[[int], int]
_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
# NCCL's kernels, and those of Transformer Engine's user buffers.
_COMMUNICATION_KERNELS = re.compile(r"nccl|userbuffers", re.IGNORECASE)
_MESSAGE = re.compile(r"sendrecv", re.IGNORECASE)
_SECONDS = 1e-6
# The methods of ProcessGroup that communicate. Each function of torch.distributed calls one of them.
_COMMUNICATION_METHODS = re.compile(r"_?(all|reduce|broadcast|gather|scatter|send|recv|barrier|monitored_barrier)")
_METHODS = [name for name in vars(dist.ProcessGroup) if _COMMUNICATION_METHODS.match(name)]


@dataclass(frozen=True)
class Span:
    """A piece of communication on one rank.

    Attributes:
        kind: the operation and its bytes; spans of one kind take the same time when no rank is late.
        crosses_stages: whether ranks of different pipeline stages take part.
        duration: seconds from start to end.
        exposed: the part of these seconds in which the rank computed nothing.
    """

    kind: str
    crosses_stages: bool
    duration: float
    exposed: float


@dataclass(frozen=True)
class Waiting:
    """The shares of a rank's time that it waited.

    Attributes:
        communication: exposed communication: waits for ranks of the same stage, and transfers between stages.
        bubble: waits for other stages, beyond the transfer itself.
    """

    communication: float
    bubble: float


def shortest(spans: Iterable[Span]) -> dict[str, float]:
    """Return the seconds of the fastest span of each kind.

    This is the time of the transfer itself: the last rank to arrive waits for no other.
    """
    return merged({span.kind: span.duration} for span in spans)


def merged(every: Iterable[dict[str, float]]) -> dict[str, float]:
    """Return the seconds of the fastest of each kind over all ranks."""
    found: dict[str, float] = {}
    for one in every:
        for kind, seconds in one.items():
            found[kind] = min(seconds, found.get(kind, seconds))
    return found


def waiting(spans: Sequence[Span], transfers: dict[str, float], seconds: float) -> Waiting:
    """Return the shares of the time that a rank waited, by cause.

    Args:
        spans: the spans of one rank.
        transfers: the result of :func:`merged` over all ranks.
        seconds: the whole duration in which the spans lie.
    """
    bubble = sum(max(0.0, one.exposed - transfers[one.kind]) for one in spans if one.crosses_stages)
    exposed = sum(one.exposed for one in spans)
    return Waiting((exposed - bubble) / seconds, bubble / seconds)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the union of intervals, as intervals that do not touch.

    They are in order of time.
    """
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def overlap(one: Interval, others: Sequence[Interval], first: int = 0) -> float:
    """Return how much of an interval lies in a :func:`union`.

    The caller knows that those before index ``first`` end before the interval.
    """
    total = 0.0
    for start, end in others[first:]:
        if start >= one[1]:
            break
        total += max(0.0, min(end, one[1]) - max(start, one[0]))
    return total


def exposed_parts(intervals: Sequence[Interval], busy: Sequence[Interval]) -> list[float]:
    """Return the exposed seconds of each interval.

    These lie outside of ``busy``, a :func:`union`, and outside of the intervals that began earlier.
    """
    order = sorted(range(len(intervals)), key=lambda index: intervals[index])
    answer, first, reached = [0.0] * len(intervals), 0, float("-inf")
    for index in order:
        start, end = intervals[index]
        # Where two streams communicate at the same time, the wait counts once.
        start = max(start, reached)
        if end <= start:
            continue
        while first < len(busy) and busy[first][1] <= start:
            first += 1
        answer[index] = end - start - overlap((start, end), busy, first)
        reached = end
    return answer


class KernelTrace:
    """The spans of :func:`traced_kernels`, available after its block."""

    def __init__(self) -> None:
        self.spans: list[Span] = []


@contextmanager
def traced_kernels(stage_of: StageOf) -> Iterator[KernelTrace]:
    """Trace the device's kernels inside the block.

    The device must finish its work before the block ends.

    Raises:
        UserError: the trace has no kernels.
    """
    trace = KernelTrace()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        yield trace
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_bytes())["traceEvents"]
    if not any(event.get("cat") == "kernel" for event in events):
        raise UserError("torch.profiler saw no kernels on this GPU: CUPTI is missing, or another profiler has it")
    trace.spans = spans_of(events, stage_of)


def spans_of(events: Sequence[dict[str, Any]], stage_of: StageOf) -> list[Span]:
    """Return the communication spans of a trace.

    Args:
        events: events of a Chrome trace, with times in microseconds.
        stage_of: returns the pipeline stage of a rank of the job.
    """
    work = [event for event in events if event.get("cat") in _WORK and "dur" in event]
    ours = [event for event in work if _COMMUNICATION_KERNELS.search(event["name"])]
    others = union(_interval(event) for event in work if not _COMMUNICATION_KERNELS.search(event["name"]))
    exposed = exposed_parts([_interval(event) for event in ours], others)
    return [
        Span(_kind(event), _crosses_stages(event, stage_of), event["dur"] * _SECONDS, seconds)
        for event, seconds in zip(ours, exposed, strict=True)
    ]


def _interval(event: dict[str, Any]) -> Interval:
    return event["ts"] * _SECONDS, (event["ts"] + event["dur"]) * _SECONDS


def _kind(event: dict[str, Any]) -> str:
    details = event.get("args", {})
    sizes = [str(details.get(name, "")) for name in ("Collective name", "In msg nelems", "Out msg nelems", "dtype")]
    return " ".join([event["name"].partition("(")[0], *sizes]).strip()


def _crosses_stages(event: dict[str, Any], stage_of: StageOf) -> bool:
    """Check whether the ranks of a kernel belong to several stages.

    PyTorch notes the ranks of most kernels. Without a note, messages count as messages between stages.
    """
    details = event.get("args", {})
    ranks = str(details.get("Process Group Ranks", ""))
    if "..." in ranks:
        # PyTorch shortens a long list of ranks, but not these values. The ranks of a stage are neighbours. The first
        # and the last rank are therefore enough.
        start, stride, size = (details.get(name) for name in ("Global rank start", "Global rank stride", "Group size"))
        ranks = "" if None in (start, stride, size) else f"{start} {start + stride * (size - 1)}"
    found = {stage_of(int(rank)) for rank in re.findall(r"\d+", ranks)}
    return len(found) > 1 if found else bool(_MESSAGE.search(event["name"]))


@dataclass
class _Call:
    kind: str
    crosses_stages: bool
    work: Any
    seconds: float


class CollectiveTimer:
    """A timer of the communication calls of the thread that created it.

    Only one timer may be active in a process.

    Args:
        stage_of: returns the pipeline stage of a rank of the job.
    """

    def __init__(self, stage_of: StageOf) -> None:
        self._stage_of = stage_of
        self._thread = threading.get_ident()
        self._calls: list[_Call] = []
        # The keys are the ids of the works. The call holds its work. No other object can get the same id.
        self._pending: dict[int, _Call] = {}
        self._is_inside = False

    @property
    def spans(self) -> list[Span]:
        """The timed calls."""
        return [Span(one.kind, one.crosses_stages, one.seconds, one.seconds) for one in self._calls]

    def call(self, name: str, method: Callable, group: dist.ProcessGroup, arguments: tuple, options: dict) -> Any:
        """Make a call and time it.

        If the call starts work, :meth:`wait` adds the time of the wait for it.
        """
        # A group of one rank waits for no other. Other threads do not block this one.
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
        """Wait for the work that a call has started, and time the wait."""
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
    """Time all communication of this thread inside the block."""
    timer = CollectiveTimer(stage_of)
    # Replaces the methods of torch 2.15's class. Megatron-Core keeps references to torch.distributed's functions. Saves
    # the entries of the class's dictionary. Attribute access would return other objects, and these would not become
    # methods again.
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
