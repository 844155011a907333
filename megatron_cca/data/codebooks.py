"""Codebooks of grey patches, the demo's image tokenizers: one grid of codes, or a pyramid of grids.

A folder holds one of them: ``codebook.npy`` of one grid, or ``pyramid.npz``. Both are fitted by k-means. In a pyramid,
each grid takes what smaller grids leave of the image, as in VAR's image tokenizer, but nothing is convolved.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from megatron_cca.errors import UserError, error_context
from megatron_cca.io.external_files import mapped_array
from megatron_cca.io.file_contents import archived_arrays
from megatron_cca.models.architecture import Architecture
from megatron_cca.models.formats import check_codes, check_pixels
from megatron_cca.models.scale_features import NUM_CONVOLUTIONS, ScaleFeatures
from megatron_cca.models.scale_quantizer import check_pyramid_codes, check_pyramid_pixels, quantized, quantized_scale

CODEBOOK_FILE, PYRAMID_FILE = "codebook.npy", "pyramid.npz"

# ITU-R 601-2 luma in units of 1/65536, as PIL's convert("L") computes it.
_LUMA = np.array([19595, 38470, 7471], dtype=np.uint32)
_MOST_SCALES = 64
# More passes of fitting a pyramid do not help.
_PASSES = 3


def codebook_file(folder: str | Path) -> Path | None:
    """Return the file of the patch codebook in a folder, if there is one."""
    paths = [Path(folder) / name for name in (PYRAMID_FILE, CODEBOOK_FILE)]
    return next((path for path in paths if path.is_file()), None)


def keep_codebook(folder: Path, tokenizer: Path) -> None:
    """Copy the patch codebook of an image tokenizer's folder, if it has one, into a shard folder."""
    if (path := codebook_file(tokenizer)) is not None:
        shutil.copyfile(path, folder / path.name)


def open_patch_tokenizer(folder: str | Path) -> PatchImageTokenizer:
    """Open the patch codebook in a folder that has one.

    Raises:
        UserError: a damaged file, or one that holds something else; names the file.
    """
    kind = PyramidCodebook if (Path(folder) / PYRAMID_FILE).is_file() else PatchCodebook
    return PatchImageTokenizer(kind.load(Path(folder)))


def frozen_features(architecture: Architecture, folders: Iterable[Path]) -> dict[str, Tensor]:
    """Return the frozen tensors of a new model of next-scale prediction: those of the pyramid in its data's folders.

    Args:
        architecture: of the model.
        folders: of its data.

    Returns:
        Whole tensors by their keys in the model. Empty if no folder has a pyramid.

    Raises:
        UserError: a pyramid of other sizes than the model's; names the file.
    """
    for folder in folders:
        if (folder / PYRAMID_FILE).is_file():
            codebook = PyramidCodebook.load(folder)
            found = (codebook.scales, len(codebook.centres), codebook.centres[0].size)
            wanted = (architecture.scales, architecture.vocabulary.codebook_size, architecture.feature_channels)
            if found != wanted:
                raise UserError(f"{folder / PYRAMID_FILE}: {_in_words(*found)}, the model is for {_in_words(*wanted)}")
            state = codebook.features.state_dict()
            return {f"embedding.features.{name}": tensor for name, tensor in state.items()}
    return {}


def _in_words(scales: Sequence[int], codes: int, channels: int) -> str:
    return f"grids of {', '.join(map(str, scales))}, {codes} codes, {channels} pixels a patch"


