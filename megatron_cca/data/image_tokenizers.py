"""Image tokenizers: pictures to visual codes and back. Which one a folder holds is seen from its files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_cca.data.patch_codebook import FILE_NAME as CODEBOOK_FILE
from megatron_cca.data.patch_codebook import PatchCodebook
from megatron_cca.errors import UserError
from megatron_cca.models.emu3.image_tokenizer import check_codes, check_pixels, open_emu3_vq
from megatron_cca.models.emu3.vq_config import CONFIG

# ITU-R 601-2 luma in 1/65536, as PIL's convert("L") computes it.
_LUMA = np.array([19595, 38470, 7471], dtype=np.uint32)


class ImageTokenizer(Protocol):
    """Turns images into the codes of a codebook, and codes into images.

    Attributes:
        kind: "emu3-vq" or "patch-codebook".
        spatial_factor: pixels per code along a side.
        temporal_factor: frames per frame of codes; 0 where clips are not supported.
        codebook_size: codes are below it.
    """

    kind: str
    spatial_factor: int
    temporal_factor: int
    codebook_size: int

    def encode(self, pixels: Tensor) -> Tensor:
        """Codes of RGB images of one size, or of clips; they lie where ``pixels`` do.

        Args:
            pixels: uint8 ``[N, H, W, 3]`` or ``[N, T, H, W, 3]``, on any device.

        Returns:
            int64 ``[N, H / f, W / f]``, or ``[N, T / t, H / f, W / f]``.

        Raises:
            UserError: another dtype or shape, or a side or number of frames that the factors do not divide.
        """

    def decode(self, codes: Tensor) -> Tensor:
        """Images of codes; they lie where ``codes`` do.

        Args:
            codes: int64 ``[N, h, w]`` or ``[N, T, h, w]``, on any device.

        Returns:
            uint8 ``[N, h f, w f, 3]``, or ``[N, T t, h f, w f, 3]``.

        Raises:
            UserError: another dtype or shape, or a code outside the codebook.
        """

    def fingerprint(self) -> str:
        """A short hash of weights and configuration: where it is the same, codes mean the same."""


class PatchImageTokenizer:
    """A :class:`PatchCodebook` as an :class:`ImageTokenizer`: colours become grey, and grey comes back on all channels.

    Args:
        codebook: whose centres are float32 ``[K, P, P]``.
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


def open_image_tokenizer(folder: str | Path, device: str | torch.device = "cpu") -> ImageTokenizer:
    """The image tokenizer that a folder holds: the demo's ``codebook.npy``, or Emu3's VQ model in any of its forms.

    Args:
        folder: on disk; nothing is downloaded.
        device: where Emu3's model runs. A patch codebook always runs on the CPU.

    Raises:
        UserError: no such folder, no tokenizer in it, a damaged one; names the file.
    """
    folder = Path(folder)
    try:
        if not folder.is_dir():
            raise UserError(f"no folder at {folder}; nothing is fetched from a hub here, download it first")
        if (folder / CODEBOOK_FILE).is_file():
            return PatchImageTokenizer(PatchCodebook.load(folder))
        if (folder / CONFIG).is_file():
            return open_emu3_vq(folder, device)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from None
    raise UserError(
        f"{folder} holds no image tokenizer: neither {CODEBOOK_FILE} nor the {CONFIG} and safetensors of Emu3's"
    )
