"""The images of a shard folder, decoded: real images as the image tokenizer shows them, which no model can surpass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from megatron_cca.data.inspection import image_tokenizer_of, open_for_inspection
from megatron_cca.data.manifest import FILE_NAME
from megatron_cca.errors import UserError

_BATCH = 256


def is_shard_folder(path: Path) -> bool:
    """Return whether a path is a folder of token shards."""
    return (path / FILE_NAME).is_file()


def decoded_shards(folder: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the images of all samples, uint8 ``[N, H, W, 3]``, and their classes, int64 ``[N]``, if they have some.

    Of several variants of an image, the first is taken.

    Raises:
        UserError: damaged shards, images of several sizes or clips, or an image tokenizer that is missing or another.
    """
    shards = open_for_inspection(folder)
    grids = np.unique(shards.table["grid"], axis=0)
    if len(grids) > 1 or grids[0, 0] != 1:
        raise UserError(f"{folder}: holds clips or images of several sizes; all images of a set must be of one size")
    tokenizer = image_tokenizer_of(shards, None, torch.device("cpu"))
    found = []
    for start in range(0, len(shards), _BATCH):
        codes = np.stack([shards.codes(index)[0] for index in range(start, min(start + _BATCH, len(shards)))])
        found.append(tokenizer.decode(torch.from_numpy(codes.astype(np.int64))).numpy())
    if shards.vocabulary.num_classes is None:
        return np.concatenate(found), None
    captions = [shards.caption(index) for index in range(len(shards))]
    return np.concatenate(found), np.array([caption[0] for caption in captions], dtype=np.int64)
