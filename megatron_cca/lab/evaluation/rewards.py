"""Rewards of sets of samples by the scorers that a user named."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_cca.errors import error_context
from megatron_cca.generation.decode_loop import Scorer, cut_prompts
from megatron_cca.lab.evaluation.classifiers import is_function_spec
from megatron_cca.lab.evaluation.image_sets import ImageSet
from megatron_cca.lab.evaluation.model_scorers import TruncatedPrompts

_HEADINGS = {"clip": "CLIP score", "pickscore": "PickScore", "hpsv2": "HPSv2", "imagereward": "ImageReward"}


@dataclass(frozen=True)
class Rewards:
    """The rewards of a set by one scorer.

    Attributes:
        scores: float ``[N]``.
        cut: the number of prompts that the scorer reads only in part, if it says so.
    """

    scores: np.ndarray
    cut: TruncatedPrompts | None

    @property
    def mean(self) -> float:
        """Mean of the scores."""
        return float(self.scores.mean(dtype=np.float64))

    def cut_line(self) -> str | None:
        """Return a line for the user; None if no prompt is cut."""
        return None if self.cut is None else self.cut.line()

    def as_json(self) -> dict:
        """Return mean, deviation and the prompts that were cut as plain data."""
        found = {"mean": self.mean, "std": float(self.scores.std(dtype=np.float64))}
        if self.cut is not None:
            found |= {"prompts_cut": self.cut.prompts, "tokens": self.cut.tokens}
        return found


def rewards_of(name: str, images: ImageSet, scorers: Mapping[str, Scorer], batch_size: int) -> dict[str, Rewards]:
    """Return the rewards of a set by the scorers' names. They are none if the set has no prompts.

    Prompts that are cut are said on standard error, where a progress bar is, too.

    Raises:
        UserError: a scorer returns something else than numbers.
    """
    return (
        {}
        if images.prompts is None
        else {key: _rewards(name, key, images, one, batch_size) for key, one in scorers.items()}
    )


def _rewards(name: str, spec: str, images: ImageSet, scorer: Scorer, batch_size: int) -> Rewards:
    cut, scores = cut_prompts(scorer, images.prompts), []
    if cut is not None and (line := cut.line()) is not None:
        print(f"{name}: {line}", file=sys.stderr)
    count = len(images.images)
    with (
        error_context(f"--samples {name}"),
        tqdm(total=count, unit="image", desc=f"{heading_of(spec)} of {name}", disable=None) as bar,
    ):
        for start in range(0, count, batch_size):
            rows = slice(start, start + batch_size)
            scores.append(scorer(images.images[rows], images.prompts[rows]))
            bar.update(len(scores[-1]))
    return Rewards(np.concatenate(scores), cut)


def heading_of(spec: str) -> str:
    """Return a scorer's heading in tables: that of its kind, or the user's file and function."""
    kind = spec.partition(":")[0]
    return Path(spec).name if is_function_spec(spec) else _HEADINGS[kind]
