"""Open image tokenizers. The names of files decide which one a path holds. The demo's own is a codebook of patches."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_cca.errors import UserError, error_context
from megatron_cca.io.external_files import mapped_array
from megatron_cca.models import FAMILIES
from megatron_cca.models.formats import ImageTokenizer, check_codes, check_pixels

CODEBOOK_FILE = "codebook.npy"


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
        with error_context(folder / CODEBOOK_FILE):
            try:
                found = mapped_array(folder / CODEBOOK_FILE)
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
        patch = self.centres.shape[-1]
        n, h, w = codes.shape
        images = self.centres[codes].transpose(0, 1, 3, 2, 4).reshape(n, h * patch, w * patch)
        return images.round().clip(0, 255).astype(np.uint8)


def _patches(images: np.ndarray, patch: int) -> np.ndarray:
    """Return the patches ``[N, H / P, W / P, P, P]`` of images ``[N, H, W]``."""
    n, height, width = images.shape
    return images.reshape(n, height // patch, patch, width // patch, patch).transpose(0, 1, 3, 2, 4)


# ITU-R 601-2 luma in units of 1/65536, as PIL's convert("L") computes it.
_LUMA = np.array([19595, 38470, 7471], dtype=np.uint32)


class PatchImageTokenizer:
    """A :class:`PatchCodebook` as an :class:`ImageTokenizer`. Colours become grey, and decoded images are grey.

    Args:
        codebook: with centres float32 ``[K, P, P]``.
    """

    kind = "patch-codebook"
    temporal_factor = 0

    def __init__(self, codebook: PatchCodebook) -> None:
        self._codebook = codebook
        self.codebook_size, self.spatial_factor, _ = codebook.centres.shape
        digest = hashlib.sha256(f"{self.kind} {codebook.centres.shape}".encode())
        digest.update(np.ascontiguousarray(codebook.centres))
        self._fingerprint = digest.hexdigest()[:16]

    def encode(self, pixels: Tensor) -> Tensor:
        """See :class:`ImageTokenizer`."""
        check_pixels(pixels, self.spatial_factor, self.temporal_factor)
        grey = (pixels.cpu().numpy() @ _LUMA + 0x8000) >> 16
        return torch.from_numpy(self._codebook.encode(grey.astype(np.uint8))).to(pixels.device)

    def decode(self, codes: Tensor) -> Tensor:
        """See :class:`ImageTokenizer`."""
        check_codes(codes, self.codebook_size, self.temporal_factor)
        grey = torch.from_numpy(self._codebook.decode(codes.cpu().numpy())).to(codes.device)
        return grey[..., None].repeat(1, 1, 1, 3)

    def fingerprint(self) -> str:
        """See :class:`ImageTokenizer`."""
        return self._fingerprint


def open_image_tokenizer(path: str | Path, device: str | torch.device = "cpu") -> ImageTokenizer:
    """Open the image tokenizer in a folder or file: the demo's ``codebook.npy``, or that of a model family.

    Args:
        path: on disk. Nothing is downloaded.
        device: where a family's model runs. A patch codebook always runs on the CPU.

    Raises:
        UserError: nothing there, no tokenizer in it, or a damaged one; names the file.
    """
    path = Path(path)
    families = [family.image_tokenizer for family in FAMILIES.values() if family.image_tokenizer is not None]
    try:
        if not path.exists():
            raise UserError(f"no file or folder at {path}; nothing is fetched from a hub here, download it first")
        if (path / CODEBOOK_FILE).is_file():
            return PatchImageTokenizer(PatchCodebook.load(path))
        for files in families:
            if files.recognises(path):
                return files.open(path, device)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    described = " nor ".join([CODEBOOK_FILE, *(files.description for files in families)])
    raise UserError(f"{path} holds no image tokenizer: neither {described}")