@dataclass(frozen=True)
class PatchCodebook:
    """A codebook of square patches.

    Attributes:
        centres: float32 ``[K, P, P]``, grey levels 0 to 255.
    """

    centres: np.ndarray
    kind: ClassVar[str] = "patch-codebook"
    scales: ClassVar[tuple[int, ...]] = ()

    @classmethod
    def fit(cls, images: np.ndarray, codebook_size: int, patch: int, seed: int = 0) -> Self:
        """Fit ``codebook_size`` patches of ``patch`` x ``patch`` pixels to uint8 images ``[N, H, W]``."""
        return cls(_means(_patches(images, patch), codebook_size, seed))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the codebook of a shard folder.

        Raises:
            UserError: a damaged file, or one that holds something else; names the file.
        """
        with error_context(folder / CODEBOOK_FILE):
            try:
                found = mapped_array(folder / CODEBOOK_FILE)
            except UserError as error:
                raise UserError(f"is damaged or not a codebook: {error}") from None
            return cls(_checked_centres(found))

    def save(self, folder: Path) -> None:
        """Write the codebook into a shard folder."""
        np.save(folder / CODEBOOK_FILE, self.centres)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Encode images uint8 ``[N, H, W]`` to the codes of their nearest patches, int64 ``[N, H / P, W / P]``."""
        patch = self.centres.shape[-1]
        patches = _patches(images, patch).astype(np.float32)
        flat = patches.reshape(-1, patch * patch)
        centres = self.centres.reshape(len(self.centres), -1)
        distances = (centres**2).sum(1) - 2 * flat @ centres.T
        return distances.argmin(1).reshape(patches.shape[:3])

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Decode codes int ``[N, h, w]`` to images uint8 ``[N, h * P, w * P]``."""
        return _images(self.centres[codes])

    def check_pixels(self, pixels: Tensor) -> None:
        """Check images uint8 ``[N, H, W, 3]``, see :func:`check_pixels`."""
        check_pixels(pixels, self.centres.shape[-1], 0)

    def check_codes(self, codes: Tensor) -> None:
        """Check codes int64 ``[N, h, w]``, see :func:`check_codes`."""
        check_codes(codes, len(self.centres), 0)


@dataclass(frozen=True)
class PyramidCodebook:
    """A codebook of square patches, of which images of one size are sums: each grid's patches are enlarged and added.

    Attributes:
        centres: float32 ``[K, P, P]``. Grey levels 0 to 255 lie between -1 and 1.
        scales: sides of the grids, smallest first. An image has P pixels for each code of the last grid.
    """

    centres: np.ndarray
    scales: tuple[int, ...]
    kind: ClassVar[str] = "patch-pyramid"

    @classmethod
    def fit(cls, images: np.ndarray, codebook_size: int, patch: int, scales: tuple[int, ...], seed: int = 0) -> Self:
        """Fit a codebook to uint8 images ``[N, H, W]`` whose sides are the last scale's, times ``patch``.

        What smaller scales leave depends on the codebook. Each pass takes the codebook of the pass before.
        """
        maps, codebook = _maps(images, patch), None
        for _ in range(_PASSES):
            places = [one.unflatten(1, (patch, patch)).numpy() for one in _places(maps, scales, codebook)]
            codebook = cls(_means(np.concatenate(places), codebook_size, seed), scales)
        return codebook

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the codebook of a shard folder, as :meth:`PatchCodebook.load` does."""
        with error_context(folder / PYRAMID_FILE):
            found = archived_arrays(folder / PYRAMID_FILE)
            if set(found) != {"centres", "scales"}:
                raise UserError(f"must hold centres and scales, holds {', '.join(sorted(found)) or 'nothing'}")
            return cls(_checked_centres(found["centres"]), _checked_scales(found["scales"]))

    def save(self, folder: Path) -> None:
        """Write the codebook into a shard folder."""
        np.savez(folder / PYRAMID_FILE, centres=self.centres, scales=np.array(self.scales))

    @cached_property
    def features(self) -> ScaleFeatures:
        """The codebook and convolutions that copy, from which a model's inputs are made."""
        channels = self.centres[0].size
        features = ScaleFeatures(len(self.centres), channels, self.scales)
        copying = torch.zeros(NUM_CONVOLUTIONS, channels, channels, 3, 3)
        copying[:, range(channels), range(channels), 1, 1] = 1
        state = {
            "codebook": torch.from_numpy(self.centres.reshape(-1, channels)),
            "convolutions": copying,
            "convolution_biases": torch.zeros(NUM_CONVOLUTIONS, channels),
        }
        features.load_state_dict(state)
        return features

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Encode images uint8 ``[N, S, S]`` to codes int64 ``[N, 1, codes]``, scale by scale."""
        return quantized(self.features, _maps(images, self.centres.shape[-1]))[:, None].numpy()

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Decode codes int ``[N, 1, codes]`` to images uint8 ``[N, S, S]``."""
        patch = self.centres.shape[-1]
        maps = sum(self.features.added_by_scales(torch.from_numpy(codes[:, 0].astype(np.int64))))
        return _images((maps.permute(0, 2, 3, 1).unflatten(3, (patch, patch)).numpy() + 1) * 127.5)

    def check_pixels(self, pixels: Tensor) -> None:
        """Check images, see :func:`check_pyramid_pixels`."""
        check_pyramid_pixels(pixels, self.scales[-1] * self.centres.shape[-1])

    def check_codes(self, codes: Tensor) -> None:
        """Check codes int64 ``[N, 1, codes]``, see :func:`check_pyramid_codes`."""
        check_pyramid_codes(codes, len(self.centres), self.scales)


