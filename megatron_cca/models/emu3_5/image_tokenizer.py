"""Emu3.5's image tokenizer, BAAI/Emu3.5-VisionTokenizer: VQGAN's network, and index backpropagation (arXiv 2412.02692).

The authors' folder has the same tensors twice: as ``model.safetensors`` with ``config.json``, and as ``model.ckpt``
with ``config.yaml``. An image's code is the vector of the codebook with the largest inner product, whatever its length.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_cca.config.load import read_yaml
from megatron_cca.errors import UserError, error_context
from megatron_cca.models.formats import check_codes, fingerprint, model_type_in, moved_to, read_json
from megatron_cca.models.vq_files import CODEBOOK, VqContents, VqForm, read_vq_file, vqgan_name
from megatron_cca.models.vq_network import VqNetwork, VqSizes, VqTokenizer
from megatron_cca.models.weight_files import CONFIG, SINGLE

_MODEL_TYPE = "Emu3p5VisionVQ"
_YAML, _CHECKPOINT = "config.yaml", "model.ckpt"
# Inner products of float64 that are computed at a time: 0.25 GB.
_PRODUCTS_AT_ONCE = 2**25
# Inner products whose difference is a smaller share of the vectors' lengths are equal up to rounding in float64.
_EQUAL = 1e-12

_FORM = VqForm(
    owner="Emu3.5's",
    example=SINGLE,
    own_prefix="encoder.down.",
    decoder="model.embed_tokens.weight",
    unused=(),
    quant_kernel=1,
    file_name=vqgan_name,
    quantizer_shapes=lambda sizes: {CODEBOOK: (sizes.codebook_size, sizes.embed_dim)},
)


class Emu35VqFiles:
    """See :class:`megatron_cca.models.formats.ImageTokenizerFiles`."""

    description = f"the {CONFIG} and {SINGLE}, or {_YAML} and {_CHECKPOINT}, of Emu3.5's"

    def recognises(self, path: Path) -> bool:
        """See the protocol."""
        return (path / CONFIG).is_file() or (path / _YAML).is_file()

    def knows(self, path: Path) -> bool:
        """See the protocol."""
        return not (path / CONFIG).is_file() or model_type_in(path / CONFIG) == _MODEL_TYPE

    def open(
        self,
        path: Path,
        device: str | torch.device,
        weights: Path | None = None,
        scales: tuple[int, ...] = (),
    ) -> Emu35ImageTokenizer:
        """See the protocol."""
        assert weights is None, "Emu3.5's checkpoints carry no image tokenizer"
        return open_emu3_5_vq(path, device)


def open_emu3_5_vq(folder: str | Path, device: str | torch.device = "cpu") -> Emu35ImageTokenizer:
    """Open the image tokenizer in the authors' folder, by its safetensors if it has both forms.

    Args:
        folder: with ``config.json`` and ``model.safetensors``, or ``config.yaml`` and ``model.ckpt``.
        device: where it runs.

    Raises:
        UserError: a missing or damaged file, one of another model, or a configuration that is not that of its tensors.
    """
    folder = Path(folder)
    config, of_config = _configuration(folder)
    path = folder / (SINGLE if of_config.name == CONFIG else _CHECKPOINT)
    with error_context(path):
        if not path.is_file():
            raise UserError(f"is missing, which belongs to {of_config.name}")
        contents = read_vq_file(path, _FORM)
    with error_context(of_config):
        _check_sizes(config, contents.sizes)
    network = moved_to(contents.network(), device, torch.float32)
    found = fingerprint(asdict(contents.sizes), contents.tensors)
    return Emu35ImageTokenizer(network, contents, found)


class Emu35ImageTokenizer(VqTokenizer):
    """See :class:`megatron_cca.models.formats.ImageTokenizer`. :func:`open_emu3_5_vq` opens one.

    The authors compare in float32. Some of their codes therefore differ, where two codes are nearly as good.

    Args:
        network: on its device.
        contents: the file that it is of, with the codebook.
        fingerprint: of its weights.
    """

    kind = "emu3_5-ibq"

    def __init__(self, network: VqNetwork, contents: VqContents, fingerprint: str) -> None:
        super().__init__(network, contents.sizes, fingerprint)
        self._codebook = contents.tensors[CODEBOOK].to(self._device)

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode images uint8 ``[N, H, W, 3]`` to codes int64 ``[N, H / f, W / f]``, on the device of ``pixels``.

        Raises:
            UserError: pixels of another dtype or shape, or sides that the factor does not divide.
        """
        vectors = self.latents(pixels).movedim(1, -1)
        return self._best(vectors.reshape(-1, self._embed_dim)).view(vectors.shape[:-1]).to(pixels.device)

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes int64 ``[N, h, w]`` to images uint8 ``[N, h f, w f, 3]``, on the device of ``codes``.

        Values are rounded as the authors do: 127.5 (x + 1), between 0 and 255, with the fraction cut off.

        Raises:
            UserError: codes of another dtype or shape, or outside the codebook.
        """
        return ((self.decode_floats(codes) + 1) * 127.5).clamp(0, 255).to(torch.uint8).to(codes.device)

    def decode_floats(self, codes: Tensor) -> Tensor:
        """Decode codes int64 ``[N, h, w]`` to float32 ``[N, h f, w f, 3]``, about -1 to 1, on the network's device.

        Raises:
            UserError: as :meth:`decode`.
        """
        check_codes(codes, self.codebook_size, self.temporal_factor)
        height, width = (side * self.spatial_factor for side in codes.shape[1:])
        return self._decoded(codes, height, width, lambda part: self._codebook[part].movedim(-1, 1))

    def _best(self, vectors: Tensor) -> Tensor:
        """Return the codes int64 ``[M]`` of vectors ``[M, D]``. Of equals the first is taken.

        The comparison is in float64. In the authors' float32, rounding decides between near neighbours.
        """
        codebook = self._codebook.double().T.contiguous()
        longest = codebook.norm(dim=0).max()
        found = []
        for part in vectors.split(max(1, _PRODUCTS_AT_ONCE // self.codebook_size)):
            products = part.double() @ codebook
            # A matrix product rounds equal columns differently, depending on their place.
            slack = _EQUAL * longest * part.double().norm(dim=-1, keepdim=True)
            found.append((products >= products.amax(-1, keepdim=True) - slack).byte().argmax(-1))
        return torch.cat(found)


def _configuration(folder: Path) -> tuple[dict[str, Any], Path]:
    """Return the flat contents of a folder's configuration, and its path."""
    path = folder / CONFIG
    if path.is_file():
        with error_context(path):
            config = read_json(path)
            kind = config.get("model_type")
            if kind != _MODEL_TYPE:
                raise UserError(f"model_type {repr(kind)[:60]} is not an Emu3.5 image tokenizer's, {_MODEL_TYPE}")
        return config, path
    path = folder / _YAML
    config = read_yaml(path, "image tokenizer", "an image tokenizer's sizes", dict)
    with error_context(path):
        sizes = config.pop("ddconfig", None)
        if not isinstance(sizes, dict) or "n_embed" not in config:
            raise UserError("lacks ddconfig or n_embed, which an Emu3.5 image tokenizer's has")
    return {**config, **sizes, "codebook_size": config["n_embed"]}, path


def _check_sizes(config: dict[str, Any], sizes: VqSizes) -> None:
    first = sizes.first_channels
    wanted = {
        "codebook_size": sizes.codebook_size,
        "embed_dim": sizes.embed_dim,
        "z_channels": sizes.latent_channels,
        "double_z": False,
        "in_channels": 3,
        "out_ch": 3,
        "ch": first,
        "ch_mult": [channels // first for channels in sizes.channels],
        "num_res_blocks": sizes.num_res_blocks,
    }
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise UserError(f"{key}: {repr(config[key])[:60]}, but the tensors beside it have {value}")
