"""Follow a record on its way to samples. The images of a comparison go the same way as single ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from megatron_cca.data.shard_writing import Sample
from megatron_cca.data.sources import Unreadable
from megatron_cca.data.sources.source_protocol import NoPair


@dataclass(frozen=True)
class Skipped:
    """A skipped record, or a skipped image of a comparison.

    ``is_fault`` is False for a record that is in order, such as a tie.
    """

    name: str
    reason: str
    is_fault: bool = True


@dataclass(frozen=True)
class Compared:
    """The images of a comparison at one stage of the way, and its pairs by their places."""

    images: tuple[Any, ...]
    pairs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PairedSamples:
    """The result of a comparison: samples, the better and the worse one of each pair by place, and skipped images."""

    samples: tuple[Sample, ...]
    pairs: tuple[tuple[int, int], ...]
    skipped: tuple[Skipped, ...]


def skipped_of(error: Unreadable) -> Skipped:
    """Return what a source says about a record that it cannot give."""
    return Skipped(error.name, error.reason.removeprefix(f"{error.name}: "), not isinstance(error, NoPair))


def spread(records: Sequence[Any]) -> list[Any]:
    """Return the images of all records, those of comparisons one by one."""
    return [one for record in records for one in (record.images if isinstance(record, Compared) else (record,))]


def gathered(records: Sequence[Any], images: Sequence[Any]) -> list[Any]:
    """Return the records with other images: the inverse of :func:`spread`."""
    left = iter(images)
    return [
        replace(record, images=tuple(islice(left, len(record.images)))) if isinstance(record, Compared) else next(left)
        for record in records
    ]


def paired(compared: Compared) -> PairedSamples:
    """Return the samples that are in a pair. A skipped image takes its pairs along."""
    whole = [not isinstance(image, Skipped) for image in compared.images]
    pairs = [(better, worse) for better, worse in compared.pairs if whole[better] and whole[worse]]
    used = sorted({place for pair in pairs for place in pair})
    numbers = {place: number for number, place in enumerate(used)}
    return PairedSamples(
        tuple(compared.images[place] for place in used),
        tuple((numbers[better], numbers[worse]) for better, worse in pairs),
        tuple(image for image in compared.images if isinstance(image, Skipped)),
    )


def all_skipped(outcomes: Sequence[Sample | Skipped | PairedSamples]) -> Iterator[Skipped]:
    """Yield the skipped records and images of outcomes."""
    for outcome in outcomes:
        if isinstance(outcome, Skipped):
            yield outcome
        elif isinstance(outcome, PairedSamples):
            yield from outcome.skipped
