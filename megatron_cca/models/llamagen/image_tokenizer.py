"""LlamaGen's image tokenizer: the authors' VQ-16 (``vq_ds16_c2i.pt``, ``vq_ds16_t2i.pt``), or one of its structure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from megatron_cca.errors import UserError, error_context
from megatron_cca.models.formats import check_codes, check_pixels, fingerprint, float32_copy, full_float32, moved_to
from megatron_cca.models.llamagen.vq_network import NORM_GROUPS, VqNetwork, VqSizes, network_on_meta
from megatron_cca.models.weight_files import tensors_in

_FIRST, _CODEBOOK = "encoder.conv_in.weight", "quantize.embedding.weight"
# Used in training alone: which codes the last batches used.
_IGNORED = ("quantize.codebook_used",)
# In the order of the authors' sampling and code extraction. "ema" is a training checkpoint's average.
_SECTIONS = ("model", "ema", "state_dict")
_DECODER = "tok_embeddings.weight"
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Pixels that pass through the network together: 7 images of 384 x 384 or 16 of 256 x 256. VQ-16 takes 2.6 GB for them.
_PIXELS_AT_ONCE = 2**20
# Places that are compared with the whole codebook at a time: 0.5 GB in float64 for 16,384 codes.
_PLACES_AT_ONCE = 4096
_SUFFIXES = (".pt", ".pth")


class LlamaGenVqFiles:
    """See :class:`megatron_cca.models.formats.ImageTokenizerFiles`."""

    description = "the .pt of LlamaGen's, such as vq_ds16_c2i.pt"

    def recognises(self, path: Path) -> bool:
        """See the protocol."""
        return bool(_files(path))

    def open(self, path: Path, device: str | torch.device, weights: Path | None = None) -> LlamaGenImageTokenizer:
        """See the protocol."""
        assert weights is None, "LlamaGen's checkpoints carry no image tokenizer"

        files = _files(path)
        if len(files) > 1:
            names = ", ".join(file.name for file in files[:3]) + (", ..." if len(files) > 3 else "")
            raise UserError(f"{path} holds {len(files)} .pt files ({names}); name the image tokenizer's itself")
        return open_llamagen_vq(files[0], device)


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


class LlamaGenImageTokenizer:
    """See :class:`megatron_cca.models.formats.ImageTokenizer`. :func:`open_llamagen_vq` opens one.

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


def read_vq(path: Path) -> tuple[VqSizes, dict[str, Tensor]]:
    """Return sizes and float32 tensors by the authors' names, as copies.

    Raises:
        UserError: a damaged file, one of another model, or tensors that do not fit each other. The message does not
            name the file.
    """
    found = tensors_in(path, _SECTIONS)
    stored = {name: tensor for name, tensor in found.items() if name not in _IGNORED}
    if _DECODER in stored:
        raise UserError(
            f"looks like LlamaGen's decoder ({_DECODER}); give the image tokenizer's own, such as vq_ds16_c2i.pt"
        )
    for name in (_FIRST, _CODEBOOK):
        if name not in stored:
            raise UserError(f"is not LlamaGen's image tokenizer: tensor {name} is missing")
    sizes = _sizes(stored)
    wanted = {name: tuple(tensor.shape) for name, tensor in network_on_meta(sizes).state_dict().items()}
    _check_shapes(stored, wanted)
    state = {name: float32_copy(name, stored[name]) for name in wanted}
    if not (lengths := state[_CODEBOOK].norm(dim=1)).all():
        raise UserError(f"tensor {_CODEBOOK}: vector {int(lengths.argmin())} is zero, which has no direction")
    return sizes, state


def _files(path: Path) -> list[Path]:
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file for file in found if file.suffix in _SUFFIXES and file.is_file()]


def _sizes(stored: Mapping[str, Tensor]) -> VqSizes:
    """Return the sizes. They are checked as far as building a network needs it."""
    levels = _counted(stored, "encoder.conv_blocks.{}.res.0.conv1.weight")
    blocks = _counted(stored, "encoder.conv_blocks.0.res.{}.conv1.weight")
    channels = [_channels(stored, f"encoder.conv_blocks.{level}.res.0.conv1.weight") for level in range(levels)]
    if not channels:
        raise UserError("tensor encoder.conv_blocks.0.res.0.conv1.weight is missing")
    if "encoder.conv_out.weight" not in stored:
        raise UserError("tensor encoder.conv_out.weight is missing")
    return VqSizes(
        _channels(stored, _FIRST),
        tuple(channels),
        blocks,
        _shape(stored, "encoder.conv_out.weight", 4)[0],
        *_shape(stored, _CODEBOOK, 2),
    )


def _counted(stored: Mapping[str, Tensor], name: str) -> int:
    return next(number for number in itertools.count() if name.format(number) not in stored)


def _channels(stored: Mapping[str, Tensor], name: str) -> int:
    channels = _shape(stored, name, 4)[0]
    if channels % NORM_GROUPS:
        raise UserError(f"tensor {name} has {channels} channels, not a multiple of the {NORM_GROUPS} groups of norms")
    return channels


def _shape(stored: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    shape = tuple(stored[name].shape)
    if len(shape) != dimensions:
        raise UserError(f"tensor {name} has shape {list(shape)}, which has not {dimensions} sizes")
    if 0 in shape:
        raise UserError(f"tensor {name} has shape {list(shape)}, which holds nothing")
    return shape


def _check_shapes(stored: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    for name in sorted(wanted.keys() - stored.keys()):
        raise UserError(f"tensor {name} is missing")
    for name in sorted(stored.keys() - wanted.keys()):
        raise UserError(f"tensor {name} is not one of LlamaGen's image tokenizer's")
    for name, shape in wanted.items():
        if tuple(stored[name].shape) != shape:
            raise UserError(f"tensor {name} has shape {list(stored[name].shape)}, {list(shape)} would fit the others")
        if stored[name].dtype not in _FLOATS:
            raise UserError(f"tensor {name} has dtype {stored[name].dtype}, which is no float of 16 to 64 bits")
