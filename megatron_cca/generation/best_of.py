"""Best of N: draw several candidates per prompt and keep the one with the highest score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_cca.generation.decode_loop import ImageRequest

SCORER = "--scorer"

Scorer = Callable[[np.ndarray, Sequence[str]], np.ndarray]
"""A function of images uint8 ``[N, H, W, 3]`` and their prompts that returns one score per image. Larger is better."""


def cut_prompts(scorer: Scorer | None, prompts: Sequence[str]) -> Any | None:
    """Return how many of the prompts a scorer reads in part, by its ``cut``. None for a scorer without ``cut``."""
    cut = getattr(scorer, "cut", None)
    return None if cut is None else cut(prompts)


def candidates(requests: Sequence[ImageRequest], count: int) -> list[ImageRequest]:
    """Return each request ``count`` times in a row. The first keeps its seed. The others have seeds derived from it."""
    return [
        request if turn == 0 else replace(request, seed=[request.seed, turn])
        for request in requests
        for turn in range(count)
    ]


@dataclass(frozen=True)
class BestCandidates:
    """The best candidates: int64 ``[N]`` indices into all images, and their float64 ``[N]`` scores."""

    indices: np.ndarray
    scores: np.ndarray


def best_candidates(scorer: Scorer, images: np.ndarray, prompts: Sequence[str], count: int) -> BestCandidates:
    """Return the best of every ``count`` consecutive images. Ties go to the first.

    Args:
        scorer: from :func:`open_scorer`.
        images: uint8 ``[N * count, H, W, 3]``.
        prompts: N.
        count: candidates per prompt.
    """
    scores = scorer(images, [prompt for prompt in prompts for _ in range(count)]).reshape(-1, count)
    places = scores.argmax(axis=1)
    rows = np.arange(len(prompts))
    return BestCandidates(rows * count + places, scores[rows, places].astype(np.float64))