class PatchImageTokenizer:
    """A codebook of patches as an :class:`ImageTokenizer`. Colours become grey, and decoded images are grey.

    Args:
        codebook: of one grid or of a pyramid.
    """

    temporal_factor = 0

    def __init__(self, codebook: PatchCodebook | PyramidCodebook) -> None:
        self.codebook, self.kind, self.scales = codebook, codebook.kind, codebook.scales
        self.codebook_size, self.spatial_factor, _ = codebook.centres.shape
        sides = f" {self.scales}" if self.scales else ""
        digest = hashlib.sha256(f"{self.kind} {codebook.centres.shape}{sides}".encode())
        digest.update(np.ascontiguousarray(codebook.centres))
        self._fingerprint = digest.hexdigest()[:16]

    def encode(self, pixels: Tensor) -> Tensor:
        """See :class:`ImageTokenizer`."""
        self.codebook.check_pixels(pixels)
        grey = (pixels.cpu().numpy() @ _LUMA + 0x8000) >> 16
        return torch.from_numpy(self.codebook.encode(grey.astype(np.uint8))).to(pixels.device)

    def decode(self, codes: Tensor) -> Tensor:
        """See :class:`ImageTokenizer`."""
        self.codebook.check_codes(codes)
        grey = torch.from_numpy(self.codebook.decode(codes.cpu().numpy())).to(codes.device)
        return grey[..., None].repeat(1, 1, 1, 3)

    def fingerprint(self) -> str:
        """See :class:`ImageTokenizer`."""
        return self._fingerprint


def _checked_centres(found: np.ndarray) -> np.ndarray:
    if found.dtype != np.float32:
        raise UserError("must hold one float32 array")
    if found.ndim != 3 or found.shape[1] != found.shape[2] or found.size == 0:
        raise UserError(f"must have the shape [K, P, P], has {list(found.shape)}")
    if not np.isfinite(found).all():
        raise UserError("holds numbers that are not finite")
    return np.array(found)


def _checked_scales(found: np.ndarray) -> tuple[int, ...]:
    if found.dtype.kind not in "iu" or found.ndim != 1 or not 0 < len(found) <= _MOST_SCALES:
        raise UserError(f"scales must be 1 to {_MOST_SCALES} whole numbers, are {found.dtype} {list(found.shape)}")
    scales = tuple(int(side) for side in found)
    if scales[0] < 1 or any(one >= two for one, two in pairwise(scales)):
        raise UserError(f"scales must grow from 1 or more, are {', '.join(map(str, scales))}")
    return scales


def _means(patches: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Return the k-means of patches ``[..., P, P]``, float32 ``[number, P, P]``."""
    from sklearn.cluster import KMeans

    shape = patches.shape[-2:]
    flat = patches.reshape(-1, shape[0] * shape[1]).astype(np.float32)
    return KMeans(number, n_init=1, random_state=seed).fit(flat).cluster_centers_.astype(np.float32).reshape(-1, *shape)


def _places(maps: Tensor, scales: tuple[int, ...], codebook: PyramidCodebook | None) -> Iterator[Tensor]:
    """Yield what smaller scales leave at the places of each scale, ``[M, D]``. Without a codebook, it is exact."""
    rest = maps
    for number, side in enumerate(scales):
        small = ScaleFeatures.at_size(rest, side)
        yield small.permute(0, 2, 3, 1).flatten(0, 2)
        if codebook is None:
            rest = rest - interpolate(small, size=maps.shape[2:], mode="bicubic")
        else:
            rest = rest - codebook.features.added(quantized_scale(codebook.features, rest, number), number)


def _maps(images: np.ndarray, patch: int) -> Tensor:
    """Return images uint8 ``[N, H, W]`` as patches float32 ``[N, P * P, H / P, W / P]`` between -1 and 1."""
    patches = torch.from_numpy(_patches(images, patch).astype(np.float32) / 127.5 - 1)
    return patches.flatten(3).permute(0, 3, 1, 2).contiguous()


def _patches(images: np.ndarray, patch: int) -> np.ndarray:
    """Return the patches ``[N, H / P, W / P, P, P]`` of images ``[N, H, W]``."""
    n, height, width = images.shape
    return images.reshape(n, height // patch, patch, width // patch, patch).transpose(0, 1, 3, 2, 4)


def _images(patches: np.ndarray) -> np.ndarray:
    """Return the images uint8 ``[N, h * P, w * P]`` of patches ``[N, h, w, P, P]``."""
    n, height, width, patch, _ = patches.shape
    images = patches.transpose(0, 1, 3, 2, 4).reshape(n, height * patch, width * patch)
    return images.round().clip(0, 255).astype(np.uint8)
