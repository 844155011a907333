"""IDX files as Yann LeCun's page describes them: two zeros, the type, the number of axes, each size, then the bytes."""

import gzip
import struct

import numpy as np

from tests.references.sources import write

CLASSES = 3


def idx(array, kind=8):
    """Return an array of bytes in IDX form."""
    header = struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def clothes(count, height=8, width=8, seed=0):
    """Return grey images of three classes whose levels are around 40, 120 and 200, and their labels."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    images = 40 + 80 * labels[:, None, None] + random.integers(-30, 31, (count, height, width))
    return images.astype(np.uint8), labels.astype(np.uint8)


def write_idx(folder, images, labels, split="train", *, packed=False):
    """Write both files of a split; return the folder."""
    for name, content in ((f"{split}-images-idx3-ubyte", idx(images)), (f"{split}-labels-idx1-ubyte", idx(labels))):
        write(folder, f"{name}.gz" if packed else name, gzip.compress(content, mtime=0) if packed else content)
    return folder
