"""Emu3's image tokenizer: transformers' ``Emu3VQVAE``, from any folder that holds its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_cca.errors import UserError, error_context
from megatron_cca.models.emu3.vq_files import (
    IGNORED,
    VqForm,
    normalisation,
    read_tensors,
    recognise,
    sizes_in,
    stored_tensors,
)
from megatron_cca.models.formats import (
    check_codes,
    check_pixels,
    fingerprint,
    full_float32,
    moved_to,
    read_json,
    transformers_refusals,
)
from megatron_cca.models.weight_files import CONFIG

# transformers crops codes to these sizes, along the wrong axes of a clip. Nothing here is padded.
_UNCROPPED = (2**31, 2**31)


def open_emu3_vq(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    weights: str | Path | None = None,
) -> Emu3ImageTokenizer:
    """Open the image tokenizer in ``folder``, in any of its three forms.

    Pixels are normalised by the ``image_mean`` and ``image_std`` of the folder's image processor. If these are missing,
    they are 0.5 in every form. These are the defaults of the original processor, with which the released weights were
    trained. The defaults of transformers' processor are CLIP's.

    Args:
        folder: with ``config.json`` and safetensors.
        device: where it runs.
        dtype: in which it runs. In bfloat16 some codes differ.
        weights: a separate folder with the tensors, whose names then have no prefix. An import keeps them so.

    Raises:
        UserError: a missing or damaged file, or a configuration or tensor that is not this model's; names it.
    """
    folder = Path(folder)
    with error_context(folder / CONFIG):
        form, section = recognise(read_json(folder / CONFIG))
    files = folder if weights is None else Path(weights)
    with error_context(files):
        stored = stored_tensors(files, form if weights is None else VqForm(("",)))
    with error_context(folder / CONFIG):
        sizes = sizes_in(section, form, len(stored))
        model = _build(sizes)
    mean, std = normalisation(folder)
    with error_context(files):
        state = read_tensors(model, stored)
    found = fingerprint([sizes, [mean, std]], state)
    counters = {name: torch.tensor(0) for name in model.state_dict() if name.endswith(IGNORED)}
    model.load_state_dict(state | counters, assign=True)
    return Emu3ImageTokenizer(moved_to(model, device, dtype), mean, std, found)


class Emu3ImageTokenizer:
    """See :class:`megatron_cca.models.formats.ImageTokenizer`. :func:`open_emu3_vq` opens one.

    Args:
        model: transformers' ``Emu3VQVAE``, on its device and in its dtype.
        mean, std: per channel, of pixels between 0 and 1.
        fingerprint: of weights and configuration.
    """

    kind = "emu3-vq"
    scales: tuple[int, ...] = ()

    def __init__(self, model: torch.nn.Module, mean: list[float], std: list[float], fingerprint: str) -> None:
        # In training mode batch norms would use, and change, the statistics of the images.
        self._model = model.eval().requires_grad_(False)
        self.spatial_factor = 2 ** (len(model.config.channel_multiplier) - 1)
        self.temporal_factor = model.config.temporal_downsample_factor
        self.codebook_size = model.config.codebook_size
        self._fingerprint = fingerprint
        device = next(model.parameters()).device
        self._mean, self._std = (_channel_tensor(values, device) for values in (mean, std))
        self._normalisation = mean, std

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode images to codes.

        Images uint8 ``[N, H, W, 3]`` become int64 ``[N, H / f, W / f]``. Clips ``[N, T, H, W, 3]`` become
        ``[N, T / t, h, w]``. The codes are on the device of ``pixels``. Convolutions and matrix products never use TF32
        or autocast.

        Raises:
            UserError: pixels of another dtype or shape, or sides (or frames) that the factors do not divide.
        """
        check_pixels(pixels, self.spatial_factor, self.temporal_factor)
        if len(pixels) == 0:
            return pixels.new_zeros(self._code_shape(pixels.shape), dtype=torch.int64)
        planes = pixels.to(self._mean.device).movedim(-1, -3).contiguous()
        scaled = (planes.double() * (1 / 255)).float()
        normalised = (scaled - self._mean) / self._std
        with (
            full_float32(self._mean.device.type),
            _frames_once(self._model.encoder, self.temporal_factor, still=pixels.dim() == 4),
        ):
            found = self._model.encode(normalised, image_sizes=[_UNCROPPED] * len(pixels))
        return torch.stack(list(found.image_tokens)).to(pixels.device)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes to images.

        Codes int64 ``[N, h, w]`` become uint8 ``[N, h f, w f, 3]``. Those of clips, ``[N, T', h, w]``, become
        ``[N, T' t, h f, w f, 3]``. Fractions of grey levels are cut off, see :func:`uint8_pixels`.

        Raises:
            UserError: codes of another dtype or shape, or outside the codebook.
        """
        check_codes(codes, self.codebook_size, self.temporal_factor)
        if len(codes) == 0:
            return codes.new_zeros(self._pixel_shape(codes.shape), dtype=torch.uint8)
        with (
            full_float32(self._mean.device.type),
            _frames_once(self._model.decoder, self.temporal_factor, still=codes.dim() == 3),
        ):
            found = self._model.decode(codes.to(self._mean.device)).float()
        return uint8_pixels(found, *self._normalisation).to(codes.device)

    def fingerprint(self) -> str:
        """Return a short hash of weights, sizes and normalisation. It is the same for every form and device."""
        return self._fingerprint

    def _code_shape(self, pixels: torch.Size) -> list[int]:
        *batch, height, width, _ = pixels
        frames = [batch[1] // self.temporal_factor] if len(batch) == 2 else []
        return [batch[0], *frames, height // self.spatial_factor, width // self.spatial_factor]

    def _pixel_shape(self, codes: torch.Size) -> list[int]:
        *batch, height, width = codes
        frames = [batch[1] * self.temporal_factor] if len(batch) == 2 else []
        return [batch[0], *frames, height * self.spatial_factor, width * self.spatial_factor, 3]


def uint8_pixels(values: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo the normalisation and cut off fractions of grey levels, bit for bit as the authors' image processor does.

    Args:
        values: float32 ``[..., 3, H, W]``, as the decoder returns them.
        mean, std: per channel, of pixels between 0 and 1.

    Returns:
        uint8 ``[..., H, W, 3]``, on the device of ``values``.
    """
    # The authors normalise again, by -mean / std and 1 / std. In float32, x * std + mean gives another result, unless
    # std is a power of 2.
    offset = _channel_tensor([-of / by for of, by in zip(mean, std, strict=True)], values.device)
    scale = _channel_tensor([1 / by for by in std], values.device)
    levels = (values - offset) / scale * 255
    return levels.clamp(0, 255).to(torch.uint8).movedim(-3, -1).contiguous()


def _channel_tensor(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(3, 1, 1)


@contextmanager
def _frames_once(half: torch.nn.Module, repeats: int, *, still: bool) -> Iterator[None]:
    """Run the layers of single frames only on the first of the ``repeats`` frames that stand for a still image.

    The encoder's frames are copies of each other. Of the decoder's frames only the first is kept. The result is
    therefore the same, in a fraction of the time and memory. Frames are consecutive in the batch. Where the layers of
    single frames end, copies of the first frame take the places of the others.
    """

    def first_only(_, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(frames[::repeats] for frames in given)

    def first_codes_only(_, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return given[0], *(codes[::repeats] for codes in given[1:])

    with ExitStack() as hooks:
        if still:
            hooks.enter_context(half.conv_in.register_forward_pre_hook(first_only))
            for name, layer in half.named_children():
                if name in ("middle_block", "up_block", "norm_out"):
                    hooks.enter_context(layer.register_forward_pre_hook(first_codes_only))
            hooks.enter_context(
                half.conv_out.register_forward_hook(lambda _, given, found: found.repeat_interleave(repeats, 0))
            )
        yield


def _build(sizes: dict[str, Any]) -> torch.nn.Module:
    """Build the network on the meta device: without weights, whatever their size."""
    try:
        from transformers import Emu3VQVAE, Emu3VQVAEConfig
    except ImportError:
        raise UserError("needs transformers; pip install 'megatron-cca[hf]'") from None
    with transformers_refusals(), torch.device("meta"):
        return Emu3VQVAE(Emu3VQVAEConfig(**sizes))
