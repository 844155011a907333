"""Small shard folders of random tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_cca.data.pairing import Pairing, training_order
from megatron_cca.data.shard_writing import Sample, write_shards
from megatron_cca.data.shards import TokenData, TokenShards
from megatron_cca.models.emu3 import tiny_vocabulary

VOCABULARY = tiny_vocabulary()


def encode_text(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def write(folder: Path, samples) -> Path:
    write_shards(folder, samples, VOCABULARY, encode_text)
    return folder


def random_samples(number: int, seed: int = 0, captions: int = 10_000, clips: bool = False) -> list[Sample]:
    """Of several grids and caption lengths; at most ``captions`` different captions."""
    random = np.random.default_rng(seed)
    shapes = [(1, *random.integers(1, 5, 2)) for _ in range(number)] if not clips else [(2, 2, 3)] * number
    texts = [random.integers(320, size=random.integers(1, 9)) for _ in range(min(captions, number))]
    return [Sample(random.integers(128, size=shape), texts[random.integers(len(texts))]) for shape in shapes]


def token_data(folder: Path, *sizes: int, weights=None, captions: int = 10_000) -> TokenData:
    """Folders of random samples, opened as one."""
    folders = [
        write(folder / f"shards{index}", random_samples(size, seed=index, captions=captions))
        for index, size in enumerate(sizes)
    ]
    return TokenData([TokenShards(path, VOCABULARY) for path in folders], weights or [1.0] * len(sizes))


def pairing(data: TokenData, **changes) -> Pairing:
    settings = {"global_batch_size": 16, "condition_dropout": 0.2, "seed": 7, "length_bucketing": 1} | changes
    return Pairing(order=training_order(data, settings["seed"], 0.0, 0), rows=data.rows, **settings)
