"""Report a run that contrasts nothing. A row without a negative only raises the likelihood of its image."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from statistics import fmean

import numpy as np

from megatron_cca.config import Config
from megatron_cca.data.token_data import TokenData
from megatron_cca.training.events import RunLog

NOTHING, LITTLE = "nothing_to_contrast", "little_to_contrast"
SHARE = "positive_as_negative"
# At this share of rows without a negative, as few rows have one as lack one at the paper's condition dropout of 0.1.
NEARLY_ALL = 0.9
# Steps to average over, as in alarms.py: one batch alone says little.
_SMOOTHED = 10
_ROWS_AT_A_TIME = 1 << 16
_LEFT_OUT = "accuracy, margin and negative log-ratio are undefined and left out"


class ContrastWatch:
    """The watch for batches in which no row, or nearly no row, has a negative. It reports each case once per process.

    Args:
        config: of a run whose objective contrasts something.
        data: the training data.
    """

    def __init__(self, config: Config, data: TokenData) -> None:
        self._config, self._data = config, data
        self._shares: deque[float] = deque(maxlen=_SMOOTHED)
        self._said: set[str] = set()

    def begin(self, log: RunLog) -> None:
        """Report, before the first step, if the data or the size of the batch leave nothing to contrast."""
        reason = self._why_nothing()
        if reason is not None:
            self._said |= {NOTHING, LITTLE}
            line = f"{reason}: nothing to contrast; {self._consequence()}; {_LEFT_OUT}"
            log.event(NOTHING, line, reason=reason)

    def after(self, step: int, row: Mapping[str, float], log: RunLog) -> None:
        """Check the metrics of a step, and report if rows have no negative.

        Args:
            step: counts from 0.
            row: its metrics. Those of a validation are called ``validation_...``.
            log: where to report.
        """
        for where, share in (("this batch", row[SHARE]), ("the validation", row.get(f"validation_{SHARE}"))):
            if share == 1.0 and self._is_new(NOTHING if where == "this batch" else where):
                line = f"nothing to contrast: no row of {where} has a negative; "
                line += f"{self._consequence()}; {_LEFT_OUT}" if where == "this batch" else _LEFT_OUT
                log.event(NOTHING, f"step {step}: {line}", step=step, reason=line)
        self._shares.append(row[SHARE])
        share = fmean(self._shares)
        if len(self._shares) == _SMOOTHED and share >= NEARLY_ALL and self._is_new(LITTLE):
            line = (
                f"{share:.1%} of the rows of the last {_SMOOTHED} steps have no negative (data.condition_dropout alone "
                f"makes it {self._config.data.condition_dropout:.0%}): {self._consequence()} in these rows; give the "
                "samples conditions that differ, lower data.condition_dropout, or raise the global batch"
            )
            log.event(LITTLE, f"step {step}: {line}", step=step, share=round(share, 4), reason=line)

    def _is_new(self, what: str) -> bool:
        is_new = what not in self._said
        self._said.add(what)
        return is_new

    def _why_nothing(self) -> str | None:
        if self._config.training.global_batch_size == 1:
            return "training.global_batch_size: 1 has no other row whose condition could be the negative"
        if has_one_condition(self._data):
            return f"data.path: all {len(self._data)} samples have the same condition"
        return None

    def _consequence(self) -> str:
        return f"{self._config.objective.name} {self._config.objective.without_contrast}"


def has_one_condition(data: TokenData) -> bool:
    """Return whether all samples have the same caption, or all have the same condition.

    The whole table is read only if they have.
    """
    return any(_is_constant(_column(data, name)) for name in ("caption", "condition"))


def _column(data: TokenData, name: str) -> Iterator[np.ndarray]:
    for shards in data.shards:
        for first in range(0, len(shards.table), _ROWS_AT_A_TIME):
            yield shards.table[first : first + _ROWS_AT_A_TIME][name]


def _is_constant(parts: Iterator[np.ndarray]) -> bool:
    values = set()
    for part in parts:
        values.add(part[0].item())
        if len(values) > 1 or (part != part[0]).any():
            return False
    return True
