"""How long ranks wait for each other in a step, and for what: collectives, or a pipeline's other stages.

On a GPU it is what NCCL's kernels take in a trace of torch.profiler and no other kernel hides; on a CPU the time that
this thread stands in gloo's collectives and messages, all of it exposed.
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
# The pipeline stage of a rank of the job.
StageOf = Callable[[int], int]


@dataclass(frozen=True)
class Span:
    """A piece of communication on one rank.

    Attributes:
        kind: what it does and how many bytes; those alike take alike long when nobody is late.
        crosses_stages: whether ranks of different pipeline stages take part.
        duration: seconds from beginning to end.
        exposed: seconds of these in which the rank computed nothing.
    """

    kind: str
    crosses_stages: bool
    duration: float
    exposed: float


@dataclass(frozen=True)
class Waiting:
    """Shares of a rank's time.

    Attributes:
        communication: exposed communication, with waiting for ranks of the same stage, and the transfers between
            stages.
        bubble: waiting for other stages, beyond what the transfer itself takes.
    """

    communication: float
    bubble: float


def shortest(spans: Iterable[Span]) -> dict[str, float]:
    """Seconds of the fastest of each kind, which is the transfer itself: whoever comes last waits for nobody."""
    return merged({span.kind: span.duration} for span in spans)


def merged(every: Iterable[dict[str, float]]) -> dict[str, float]:
    """The fastest of each kind over all ranks."""
    found: dict[str, float] = {}
    for one in every:
        for kind, seconds in one.items():
            found[kind] = min(seconds, found.get(kind, seconds))
    return found


def waiting(spans: Sequence[Span], transfers: dict[str, float], seconds: float) -> Waiting:
    """What share of the time a rank waited, and for what.

    Args:
        spans: of one rank.
        transfers: :func:`merged` over all ranks.
        seconds: of the whole time in which the spans lie.
    """
    bubble = sum(max(0.0, one.exposed - transfers[one.kind]) for one in spans if one.crosses_stages)
    exposed = sum(one.exposed for one in spans)
    return Waiting((exposed - bubble) / seconds, bubble / seconds)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points of time, as intervals that do not touch, in order."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def overlap(one: Interval, others: Sequence[Interval], first: int = 0) -> float:
    """How much of an interval lies in a :func:`union`; those before index ``first`` are known to end before it."""
    total = 0.0
    for start, end in others[first:]:
        if start >= one[1]:
            break
        total += max(0.0, min(end, one[1]) - max(start, one[0]))
    return total


def exposed_parts(intervals: Sequence[Interval], busy: Sequence[Interval]) -> list[float]:
    """Of each interval the seconds outside a :func:`union`, and outside the intervals that began before it."""
    order = sorted(range(len(intervals)), key=lambda index: intervals[index])
    answer, first, reached = [0.0] * len(intervals), 0, float("-inf")
    for index in order:
        start, end = intervals[index]
        # What two streams communicate at the same time is waited for once.
        start = max(start, reached)
        if end <= start:
            continue
        while first < len(busy) and busy[first][1] <= start:
            first += 1
        answer[index] = end - start - overlap((start, end), busy, first)
        reached = end
    return answer


_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
# NCCL's kernels, and those of Transformer Engine's user buffers.
_COMMUNICATION_KERNELS = re.compile(r"nccl|userbuffers", re.IGNORECASE)
_MESSAGE = re.compile(r"sendrecv", re.IGNORECASE)
_SECONDS = 1e-6


class KernelTrace:
    """Holds the spans once the block of :func:`traced_kernels` has ended."""

    def __init__(self) -> None:
        self.spans: list[Span] = []


@contextmanager
def traced_kernels(stage_of: StageOf) -> Iterator[KernelTrace]:
    """Trace the device's kernels inside the block; its work must be over at the block's end.

    Raises:
        UserError: there is no trace of any kernel.
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
    """The communication in a trace.

    Args:
        events: of a Chrome trace, times in microseconds.
        stage_of: the pipeline stage of a rank of the job.
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
    """From what PyTorch notes of a kernel's ranks; where it noted nothing, messages are those between stages."""
    details = event.get("args", {})
    ranks = str(details.get("Process Group Ranks", ""))
    if "..." in ranks:
        # A long list is cut short, but not these: a stage's ranks are neighbours, so that first and last tell.
        start, stride, size = (details.get(name) for name in ("Global rank start", "Global rank stride", "Group size"))
        ranks = "" if None in (start, stride, size) else f"{start} {start + stride * (size - 1)}"
    found = {stage_of(int(rank)) for rank in re.findall(r"\d+", ranks)}
    return len(found) > 1 if found else bool(_MESSAGE.search(event["name"]))


# ProcessGroup's methods that communicate; every function of torch.distributed ends in one of them.
_COMMUNICATION_METHODS = re.compile(r"_?(all|reduce|broadcast|gather|scatter|send|recv|barrier|monitored_barrier)")
_METHODS = [name for name in vars(dist.ProcessGroup) if _COMMUNICATION_METHODS.match(name)]


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
