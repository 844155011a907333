"""LlamaGen's image tokenizer: the authors' VQ-16 (``vq_ds16_c2i.pt``, ``vq_ds16_t2i.pt``), or one of its structure."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from megatron_cca.errors import error_context
from megatron_cca.models.image_tokenizer_protocol import check_codes, check_pixels, fingerprint, full_float32, moved_to
from megatron_cca.models.llamagen.vq_network import VqNetwork, VqSizes, network_on_meta
from megatron_cca.models.llamagen.vq_weights import read_vq

# Pixels that pass through the network together: 7 images of 384 x 384 or 16 of 256 x 256. VQ-16 takes 2.6 GB for them.
_PIXELS_AT_ONCE = 2**20
# Places that are compared with the whole codebook at a time: 0.5 GB in float64 for 16,384 codes.
_PLACES_AT_ONCE = 4096


class LlamaGenImageTokenizer:
    """See :class:`megatron_cca.models.image_tokenizer_protocol.ImageTokenizer`. :func:`open_llamagen_vq` opens one.

    Everything runs in full float32, and batches in parts of bounded size. The authors extract codes in TF32. Some of
    their codes therefore differ, where two codes have nearly the same distance.

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
        """Encode images uint8 ``[N, H, W, 3]`` to codes int64 ``[N, H / f, W / f]``, on the device of ``pixels``.

        Raises:
            UserError: pixels of another dtype or shape, or sides that the factor does not divide.
        """
        vectors = self.latents(pixels).movedim(1, -1)
        places = vectors.reshape(-1, self._embed_dim).split(_PLACES_AT_ONCE)
        codes = torch.cat([self._network.quantize.nearest(part) for part in places])
        return codes.view(vectors.shape[:-1]).to(pixels.device)

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """Encode images uint8 ``[N, H, W, 3]`` to the vectors that are quantised, float32 ``[N, D, H / f, W / f]``.

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
        """Decode codes int64 ``[N, h, w]`` to images uint8 ``[N, h f, w f, 3]``, on the device of ``codes``.

        Values are rounded as in the authors' sampling for FID: 127.5 x + 128, between 0 and 255, with the fraction cut
        off.

        Raises:
            UserError: codes of another dtype or shape, or outside the codebook.
        """
        return (127.5 * self.decode_floats(codes) + 128).clamp(0, 255).to(torch.uint8).to(codes.device)

    @torch.no_grad()
    def decode_floats(self, codes: Tensor) -> Tensor:
        """Decode codes int64 ``[N, h, w]`` to float32 ``[N, h f, w f, 3]``, about -1 to 1, on the network's device.

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
        """Return a short hash of weights and sizes. It is the same for every form of the file and every device."""
        return self._fingerprint

    def _parts(self, number: int, pixels: int) -> list[slice]:
        at_once = max(1, _PIXELS_AT_ONCE // pixels)
        return [slice(start, start + at_once) for start in range(0, number, at_once)]


def open_llamagen_vq(path: str | Path, device: str | torch.device = "cpu") -> LlamaGenImageTokenizer:
    """Open the image tokenizer in a ``.pt`` of the authors': their release, or a checkpoint of their training.

    If a file has several sets of weights, "model" is read, as the authors' sampling and code extraction do, and not the
    average "ema". Sizes are read from the shapes of tensors. The file does not say that codes are compared by
    direction. The authors' codes are.

    Args:
        path: of the file.
        device: where it runs.

    Raises:
        UserError: a damaged file, one of another model, or a tensor that is missing, unknown or of a wrong shape.
    """
    path = Path(path)
    with error_context(path):
        sizes, state = read_vq(path)
    network = network_on_meta(sizes)
    network.load_state_dict(state, assign=True)
    found = fingerprint(asdict(sizes), state)
    return LlamaGenImageTokenizer(moved_to(network, device, torch.float32), sizes, found)
