"""Rewards of sets of samples by the scorers that a user named."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from megatron_cca.errors import error_context
from megatron_cca.generation.decode_loop import Scorer, cut_prompts
from megatron_cca.lab.evaluation.classifiers import is_function_spec
from megatron_cca.lab.evaluation.extractors import OnProgress
from megatron_cca.lab.evaluation.image_sets import ImageSet
from megatron_cca.lab.evaluation.model_scorers import TruncatedPrompts
from megatron_cca.lab.evaluation.shares import ALONE, Share

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


def rewards_of(
    name: str, images: ImageSet, scorers: Mapping[str, Scorer], batch_size: int, share: Share = ALONE
) -> dict[str, Rewards]:
    """Return the rewards of a set by the scorers' names. They are none if the set has no prompts.

    Prompts that are cut are said on standard error, where a progress bar is, too. On other ranks than 0 they are those
    of the process's own rows.

    Raises:
        UserError: a scorer returns something else than numbers.
    """
    return (
        {}
        if images.prompts is None
        else {key: _rewards(name, key, images, one, batch_size, share) for key, one in scorers.items()}
    )


def _rewards(name: str, spec: str, images: ImageSet, scorer: Scorer, batch_size: int, share: Share) -> Rewards:
    cut = None if share.rank else cut_prompts(scorer, images.prompts)
    if cut is not None and (line := cut.line()) is not None:
        print(f"{name}: {line}", file=sys.stderr)
    with (
        error_context(f"--samples {name}"),
        tqdm(total=len(images.images), unit="image", desc=f"{heading_of(spec)} of {name}", disable=None) as bar,
    ):
        return Rewards(shared_scores(scorer, images, batch_size, share, bar.update), cut)


def shared_scores(
    scorer: Scorer, images: ImageSet, batch_size: int, share: Share, on_progress: OnProgress
) -> np.ndarray:
    """Return the scores of a set with prompts, ``[N]``, on rank 0, and those of the own rows elsewhere.

    Args:
        scorer: gives numbers for images and prompts.
        images: the set.
        batch_size: images that the scorer gets together.
        share: the process's part.
        on_progress: called with the number of images that all processes have done.
    """
    scores, count = [], len(images.images)
    for start in share.starts(count, batch_size):
        rows = slice(start, start + batch_size)
        scores.append(scorer(images.images[rows], images.prompts[rows]))
        on_progress(share.done(start, count, batch_size))
    own = np.concatenate(scores) if scores else np.zeros(0)
    return share.gathered(torch.from_numpy(own), count, batch_size).numpy()


def heading_of(spec: str) -> str:
    """Return a scorer's heading in tables: that of its kind, or the user's file and function."""
    kind = spec.partition(":")[0]
    return Path(spec).name if is_function_spec(spec) else _HEADINGS[kind]
