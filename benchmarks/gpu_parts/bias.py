"""The effect of FP8 and bf16 references on log-ratios on this device, for a small model that is trained here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import reference_bias

from megatron_cca import platform
from megatron_cca.data.shard_writing import Sample, write_shards
from megatron_cca.lab.reference_bias import BiasSettings
from megatron_cca.lab.reference_bias.measure import PairBias
from megatron_cca.lab.reference_bias.measure import measure as measure_bias
from megatron_cca.models.emu3 import TINY_CODEBOOK_SIZE, tiny_vocabulary

# Numbers of samples: for training with few tokens, for training with many, and for the measurement.
_NUMBERS = {"short": 512, "long": 64, "unseen": 32}
PHOTOGRAPHS, TEXTURES = "scikit-learn's photographs", "drawn textures"


def measure(values: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Train, then compare all precisions that this device can compute.

    Return root mean squares by length.
    """
    grids = tuple(values["short"]), tuple(values["long"])
    takes_photographs = grids == (reference_bias.SHORT, reference_bias.LONG) and find_spec("sklearn") is not None
    device = platform.device().type
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if takes_photographs:
            reference_bias.prepare(folder, device)
        else:
            _write_textures(folder, *grids)
        reference_bias.train(folder, values["short_steps"], values["long_steps"], device)
        found = measure_bias(BiasSettings(str(folder / "model"), str(folder / "unseen"), rows=values["rows"]))
    pictures = PHOTOGRAPHS if takes_photographs else TEXTURES
    return {"pictures": pictures, "rows": values["rows"], "pairs": [_plain(pair) for pair in found]}


def _plain(pair: PairBias) -> dict[str, Any]:
    return {
        "policy": str(pair.policy),
        "reference": str(pair.reference),
        "tokens": pair.tokens,
        "rms": pair.spread.root_mean_square,
        # JSON has no infinity.
        "safe_beta": pair.safe_beta if math.isfinite(pair.safe_beta) else None,
    }


def _write_textures(folder: Path, short: tuple[int, int], long: tuple[int, int]) -> None:
    """Write shards with the codes of smooth random fields.

    Neighbours are alike, as in images. The model can therefore learn something.
    """
    for seed, (name, number) in enumerate(_NUMBERS.items()):
        grid, random = short if name == "short" else long, np.random.default_rng(seed)
        write_shards(folder / name, _textures(random, grid, number), tiny_vocabulary(), _ids)


def _ids(text: str) -> list[int]:
    return [ord(letter) % 256 for letter in text]


def _textures(random: np.random.Generator, grid: tuple[int, int], number: int) -> Iterator[Sample]:
    rows, columns = (np.arange(side)[:, None] for side in grid)
    for index in range(number):
        waves = np.zeros(grid)
        for _ in range(4):
            frequencies, (phase, weight) = random.uniform(-0.4, 0.4, 2), random.uniform(0.2, 1, 2)
            waves += weight * np.sin(rows * frequencies[0] + columns.T * frequencies[1] + 6.3 * phase)
        level = (waves - waves.min()) / max(np.ptp(waves), 1e-6) + random.normal(0, 0.02, grid)
        codes = (level * TINY_CODEBOOK_SIZE).astype(np.int64).clip(0, TINY_CODEBOOK_SIZE - 1)
        text = f"a texture of kind {index % 8}"
        yield Sample(codes, np.array(_ids(text)), text)
