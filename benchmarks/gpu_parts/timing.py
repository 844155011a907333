"""Milliseconds of repetitions, in the form that each line has."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def spread_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median, the least and the most in milliseconds."""
    return {
        "median": 1e3 * statistics.median(seconds),
        "least": 1e3 * min(seconds),
        "most": 1e3 * max(seconds),
    }
