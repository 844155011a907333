"""Read MNIST's IDX files: all images of a split in one file, all labels in another, each packed by gzip or not.

NAME-images-idx3-ubyte      numbers of images, rows and columns, then a byte for each pixel
NAME-labels-idx1-ubyte      the number of labels, then a byte for each

NAME is train or t10k, in EMNIST emnist-letters-train and its like. Fashion-MNIST is known by its labels, and its
classes have names. Those of others are numbers, unless ``classes.json`` beside the files names them: {"0": "zero"}.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import re
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np

from megatron_cca.data.sources.classes import NAMES, parsed_names
from megatron_cca.data.sources.external_text import printable
from megatron_cca.data.sources.folders import (
    MAX_TEXT_BYTES,
    Root,
    UnreadFiles,
    checked_file,
    is_file,
    is_folder,
    names_in,
    read_below,
    real_folder,
)
from megatron_cca.data.sources.source_protocol import Record, Source, SourceOptions, Unreadable, checked_index
from megatron_cca.errors import UserError, error_context

_FILE = re.compile(r"(.+)-(images[-.]idx3|labels[-.]idx1)-ubyte(\.gz)?")
_IMAGES, _LABELS = "images", "labels"
_GZIP, _GZIP_IN_WORDS = b"\x1f\x8b", "compressed (gzip)"
# Of all images of a packed file, which are kept in memory. EMNIST's largest file has 547 MB.
_MOST_BYTES = 1 << 31
# deflate packs 1,032 bytes into one at most.
_BEST_PACKING = 1032
_SAME = {"test": "t10k", "t10k": "test"}
_EMNIST = "emnist-"
_FASHION = {
    "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_CLOTHES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def recognises(path: Path, options: SourceOptions) -> bool:
    """Return whether a folder holds the images and the labels of a split."""
    return is_folder(path) and bool(_splits(path))


def open_idx(path: Path, options: SourceOptions) -> Source:
    """Open the source in a folder.

    Raises:
        UserError: no such files, a split that is not there, a file that is damaged, cut or longer than it says, unequal
            numbers of images and labels, or names of other classes; names the file.
    """
    splits = _splits(path) if is_folder(path) else {}
    if not splits:
        raise UserError(
            f"{printable(str(path))} holds no NAME-images-idx3-ubyte beside NAME-labels-idx1-ubyte, packed by gzip or "
            "not; give the folder that holds them"
        )
    return IdxFiles(real_folder(path, options.allow_outside), splits, _chosen(splits, options.split))


def split_of_file(path: Path) -> str | None:
    """Return the split whose images a file holds. None where it has another name."""
    match = _FILE.fullmatch(path.name)
    return match[1] if match and match[2].startswith(_IMAGES) else None


class IdxFiles:
    """Grey images and their labels, named "train:17" (counted from 0). Each image is given as a PNG.

    Attributes:
        images: uint8 ``[N, H, W]``.
        labels: uint8 ``[N]``.
        num_classes: one more than the largest label.

    Raises:
        UserError: as :func:`open_idx` says.
    """

    def __init__(self, root: Root, splits: dict[str, dict[str, str]], split: str) -> None:
        self._root, self._split, self._files = root, split, splits[split]
        self._others = [name for name in splits if name != split]
        images, labels = (_array(root, self._files[kind], axes) for kind, axes in ((_IMAGES, 3), (_LABELS, 1)))
        if len(images) != len(labels):
            counts = f"{len(images)} images, {printable(self._files[_LABELS])} {len(labels)} labels"
            raise UserError(f"{printable(str(root / self._files[_IMAGES]))} holds {counts}; get both again")
        # EMNIST's authors wrote the columns of each image as its rows.
        self.images = images.swapaxes(1, 2) if split.startswith(_EMNIST) else images
        self.labels, self.num_classes = labels, int(labels.max()) + 1
        self._names = self._class_names()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Record:
        from PIL import Image

        index = checked_index(index, len(self))
        file, label = BytesIO(), int(self.labels[index])
        Image.fromarray(np.ascontiguousarray(self.images[index])).save(file, "PNG", compress_level=1)
        name = self._names.get(label, str(label))
        return Record(f"{printable(self._split)}:{index}", name, name, (file.getvalue(),), label=label)

    def fingerprint(self) -> str:
        """See :class:`Source`."""
        digest = hashlib.sha256(repr((self._split, self.images.shape, sorted(self._names.items()))).encode())
        digest.update(self.labels.tobytes())
        digest.update(np.ascontiguousarray(self.images).data)
        return digest.hexdigest()[:16]

    def notices(self) -> list[str]:
        """See :class:`Source`."""
        lines = [f"split {printable(self._split)} is read; others there: {', '.join(map(printable, self._others))}"]
        nameless = [str(label) for label in np.unique(self.labels).tolist() if label not in self._names]
        if self._names and nameless:
            lines.append(f"{len(nameless)} classes have no name in {NAMES} and keep their number ({nameless[0]})")
        unread = UnreadFiles()
        for name in names_in(self._root.path):
            if name != NAMES and not _FILE.fullmatch(name):
                unread.add(f"{name}/" if is_folder(self._root / name) else name)
        line = unread.line()
        return [*(lines if self._others else lines[1:]), *([line] if line else [])]

    def _class_names(self) -> dict[int, str]:
        """Return the names of classes by label."""
        if not is_file(self._root / NAMES):
            content = _header(1, self.labels.shape) + self.labels.tobytes()
            return dict(enumerate(_CLOTHES)) if hashlib.sha256(content).hexdigest() in _FASHION else {}
        with error_context(printable(str(self._root))):
            checked_file(self._root, NAMES)
            try:
                found = parsed_names(read_below(self._root, NAMES, NAMES, MAX_TEXT_BYTES))
            except Unreadable as error:
                raise UserError(f"{error.reason}; correct {NAMES} or remove it") from None
            labels = {str(label) for label in np.unique(self.labels).tolist()}
            if other := next((name for name in found if name not in labels), None):
                raise UserError(f"{NAMES} names {printable(other)!r}, which is no label here; correct it or remove it")
            return {int(label): name.strip() for label, name in found.items()}


def _splits(path: Path) -> dict[str, dict[str, str]]:
    """Return the files of each split that has both, by kind. Of one that is there twice, the unpacked file counts."""
    found: dict[str, dict[str, str]] = {}
    for name in reversed(names_in(path)):
        if (match := _FILE.fullmatch(name)) and is_file(path / name):
            found.setdefault(match[1], {})[match[2][:6]] = name
    return {split: files for split, files in sorted(found.items()) if len(files) == 2}


def _chosen(splits: dict[str, dict[str, str]], wanted: str | None) -> str:
    ends = {wanted or "train", _SAME.get(wanted or "train", wanted or "train")}
    found = [name for name in splits if name in ends] or [
        name for name in splits if name.endswith(tuple(f"-{end}" for end in ends))
    ]
    if len(found) == 1:
        return found[0]
    known = ", ".join(map(printable, found or splits))
    what = "could be several" if found else "is none of those that are there"
    raise UserError(f"split: {printable(wanted or 'train')} {what}; choose one: {known}")


def _header(axes: int, shape: tuple[int, ...]) -> bytes:
    return bytes([0, 0, 8, axes]) + b"".join(size.to_bytes(4) for size in shape)


def _array(root: Root, name: str, axes: int) -> np.ndarray:
    """Return what a file holds, uint8 with so many axes, memory-mapped where it is not packed."""
    path = checked_file(root, name, (_GZIP_IN_WORDS,))
    with error_context(printable(str(root / name))):
        with path.open("rb") as file:
            is_packed = file.read(len(_GZIP)) == _GZIP
        try:
            found = _unpacked(path, axes) if is_packed else _mapped(path, axes)
        except EOFError:
            raise UserError("is cut short; get it again") from None
        except (OSError, zlib.error) as error:
            raise UserError(f"is damaged ({getattr(error, 'strerror', None) or error}); get it again") from None
        if not found.size:
            raise UserError(f"is empty: {' x '.join(map(str, found.shape))}; get it again")
        return found


def _unpacked(path: Path, axes: int) -> np.ndarray:
    with gzip.open(path) as file:
        shape, size = _shape(file.read(4 + 4 * axes), axes)
        if size > _BEST_PACKING * path.stat().st_size:
            raise UserError(f"says that it holds {size} bytes, which so short a file cannot; get it again")
        if size > _MOST_BYTES:
            raise UserError(
                f"holds {size} bytes, more than the {_MOST_BYTES} that are read packed; unpack it by gunzip"
            )
        content = file.read(size)
        if len(content) < size:
            raise UserError(f"holds {len(content)} of the {size} bytes that it says; get it again")
        # The end of the stream, where its checksum is compared.
        if file.read(1):
            raise UserError(f"holds more than the {size} bytes that it says; get it again")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _mapped(path: Path, axes: int) -> np.ndarray:
    start = 4 + 4 * axes
    with path.open("rb") as file:
        shape, size = _shape(file.read(start), axes)
        length = os.fstat(file.fileno()).st_size - start
    if length != size:
        raise UserError(f"holds {length} bytes, its header says {size}; get it again")
    return np.memmap(path, np.uint8, "r", start, shape) if size else np.empty(shape, np.uint8)


def _shape(header: bytes, axes: int) -> tuple[tuple[int, ...], int]:
    if len(header) < 4 + 4 * axes:
        raise EOFError
    if header[:4] != _header(axes, ()):
        raise UserError(f"does not begin as an IDX file of bytes with {axes} axes does; get it again")
    shape = tuple(int.from_bytes(header[place : place + 4]) for place in range(4, len(header), 4))
    return shape, math.prod(shape)
