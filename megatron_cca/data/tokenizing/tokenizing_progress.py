"""Show the progress of a tokenising job over all its processes."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from megatron_cca.data.tokenizing.parts import PartsFolder


class TokenizingProgress:
    """A progress bar of records on a terminal, or ten lines elsewhere. A context manager.

    Args:
        parts: the finished parts of all processes.
        records: how many the source has.
        shown: whether this process shows the progress.

    Attributes:
        skipped: how many records were skipped, in all parts finished at the start and by this process since then.
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

    def __enter__(self) -> TokenizingProgress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()

    def count(self, records: int, skipped: int) -> None:
        """Count some more records that this process has done."""
        self.skipped += skipped
        self._bar.update(records)

    def refresh(self) -> None:
        """Show what all processes have finished."""
        covered = self._covered()
        self._bar.n = covered
        self._bar.refresh()
        if self._prints and self._bar.disable and (covered - self._told) * 10 >= self._records:
            self._told = covered
            print(f"tokenized {covered}/{self._records} images, {self.per_second():.1f} images/s", flush=True)

    def per_second(self) -> float:
        """Return the images per second of all processes since this one began."""
        return (self._covered() - self._started_with) / (time.perf_counter() - self._began)

    def _covered(self) -> int:
        return sum(part.stop - part.start for part in self._parts.done())
