"""Best of N: draw several candidates for each prompt and keep the one that a scorer likes best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from megatron_cca.errors import UserError, said_of
from megatron_cca.evaluation.clip import CLIP, ClipScorer, Cut, check_clip
from megatron_cca.evaluation.plugins import is_function_spec, load_function
from megatron_cca.generation.sampler import ImageRequest
from megatron_cca.paths import typed_path

SCORER = "--scorer"
_CLIP_PREFIX = "clip:"

Scorer = Callable[[np.ndarray, Sequence[str]], np.ndarray]
"""Images uint8 ``[N, H, W, 3]`` and their prompts -> one number each, larger is better."""


def check_scorer(spec: str) -> None:
    """Refuse a scorer that cannot be opened, without opening it; raises as :func:`open_scorer` does."""
    if spec.startswith(_CLIP_PREFIX):
        try:
            check_clip(_clip_folder(spec))
        except UserError as error:
            raise UserError(str(error).replace(CLIP, SCORER, 1)) from None
    elif is_function_spec(spec):
        load_function(spec, SCORER)
    else:
        raise UserError(f"{SCORER}: {spec!r} is neither clip:FOLDER nor FILE.py:FUNCTION")


def open_scorer(spec: str, device: str | torch.device) -> Scorer:
    """The scorer that a user named.

    Args:
        spec: ``clip:FOLDER`` for the CLIP score by a CLIP in a local folder, or ``FILE.py:FUNCTION`` for a function of
            one's own with images uint8 ``[N, H, W, 3]`` and a list of N prompts, which returns N numbers.
        device: where CLIP runs.

    Raises:
        UserError: anything else, no such file, folder or function.
    """
    check_scorer(spec)
    if spec.startswith(_CLIP_PREFIX):
        return ClipScorer(_clip_folder(spec), device)
    function = load_function(spec, SCORER)
    return lambda images, prompts: _checked(function(images, list(prompts)), len(images), spec)


def _clip_folder(spec: str) -> Path:
    with said_of(SCORER):
        return Path(typed_path(spec.removeprefix(_CLIP_PREFIX)))


def cut_prompts(scorer: Scorer | None, prompts: Sequence[str]) -> Cut | None:
    """How many of the prompts a scorer reads in part; None where that is not known."""
    return scorer.cut(prompts) if isinstance(scorer, ClipScorer) else None


def candidates(requests: Sequence[ImageRequest], count: int) -> list[ImageRequest]:
    """Each request ``count`` times in a row: first with its own seed, then with seeds that follow from it."""
    return [
        request if turn == 0 else replace(request, seed=[request.seed, turn])
        for request in requests
        for turn in range(count)
    ]


@dataclass(frozen=True)
class Choice:
    """The best candidates: int64 ``[N]`` indices into all that were drawn, and their float64 ``[N]`` scores."""

    indices: np.ndarray
    scores: np.ndarray


def best(scorer: Scorer, images: np.ndarray, prompts: Sequence[str], count: int) -> Choice:
    """Of every ``count`` images in a row the one with the highest score; the first of equals.

    Args:
        scorer: from :func:`open_scorer`.
        images: uint8 ``[N * count, H, W, 3]``.
        prompts: N.
        count: candidates of a prompt.
    """
    scores = scorer(images, [prompt for prompt in prompts for _ in range(count)]).reshape(-1, count)
    places = scores.argmax(axis=1)
    rows = np.arange(len(prompts))
    return Choice(rows * count + places, scores[rows, places].astype(np.float64))


def _checked(found: object, count: int, spec: str) -> np.ndarray:
    try:
        scores = np.asarray(found, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):  # torch's for a tensor with a gradient
        raise UserError(f"{SCORER}: {spec} must return numbers, found a {type(found).__name__}") from None
    wanted = f"{SCORER}: {spec} must return {count} finite numbers for as many images"
    if scores.shape != (count,):
        raise UserError(f"{wanted}, found {list(scores.shape)}")
    if not np.isfinite(scores).all():
        raise UserError(f"{wanted}, found {scores[~np.isfinite(scores)][0]} among them")
    return scores
