"""The folder beside a shard folder that holds finished parts until they are merged, and the progress that it shows.

Many processes write parts, each of its own records: images to tokenise, or to draw.

OUTPUT.parts/job.json               the description of the job; another job is refused
OUTPUT.parts/000000-001024/         token files of these records, notes on them and part.json; appears when it is whole
OUTPUT.parts/rank0/                 the part that process 0 is writing; locked while the process lives
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from tqdm import tqdm

from megatron_cca.data.manifest import Json
from megatron_cca.data.outcomes import PairedSamples, Skipped, all_skipped
from megatron_cca.data.partners import PAIRS
from megatron_cca.data.shard_writing import Sample, TokenWriter
from megatron_cca.errors import UserError
from megatron_cca.io.file_contents import json_object
from megatron_cca.io.outputs import OPTION
from megatron_cca.models.image_vocabulary import ImageVocabulary

SKIPPED, _JOB, _PART = "skipped.jsonl", "job.json", "part.json"
_WAIT_SECONDS = 120.0
Span = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """A finished part: its folder and its records ``start`` to ``stop - 1``.

    Attributes:
        samples: how many it holds.
        skipped: how many records, and images of comparisons, were skipped.
        without_pair: how many of these are in order, such as ties.
        pairs: how many pairs of samples it names.
    """

    folder: Path
    start: int
    stop: int
    samples: int
    skipped: int
    without_pair: int = 0
    pairs: int = 0

    @property
    def faults(self) -> int:
        """The number of records or images that could not be used."""
        return self.skipped - self.without_pair


class PartsFolder:
    """The parts of one output.

    Args:
        output: the shard folder to write in the end.
        records: how many there are.
        block: how many records a process works on at a time.
        option: the option that named the output, for messages.
    """

    def __init__(self, output: Path, records: int, block: int, option: str = OPTION) -> None:
        self.folder = output.with_name(f"{output.name}.parts")
        self._output, self._option = output, option
        self._records, self._block = records, block
        self._read: dict[str, Part] = {}

    def begin(self, job: Json, *, leads: bool) -> None:
        """Check that former attempts and other processes work on the same job.

        Args:
            job: its description, plain data.
            leads: whether this process writes the description. The others wait for it.

        Raises:
            UserError: the existing parts belong to another job; names what differs.
        """
        path = self.folder / _JOB
        if leads and not path.exists():
            aside = path.with_suffix(".new")
            aside.write_text(json.dumps(job, indent=1))
            aside.rename(path)
        waited_until = time.monotonic() + _WAIT_SECONDS
        while not path.exists():
            if time.monotonic() > waited_until or self._output.exists():
                raise UserError(
                    f"{self._option}: {path} does not appear; is process 0 of this job on the same file system?"
                )
            time.sleep(0.1)
        self.check(job)

    def check(self, job: Json) -> None:
        """Refuse the parts of another job, if there are some already. Raises as :meth:`begin` does."""
        path = self.folder / _JOB
        theirs = json_object(path) if path.exists() else job
        # Keys of either, since a default choice is not written.
        for key in {**job, **theirs}:
            if theirs.get(key) != job.get(key):
                values = [repr(facts[key]) if key in facts else "none" for facts in (theirs, job)]
                raise UserError(
                    f"{self._option}: {self.folder} was begun with {key} {values[0]}, not {values[1]}; go on as it was "
                    "begun, or remove that folder"
                )

    @contextmanager
    def begun(self, job: Json, *, leads: bool) -> Iterator[None]:
        """Call :meth:`begin`. An error in the block before any part is finished leaves nothing behind."""
        self.begin(job, leads=leads)
        try:
            yield
        except BaseException:
            if leads and not self.done():
                (self.folder / _JOB).unlink(missing_ok=True)
            raise

    def done(self) -> list[Part]:
        """Return the finished parts, in order."""
        for path in self.folder.glob(f"*-*/{_PART}"):
            if path.parent.name not in self._read:
                self._read[path.parent.name] = _read_part(path)
        return sorted(self._read.values(), key=lambda part: part.start)

    def todo(self, rank: int, world_size: int) -> Iterator[Span]:
        """Yield the spans of records that a process has to do: the rest of every ``world_size``-th block."""
        done = self.done()
        for block in range(rank, -(-self._records // self._block), world_size):
            position, end = block * self._block, min((block + 1) * self._block, self._records)
            for part in done:
                if position <= part.start < end:
                    if position < part.start:
                        yield position, part.start
                    position = part.stop
            if position < end:
                yield position, end

    def is_complete(self) -> bool:
        """Return whether every record is in a part.

        Raises:
            UserError: parts overlap; names one.
        """
        position = 0
        for part in self.done():
            if part.start < position:
                raise UserError(
                    f"{self._option}: {part.folder} repeats records of another part; remove it and start again"
                )
            if part.start > position:
                return False
            position = part.stop
        return position == self._records

    def scratch(self, rank: int) -> Path:
        """Return the folder that a process writes in."""
        return self.folder / f"rank{rank}"


class PartWriter:
    """A writer that writes one part aside and names it when it is whole. A context manager.

    When the block is interrupted (:class:`KeyboardInterrupt`), the records so far become a shorter part. Any other
    error leaves nothing.

    Args:
        parts: where the part belongs.
        rank: of this process.
        start: the first record.
        vocabulary: what the tokens mean.
        notes: the name of the part's file of notes, JSON lines.
    """

    def __init__(
        self, parts: PartsFolder, rank: int, start: int, vocabulary: ImageVocabulary, notes: str = SKIPPED
    ) -> None:
        self._parts, self._start = parts, start
        self._partial = parts.scratch(rank) / "part"
        self._stop = start
        self._counts = {"samples": 0, "skipped": 0, "without_pair": 0}
        self._pairs: list[tuple[int, int]] = []
        # False before the first records, and while records are added: an interruption may come between the files.
        self._is_whole = False
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir()
        self._tokens = TokenWriter(self._partial, vocabulary)
        self._notes = (self._partial / notes).open("w", encoding="utf-8")

    def add(self, outcomes: Sequence[Sample | Skipped | PairedSamples], notes: Iterable[Json] = ()) -> None:
        """Add the outcomes of the next records, in order, and notes on them. A skipped record is a note by itself."""
        self._is_whole = False
        for note in notes:
            self._note(note)
        for outcome in outcomes:
            for skipped in all_skipped([outcome]):
                self._skip(skipped)
            if isinstance(outcome, PairedSamples):
                start = self._counts["samples"]
                self._pairs += [(start + better, start + worse) for better, worse in outcome.pairs]
                self._write(outcome.samples)
            elif isinstance(outcome, Sample):
                self._write([outcome])
            self._stop += 1
        self._is_whole = True

    def _skip(self, skipped: Skipped) -> None:
        line = {"record": self._stop, "name": skipped.name, "reason": skipped.reason}
        self._note(line)
        self._counts["skipped"] += 1
        self._counts["without_pair"] += not skipped.is_fault

    def _write(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            self._tokens.add(sample)
        self._counts["samples"] += len(samples)

    def _note(self, note: Json) -> None:
        self._notes.write(json.dumps(note, ensure_ascii=False) + "\n")

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        keeps = self._is_whole and (error is None or isinstance(error, KeyboardInterrupt))
        try:
            with self._notes:
                self._tokens.__exit__(None if keeps else kind, None if keeps else error, trace)
            if keeps:
                self._finish()
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _finish(self) -> None:
        if self._pairs:
            np.save(self._partial / PAIRS, np.array(self._pairs, dtype=np.int64))
        facts = {"start": self._start, "stop": self._stop, **self._counts, "pairs": len(self._pairs)}
        (self._partial / _PART).write_text(json.dumps(facts))
        self._partial.rename(self._parts.folder / f"{self._start:09d}-{self._stop:09d}")


class PartsProgress:
    """A progress bar of records on a terminal, or ten lines elsewhere. A context manager.

    Args:
        parts: the finished parts of all processes.
        records: how many there are.
        shown: whether this process shows the progress.
        doing, done: what happens to a record, and what has happened to it.

    Attributes:
        faults: how many records or images could not be used, in all parts finished at the start and by this process
            since then.
    """

    def __init__(
        self, parts: PartsFolder, records: int, *, shown: bool, doing: str = "tokenizing", done: str = "tokenized"
    ) -> None:
        self._parts, self._records, self._done = parts, records, done
        self._began, self._started_with = time.perf_counter(), self._covered()
        self.faults = sum(part.faults for part in parts.done())
        self._prints = shown
        self._told = self._started_with
        self._bar = tqdm(
            total=records,
            initial=self._started_with,
            desc=doing,
            unit="image",
            disable=None if shown else True,
            file=sys.stderr,
            dynamic_ncols=True,
        )

    def __enter__(self) -> PartsProgress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()

    def count(self, records: int, faults: int) -> None:
        """Count some more records that this process has done."""
        self.faults += faults
        self._bar.update(records)

    def refresh(self) -> None:
        """Show what all processes have finished."""
        covered = self._covered()
        self._bar.n = covered
        self._bar.refresh()
        if self._prints and self._bar.disable and (covered - self._told) * 10 >= self._records:
            self._told = covered
            print(f"{self._done} {covered}/{self._records} images, {self.per_second():.1f} images/s", flush=True)

    def per_second(self) -> float:
        """Return the images per second of all processes since this one began."""
        return (self._covered() - self._started_with) / (time.perf_counter() - self._began)

    def _covered(self) -> int:
        return sum(part.stop - part.start for part in self._parts.done())


def join_notes(folder: Path, parts: Iterable[Part], name: str) -> None:
    """Write the notes of all parts, in their order, into one file of ``folder``."""
    with (folder / name).open("wb") as file:
        for part in parts:
            file.write((part.folder / name).read_bytes())


def _read_part(path: Path) -> Part:
    # Parts of earlier versions know no pairs.
    facts = {"without_pair": 0, "pairs": 0, **json_object(path)}
    names = ("start", "stop", "samples", "skipped", "without_pair", "pairs")
    if facts.keys() != set(names) or not all(type(facts[name]) is int for name in names):
        raise UserError(f"{path} is damaged; remove the folder that it lies in")
    return Part(path.parent, **facts)
