"""LlamaGen's image tokenizer: the authors' VQ-16 (``vq_ds16_c2i.pt``, ``vq_ds16_t2i.pt``), or any of its shape."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from megatron_cca.errors import said_of
from megatron_cca.models.image_tokenizers import check_codes, check_pixels, fingerprint, full_float32, placed
from megatron_cca.models.llamagen.vq_network import VqNetwork, VqSizes, without_weights
from megatron_cca.models.llamagen.vq_weights import read_vq

# Images that pass through the network together: 7 of 384 x 384, 16 of 256 x 256, in which VQ-16 takes 2.6 GB.
_PIXELS_AT_ONCE = 2**20
# Places whose similarities to a whole codebook are held together: 0.5 GB in float64 for 16,384 codes.
_PLACES_AT_ONCE = 4096


class LlamaGenImageTokenizer:
    """See :class:`megatron_cca.models.image_tokenizers.ImageTokenizer`; open one with :func:`open_llamagen_vq`.

    Everything runs in full float32, batches in parts of bounded size. The authors extract codes under TF32, so that of
    theirs some differ where two codes are nearly as near.

    Args:
        network: on its device.
        sizes: of the network.
        fingerprint: of its weights.
    """

    kind = "llamagen-vq"
    temporal_factor = 0

    def __init__(self, network: VqNetwork, sizes: VqSizes, fingerprint: str) -> None:
        self._network = network.eval().requires_grad_(False)
        self.spatial_factor, self.codebook_size = sizes.spatial_factor, sizes.codebook_size
        self._embed_dim, self._fingerprint = sizes.embed_dim, fingerprint
        self._device = next(network.parameters()).device

    def encode(self, pixels: Tensor) -> Tensor:
        """uint8 ``[N, H, W, 3]`` -> int64 ``[N, H / f, W / f]``, where ``pixels`` lie.

        Raises:
            UserError: pixels of another dtype or shape, or sides that the factor does not divide.
        """
        vectors = self.latents(pixels).movedim(1, -1)
        places = vectors.reshape(-1, self._embed_dim).split(_PLACES_AT_ONCE)
        codes = torch.cat([self._network.quantize.nearest(part) for part in places])
        return codes.view(vectors.shape[:-1]).to(pixels.device)

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """What the codebook is searched for: uint8 ``[N, H, W, 3]`` -> float32 ``[N, D, H / f, W / f]``.

        Raises:
            UserError: as :meth:`encode`.
        """
        check_pixels(pixels, self.spatial_factor, self.temporal_factor)
        number, height, width, _ = pixels.shape
        shape = number, self._embed_dim, height // self.spatial_factor, width // self.spatial_factor
        found = torch.empty(shape, device=self._device)
        with full_float32(self._device.type):
            for part in self._parts(number, height * width):
                planes = pixels[part].to(self._device).movedim(-1, 1).contiguous()
                found[part] = self._network.vectors((planes.float() / 255 - 0.5) / 0.5)
        return found

    def decode(self, codes: Tensor) -> Tensor:
        """int64 ``[N, h, w]`` -> uint8 ``[N, h f, w f, 3]``, where ``codes`` lie.

        As the authors' sampling for FID rounds: 127.5 x + 128 between 0 and 255, its fraction cut off.

        Raises:
            UserError: codes of another dtype or shape, or outside the codebook.
        """
        return (127.5 * self.decode_floats(codes) + 128).clamp(0, 255).to(torch.uint8).to(codes.device)

    @torch.no_grad()
    def decode_floats(self, codes: Tensor) -> Tensor:
        """int64 ``[N, h, w]`` -> float32 ``[N, h f, w f, 3]``, about -1 to 1, where the network lies.

        Raises:
            UserError: as :meth:`decode`.
        """
        check_codes(codes, self.codebook_size, self.temporal_factor)
        number, height, width = codes.shape[0], *(side * self.spatial_factor for side in codes.shape[1:])
        found = torch.empty((number, height, width, 3), device=self._device)
        with full_float32(self._device.type):
            for part in self._parts(number, height * width):
                found[part] = self._network.pixels(codes[part].to(self._device)).movedim(1, -1)
        return found

    def fingerprint(self) -> str:
        """A short hash of weights and sizes; the same for every form of the file and every device."""
        return self._fingerprint

    def _parts(self, number: int, pixels: int) -> list[slice]:
        at_once = max(1, _PIXELS_AT_ONCE // pixels)
        return [slice(start, start + at_once) for start in range(0, number, at_once)]


def open_llamagen_vq(path: str | Path, device: str | torch.device = "cpu") -> LlamaGenImageTokenizer:
    """The image tokenizer in a ``.pt`` of the authors': their release, or a checkpoint of their training.

    Of a file with several sets of weights "model" is taken, as their sampling and code extraction do, not the average
    "ema". Sizes are read from the tensors' shapes. That codes are compared by direction is not in the file; the
    authors' are.

    Args:
        path: of the file.
        device: where it runs.

    Raises:
        UserError: a damaged file, one of another model, or a tensor that is missing, too many or of a wrong shape.
    """
    path = Path(path)
    with said_of(path):
        sizes, state = read_vq(path)
    network = without_weights(sizes)
    network.load_state_dict(state, assign=True)
    found = fingerprint(asdict(sizes), state)
    return LlamaGenImageTokenizer(placed(network, device, torch.float32), sizes, found)
