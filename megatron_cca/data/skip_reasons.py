"""Count the reasons why records were skipped."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

_NAMES_AND_NUMBERS = re.compile(r"\S*[\d/]\S*|\S+\.[A-Za-z]{2,5}\b")
_SHOWN = 4


class SkipReasons:
    """A counter of reasons. Reasons that differ only in names and numbers are one, of which the first is shown."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._shown: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, reason: str) -> None:
        """Count one reason."""
        kind = _NAMES_AND_NUMBERS.sub("", reason)
        self._counts[kind] += 1
        self._shown.setdefault(kind, reason)

    def line(self) -> str:
        """Return "9: it has no caption; 2 such as: a.png is missing". The most frequent reason comes first."""
        kinds = self._counts.most_common(_SHOWN)
        parts = [
            f"{count}{' such as' if kind != self._shown[kind] and count > 1 else ''}: {self._shown[kind]}"
            for kind, count in kinds
        ]
        left = sum(self._counts.values()) - sum(count for _, count in kinds)
        return "; ".join([*parts, *([f"{left} for other reasons"] if left else [])])


def read_skip_reasons(files: Iterable[Path]) -> SkipReasons:
    """Return the reasons in files of skipped records, such as a shard folder's.

    Raises:
        ValueError, KeyError, TypeError, RecursionError: a line that holds something else.
    """
    found = SkipReasons()
    for file in files:
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                found.add(str(json.loads(line)["reason"]))
    return found
