"""Where a step's time goes when ranks wait for each other: arithmetic on intervals, nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Interval = tuple[float, float]


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
