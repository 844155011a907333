"""What a step works on: the shape of its rows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """The rows of every microbatch, all alike.

    Attributes:
        seq_length: S, the positions of a row, padding included.
        image_tokens: of those, the positions whose targets are image tokens; only they pass through the LM head.
    """

    seq_length: int
    image_tokens: int
