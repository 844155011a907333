"""The scorers that a user can name for best of N."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from megatron_cca.errors import UserError, error_context
from megatron_cca.generation.best_of import SCORER, Scorer
from megatron_cca.io.typed_paths import typed_path
from megatron_cca.lab.evaluation.clip import CLIP, ClipScorer, check_clip
from megatron_cca.lab.evaluation.plugins import is_function_spec, load_function

_CLIP_PREFIX = "clip:"


def check_scorer(spec: str) -> None:
    """Refuse a scorer that cannot be opened, without opening it.

    It raises the same errors as :func:`open_scorer`.
    """
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
    """Open the scorer that a user named.

    Args:
        spec: ``clip:FOLDER`` for the CLIP score of a CLIP in a local folder, or ``FILE.py:FUNCTION`` for a user's
            function. It takes images uint8 ``[N, H, W, 3]`` and a list of N prompts. It returns N numbers.
        device: the device of CLIP.

    Raises:
        UserError: another form, or no such file, folder or function.
    """
    check_scorer(spec)
    if spec.startswith(_CLIP_PREFIX):
        return ClipScorer(_clip_folder(spec), device)
    function = load_function(spec, SCORER)
    return lambda images, prompts: _checked(function(images, list(prompts)), len(images), spec)


def _clip_folder(spec: str) -> Path:
    with error_context(SCORER):
        return Path(typed_path(spec.removeprefix(_CLIP_PREFIX)))


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
