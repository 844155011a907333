"""VAR's image tokenizer: the authors' multi-scale VQVAE (``vae_ch160v4096z32.pth``), or one of its structure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from megatron_cca.errors import UserError, error_context
from megatron_cca.models.formats import fingerprint, full_float32, moved_to
from megatron_cca.models.pyramid import num_codes
from megatron_cca.models.scale_features import NUM_CONVOLUTIONS, ScaleFeatures
from megatron_cca.models.scale_quantizer import check_pyramid_codes, check_pyramid_pixels, quantized
from megatron_cca.models.var import RELEASED_SCALES
from megatron_cca.models.vq_files import CODEBOOK, VqContents, VqFiles, VqForm, read_vq_file, vqgan_name
from megatron_cca.models.vq_network import VqNetwork, VqSizes, VqTokenizer

# How often each scale used each code. Its rows alone tell the number of scales.
_HITS = "quantize.ema_vocab_hit_SV"
CONVOLUTIONS = "quantize.quant_resi.qresi_ls."
_PROJECTION = re.compile(r"\.[qkv]\.")


def _file_name(name: str, num_levels: int) -> str:
    return _PROJECTION.sub(".qkv.", vqgan_name(name, num_levels))


def quantizer_shapes(codebook_size: int, channels: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the quantiser's tensors by the file's names."""
    shapes: dict[str, tuple[int, ...]] = {CODEBOOK: (codebook_size, channels)}
    for number in range(NUM_CONVOLUTIONS):
        shapes[f"{CONVOLUTIONS}{number}.weight"] = channels, channels, 3, 3
        shapes[f"{CONVOLUTIONS}{number}.bias"] = (channels,)
    return shapes


def feature_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of :class:`ScaleFeatures`, as copies, of a file's tensors by name."""

    def stacked(part: str) -> Tensor:
        return torch.stack([tensors[f"{CONVOLUTIONS}{number}.{part}"] for number in range(NUM_CONVOLUTIONS)])

    return {
        "codebook": tensors[CODEBOOK].clone(),
        "convolutions": stacked("weight"),
        "convolution_biases": stacked("bias"),
    }


_FORM = VqForm(
    owner="VAR's",
    example="vae_ch160v4096z32.pth",
    own_prefix="encoder.down.",
    decoder="word_embed.weight",
    unused=(_HITS,),
    quant_kernel=3,
    file_name=_file_name,
    quantizer_shapes=lambda sizes: quantizer_shapes(sizes.codebook_size, sizes.embed_dim),
)


class VarVqFiles(VqFiles):
    """See :class:`megatron_cca.models.formats.ImageTokenizerFiles`."""

    description = "the .pth of VAR's, such as vae_ch160v4096z32.pth"
    form = _FORM

    def open(
        self,
        path: Path,
        device: str | torch.device,
        weights: Path | None = None,
        scales: tuple[int, ...] = (),
    ) -> VarImageTokenizer:
        """See the protocol."""
        assert weights is None, "VAR's checkpoints carry no image tokenizer"
        return open_var_vq(self.only_file(path), device, scales)


def open_var_vq(
    path: str | Path, device: str | torch.device = "cpu", scales: tuple[int, ...] = ()
) -> VarImageTokenizer:
    """Open the image tokenizer in a ``.pth`` of the authors'.

    Sizes are read from the shapes of tensors. The file does not tell the sides of the scales, only their number.

    Args:
        path: of the file.
        device: where it runs.
        scales: sides of the scales, smallest first. Without them a file of ten scales has the released sides.

    Raises:
        UserError: a damaged file, one of another model, a tensor that is missing, unknown or of a wrong shape, or
            unknown scales.
    """
    path = Path(path)
    with error_context(path):
        contents = read_vq_file(path, _FORM)
        scales = scales or _released_scales(contents)
    network = moved_to(contents.network(), device, torch.float32)
    features = moved_to(_features(contents, scales), device, torch.float32)
    found = fingerprint([asdict(contents.sizes), scales], contents.tensors)
    return VarImageTokenizer(network, features, contents.sizes, found)


