"""Image tokenizers whose codes are directions: LlamaGen's, and Janus-Pro's, which has its structure.

The files do not say that codes are compared by direction. The authors' codes are.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor
from torch.nn.functional import normalize

from megatron_cca.errors import UserError
from megatron_cca.models.formats import check_codes, fingerprint, moved_to
from megatron_cca.models.vq_files import CODEBOOK, VqContents, VqForm
from megatron_cca.models.vq_network import VqNetwork, VqSizes, VqTokenizer

# Places that are compared with the whole codebook at a time: 0.5 GB in float64 for 16,384 codes.
_PLACES_AT_ONCE = 4096
# Cosines that differ by less are equal up to rounding in float64.
_EQUAL = 1e-12

LLAMAGEN_FORM = VqForm(
    owner="LlamaGen's",
    example="vq_ds16_c2i.pt",
    own_prefix="encoder.conv_blocks.",
    decoder="tok_embeddings.weight",
    # Which codes the last batches used.
    unused=("quantize.codebook_used",),
    quant_kernel=1,
    file_name=lambda name, _: name,
    quantizer_shapes=lambda sizes: {CODEBOOK: (sizes.codebook_size, sizes.embed_dim)},
)


def check_directions(contents: VqContents) -> VqContents:
    """Return what a file holds, if each code has a direction.

    Raises:
        UserError: a vector of the codebook is zero. Does not name the file.
    """
    if not (lengths := contents.tensors[CODEBOOK].norm(dim=1)).all():
        raise UserError(f"tensor {CODEBOOK}: vector {int(lengths.argmin())} is zero, which has no direction")
    return contents


def direction_tokenizer(contents: VqContents, device: str | torch.device) -> DirectionTokenizer:
    """Return the image tokenizer of what a file holds, on a device. Names do not change its fingerprint.

    Raises:
        UserError: there is no such device, or no room on it.
    """
    network, codebook = contents.network(), contents.tensors[CODEBOOK]
    found = fingerprint(asdict(contents.sizes), {**network.state_dict(), CODEBOOK: codebook})
    return DirectionTokenizer(moved_to(network, device, torch.float32), codebook, contents.sizes, found)


class DirectionTokenizer(VqTokenizer):
    """See :class:`megatron_cca.models.formats.ImageTokenizer`. :func:`direction_tokenizer` makes one.

    LlamaGen's authors extract codes in TF32. Some of their codes therefore differ, where two codes have nearly the same
    distance.

    Args:
        network: on its device.
        codebook: float32 ``[K, D]``. Vectors are compared by their direction.
        sizes: of the network.
        fingerprint: of its weights.
    """

    kind = "llamagen-vq"

    def __init__(self, network: VqNetwork, codebook: Tensor, sizes: VqSizes, fingerprint: str) -> None:
        super().__init__(network, sizes, fingerprint)
        self._codebook = codebook.to(self._device)

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode images uint8 ``[N, H, W, 3]`` to codes int64 ``[N, H / f, W / f]``, on the device of ``pixels``.

        Raises:
            UserError: pixels of another dtype or shape, or sides that the factor does not divide.
        """
        vectors = self.latents(pixels).movedim(1, -1)
        places = vectors.reshape(-1, self._embed_dim).split(_PLACES_AT_ONCE)
        codes = torch.cat([self._nearest(part) for part in places])
        return codes.view(vectors.shape[:-1]).to(pixels.device)

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes int64 ``[N, h, w]`` to images uint8 ``[N, h f, w f, 3]``, on the device of ``codes``.

        Values are rounded as in LlamaGen's sampling for FID: 127.5 x + 128, between 0 and 255, with the fraction cut
        off.

        Raises:
            UserError: codes of another dtype or shape, or outside the codebook.
        """
        return (127.5 * self.decode_floats(codes) + 128).clamp(0, 255).to(torch.uint8).to(codes.device)

    def decode_floats(self, codes: Tensor) -> Tensor:
        """Decode codes int64 ``[N, h, w]`` to float32 ``[N, h f, w f, 3]``, about -1 to 1, on the network's device.

        Raises:
            UserError: as :meth:`decode`.
        """
        check_codes(codes, self.codebook_size, self.temporal_factor)
        height, width = (side * self.spatial_factor for side in codes.shape[1:])
        directions = normalize(self._codebook, dim=-1)
        return self._decoded(codes, height, width, lambda part: directions[part].movedim(-1, 1))

    def _nearest(self, vectors: Tensor) -> Tensor:
        """Return the codes int64 ``[M]`` with the nearest direction to vectors ``[M, D]``. Ties go to the first.

        The comparison is in float64. In the authors' float32, rounding decides between near neighbours.
        """
        directions = normalize(self._codebook.double(), dim=-1)
        cosines = normalize(vectors.double(), dim=-1) @ directions.T
        # A matrix product rounds equal columns differently, depending on their place.
        best = cosines.amax(-1, keepdim=True) - _EQUAL
        return (cosines >= best).byte().argmax(-1)
