"""How far a tokenising job is, over all its processes."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from megatron_cca.data.tokenizing.parts import PartsFolder


class Progress:
    """A bar that counts records on a terminal, ten lines elsewhere; a context manager.

    Args:
        parts: where all processes leave what they have finished.
        records: of the source.
        shown: whether this process shows it.

    Attributes:
        skipped: records that gave no sample: those of all finished parts at the start, and this process's since.
    """

    def __init__(self, parts: PartsFolder, records: int, *, shown: bool) -> None:
        self._parts, self._records = parts, records
        self._began, self._started_with = time.perf_counter(), self._covered()
        self.skipped = sum(part.skipped for part in parts.done())
        self._prints = shown
        self._told = self._started_with
        self._bar = tqdm(
            total=records,
            initial=self._started_with,
            desc="tokenizing",
            unit="image",
            disable=None if shown else True,
            file=sys.stderr,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()

    def count(self, records: int, skipped: int) -> None:
        """This process has done some more records."""
        self.skipped += skipped
        self._bar.update(records)

    def refresh(self) -> None:
        """Look at what all processes have finished."""
        covered = self._covered()
        self._bar.n = covered
        self._bar.refresh()
        if self._prints and self._bar.disable and (covered - self._told) * 10 >= self._records:
            self._told = covered
            print(f"tokenized {covered}/{self._records} images, {self.per_second():.1f} images/s", flush=True)

    def per_second(self) -> float:
        """Images per second of all processes, since this one began."""
        return (self._covered() - self._started_with) / (time.perf_counter() - self._began)

    def _covered(self) -> int:
        return sum(part.stop - part.start for part in self._parts.done())
