"""The demo's image tokenizer: a k-means codebook of small patches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_cca.errors import UserError, error_context
from megatron_cca.io.numpy_files import mapped_array

FILE_NAME = "codebook.npy"


@dataclass(frozen=True)
class PatchCodebook:
    """A codebook of square patches.

    Attributes:
        centres: float32 ``[K, P, P]``, grey levels 0 to 255.
    """

    centres: np.ndarray

    @classmethod
    def fit(cls, images: np.ndarray, codebook_size: int, patch: int, seed: int = 0) -> PatchCodebook:
        """Fit ``codebook_size`` patches of ``patch`` x ``patch`` pixels to uint8 images ``[N, H, W]``."""
        from sklearn.cluster import KMeans

        patches = _patches(images, patch).reshape(-1, patch * patch).astype(np.float32)
        means = KMeans(codebook_size, n_init=1, random_state=seed).fit(patches)
        return cls(means.cluster_centers_.astype(np.float32).reshape(-1, patch, patch))

    @classmethod
    def load(cls, folder: Path) -> PatchCodebook:
        """Read the codebook of a shard folder.

        Raises:
            UserError: a damaged file, or one that holds something else; names the file.
        """
        with error_context(folder / FILE_NAME):
            try:
                found = mapped_array(folder / FILE_NAME)
            except UserError as error:
                raise UserError(f"is damaged or not a codebook: {error}") from None
            if found.dtype != np.float32:
                raise UserError("must hold one float32 array")
            if found.ndim != 3 or found.shape[1] != found.shape[2] or found.size == 0:
                raise UserError(f"must have the shape [K, P, P], has {list(found.shape)}")
            if not np.isfinite(found).all():
                raise UserError("holds numbers that are not finite")
            return cls(np.array(found))

    def save(self, folder: Path) -> None:
        """Write the codebook into a shard folder."""
        np.save(folder / FILE_NAME, self.centres)

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
        patch = self.centres.shape[-1]
        n, h, w = codes.shape
        images = self.centres[codes].transpose(0, 1, 3, 2, 4).reshape(n, h * patch, w * patch)
        return images.round().clip(0, 255).astype(np.uint8)


def _patches(images: np.ndarray, patch: int) -> np.ndarray:
    """Return the patches ``[N, H / P, W / P, P, P]`` of images ``[N, H, W]``."""
    n, height, width = images.shape
    return images.reshape(n, height // patch, patch, width // patch, patch).transpose(0, 1, 3, 2, 4)