class VarImageTokenizer(VqTokenizer):
    """See :class:`megatron_cca.models.formats.ImageTokenizer`. :func:`open_var_vq` opens one.

    The codes of an image are one row, scale by scale, each row by row. Images have one side: that of the last scale
    times the factor. The authors extract codes in TF32 where it is on, and always compare in float32. Some of their
    codes therefore differ, where two codes have nearly the same distance. A different code changes the rest that is
    left to the scales after it.

    Attributes:
        scales: sides of the grids of codes that an image consists of, smallest first.

    Args:
        network, features: on their device.
        sizes: of the network.
        fingerprint: of weights and scales.
    """

    kind = "var-vq"

    def __init__(self, network: VqNetwork, features: ScaleFeatures, sizes: VqSizes, fingerprint: str) -> None:
        super().__init__(network, sizes, fingerprint)
        self._features, self.scales = features, features.scales
        self._side = self.scales[-1] * self.spatial_factor

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode images uint8 ``[N, S, S, 3]`` to codes int64 ``[N, 1, codes]``, on the device of ``pixels``.

        Raises:
            UserError: pixels of another dtype or shape, or of another side than the tokenizer's.
        """
        check_pyramid_pixels(pixels, self._side)
        vectors = self.latents(pixels)
        codes = torch.empty((len(pixels), 1, num_codes(self.scales)), dtype=torch.int64, device=self._device)
        with full_float32(self._device.type):
            for part in self._parts(len(pixels), self._side**2):
                codes[part, 0] = quantized(self._features, vectors[part])
        return codes.to(pixels.device)

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes int64 ``[N, 1, codes]`` to images uint8 ``[N, S, S, 3]``, on the device of ``codes``.

        Values are rounded as in the authors' sampling: between 0 and 1 times 255, with the fraction cut off.

        Raises:
            UserError: codes of another dtype or shape, outside the codebook, or not as many as an image has.
        """
        levels = self.decode_floats(codes).clamp(-1, 1).add(1).mul(0.5).mul(255)
        return levels.to(torch.uint8).to(codes.device)

    def decode_floats(self, codes: Tensor) -> Tensor:
        """Decode codes int64 ``[N, 1, codes]`` to float32 ``[N, S, S, 3]``, about -1 to 1, on the network's device.

        Raises:
            UserError: as :meth:`decode`.
        """
        check_pyramid_codes(codes, self.codebook_size, self.scales)
        return self._decoded(codes[:, 0], self._side, self._side, self._picture)

    def features(self) -> ScaleFeatures:
        """Return codebook and convolutions, on the tokenizer's device. A model's inputs are made of the same."""
        return self._features

    def _picture(self, codes: Tensor) -> Tensor:
        return sum(self._features.added_by_scales(codes))


def _features(contents: VqContents, scales: tuple[int, ...]) -> ScaleFeatures:
    with torch.device("meta"):
        features = ScaleFeatures(contents.sizes.codebook_size, contents.sizes.embed_dim, scales)
    features.load_state_dict(feature_weights(contents.tensors), assign=True)
    return features.requires_grad_(False)


def _released_scales(contents: VqContents) -> tuple[int, ...]:
    if _HITS not in contents.unused:
        raise UserError(f"tensor {_HITS} is missing, which tells the number of scales")
    shape = list(contents.unused[_HITS].shape)
    if len(shape) != 2 or shape[1] != contents.sizes.codebook_size:
        raise UserError(f"tensor {_HITS} has shape {shape}, not a row of {contents.sizes.codebook_size} for each scale")
    if shape[0] != len(RELEASED_SCALES):
        sides = " ".join(str(side) for side in RELEASED_SCALES)
        raise UserError(
            f"is of {shape[0]} scales ({_HITS}), whose sides no file tells; known are the {len(RELEASED_SCALES)} of "
            f"the released one: {sides}"
        )
    return RELEASED_SCALES
