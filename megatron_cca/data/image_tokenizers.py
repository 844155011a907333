"""Open image tokenizers. The names of files decide which one a path holds."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_cca.data.patch_codebook import FILE_NAME as CODEBOOK_FILE
from megatron_cca.data.patch_codebook import PatchCodebook
from megatron_cca.errors import UserError
from megatron_cca.models import FAMILIES
from megatron_cca.models.image_tokenizer_protocol import ImageTokenizer, check_codes, check_pixels

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
