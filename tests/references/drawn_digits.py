"""Digits that are drawn, for machines without scikit-learn and its real ones: the same sizes, words and files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from megatron_cca.data import digits
from megatron_cca.data.codebooks import PatchCodebook, patches_of
from megatron_cca.models.image_vocabulary import ImageVocabulary

_TRAINING = 1437


def shards_of_digits(vocabulary: ImageVocabulary, folder: Path) -> Path:
    """Tokenise the real digits into ``folder`` where scikit-learn is installed, drawn ones elsewhere."""
    if importlib.util.find_spec("sklearn"):
        return digits.ensure_digit_shards(vocabulary, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "load_scans", drawn_scans)
        patch.setattr(PatchCodebook, "fit", chosen_patches)
        return digits.ensure_digit_shards(vocabulary, folder)


def drawn_scans() -> tuple[digits.Scans, digits.Scans]:
    """Ten fixed patterns of 8 x 8 pixels under noise; training split and held-out split, always the same."""
    random = np.random.default_rng(0)
    patterns = random.choice([0.0, 255.0], size=(10, 8, 8), p=[0.6, 0.4])
    labels = random.integers(10, size=_TRAINING + digits.HELD_OUT)
    noisy = patterns[labels] + random.normal(0.0, 30.0, (len(labels), 8, 8))
    images = noisy.round().clip(0, 255).astype(np.uint8)
    return digits.Scans(images[:_TRAINING], labels[:_TRAINING]), digits.Scans(images[_TRAINING:], labels[_TRAINING:])


def chosen_patches(images: np.ndarray, codebook_size: int, patch: int) -> PatchCodebook:
    """Return a codebook of patches of the images themselves, no two of them alike."""
    patches = np.unique(patches_of(images, patch).reshape(-1, patch, patch), axis=0)
    chosen = np.random.default_rng(0).choice(len(patches), codebook_size, replace=False)
    return PatchCodebook(patches[chosen].astype(np.float32))
