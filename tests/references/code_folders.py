"""Folders as LlamaGen's own extraction leaves them, of codes that a test knows."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def npy(folder: Path, index: int, values) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{index}.npy", np.asarray(values))


def write_codes(root: Path, codes: np.ndarray, labels, name: str = "imagenet384") -> Path:
    """Codes int ``[N, V, H, W]`` and N labels: files of int64 ``[1, V, H * W]`` and ``[1]``, as the authors have."""
    for index, (image, label) in enumerate(zip(codes, labels, strict=True)):
        npy(root / f"{name}_codes", index, image.reshape(1, len(image), -1).astype(np.int64))
        npy(root / f"{name}_labels", index, np.array([label], dtype=np.int64))
    return root


def random_codes(number: int, variants: int, side: int = 4, codebook: int = 128, seed: int = 0) -> np.ndarray:
    """int64 ``[N, V, H, W]``."""
    return np.random.default_rng(seed).integers(codebook, size=(number, variants, side, side))
