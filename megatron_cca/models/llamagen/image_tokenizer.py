"""LlamaGen's image tokenizer: the authors' VQ-16 (``vq_ds16_c2i.pt``, ``vq_ds16_t2i.pt``), or one of its structure."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from megatron_cca.errors import UserError, error_context
from megatron_cca.models.formats import check_codes, fingerprint, moved_to
from megatron_cca.models.vq_files import CODEBOOK, VqContents, VqFiles, VqForm, read_vq_file
from megatron_cca.models.vq_network import VqNetwork, VqSizes, VqTokenizer

# Places that are compared with the whole codebook at a time: 0.5 GB in float64 for 16,384 codes.
_PLACES_AT_ONCE = 4096
# Cosines that differ by less are equal up to rounding in float64.
_EQUAL = 1e-12

_FORM = VqForm(
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


class LlamaGenVqFiles(VqFiles):
    """See :class:`megatron_cca.models.formats.ImageTokenizerFiles`."""

    description = "the .pt of LlamaGen's, such as vq_ds16_c2i.pt"
    form = _FORM

    def open(
        self,
        path: Path,
        device: str | torch.device,
        weights: Path | None = None,
        scales: tuple[int, ...] = (),
    ) -> LlamaGenImageTokenizer:
        """See the protocol."""
        assert weights is None, "LlamaGen's checkpoints carry no image tokenizer"
        return open_llamagen_vq(self.only_file(path), device)


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
        contents = read_vq(path)
    network = moved_to(contents.network(), device, torch.float32)
    found = fingerprint(asdict(contents.sizes), contents.tensors)
    return LlamaGenImageTokenizer(network, contents.tensors[CODEBOOK], contents.sizes, found)


def read_vq(path: Path) -> VqContents:
    """Return the contents of a file of the authors', as copies.

    Raises:
        UserError: as :func:`read_vq_file`, or a vector of the codebook without direction.
    """
    contents = read_vq_file(path, _FORM)
    if not (lengths := contents.tensors[CODEBOOK].norm(dim=1)).all():
        raise UserError(f"tensor {CODEBOOK}: vector {int(lengths.argmin())} is zero, which has no direction")
    return contents


class LlamaGenImageTokenizer(VqTokenizer):
    """See :class:`megatron_cca.models.formats.ImageTokenizer`. :func:`open_llamagen_vq` opens one.

    The authors extract codes in TF32. Some of their codes therefore differ, where two codes have nearly the same
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

        Values are rounded as in the authors' sampling for FID: 127.5 x + 128, between 0 and 255, with the fraction cut
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
