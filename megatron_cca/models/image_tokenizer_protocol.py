"""What the image tokenizers of all families share: the protocol, checks of inputs, numerical precision."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_cca.errors import UserError


class ImageTokenizer(Protocol):
    """A converter of images to codes of a codebook, and of codes to images.

    Attributes:
        kind: name of the kind, such as "emu3-vq" or "patch-codebook".
        spatial_factor: pixels per code along a side.
        temporal_factor: frames of video per frame of codes. 0 if clips are not supported.
        codebook_size: number of codes.
    """

    kind: str
    spatial_factor: int
    temporal_factor: int
    codebook_size: int

    def encode(self, pixels: Tensor) -> Tensor:
        """Return the codes of RGB images of one size, or of clips. They are on the device of ``pixels``.

        Args:
            pixels: uint8 ``[N, H, W, 3]`` or ``[N, T, H, W, 3]``, on any device.

        Returns:
            int64 ``[N, H / f, W / f]``, or ``[N, T / t, H / f, W / f]``.

        Raises:
            UserError: another dtype or shape, or a side or number of frames that the factors do not divide.
        """

    def decode(self, codes: Tensor) -> Tensor:
        """Return the images of codes. They are on the device of ``codes``.

        Args:
            codes: int64 ``[N, h, w]`` or ``[N, T, h, w]``, on any device.

        Returns:
            uint8 ``[N, h f, w f, 3]``, or ``[N, T t, h f, w f, 3]``.

        Raises:
            UserError: another dtype or shape, or a code outside the codebook.
        """

    def fingerprint(self) -> str:
        """Return a short hash of weights and configuration. Equal hashes mean that codes have the same meaning."""


def check_pixels(pixels: Tensor, spatial_factor: int, temporal_factor: int) -> None:
    """Check that pixels have the right dtype and shape, and that the factors divide their sides.

    Args:
        pixels: uint8 ``[N, H, W, 3]``. Also clips ``[N, T, H, W, 3]`` if ``temporal_factor`` is not 0.
        spatial_factor, temporal_factor: factors of the tokenizer.

    Raises:
        UserError: dtype, shape or a side is wrong.
    """
    shape = list(pixels.shape)
    if pixels.dtype != torch.uint8 or len(shape) not in (4, 5 if temporal_factor else 4) or shape[-1] != 3:
        wanted = "uint8 [N, H, W, 3]" + (" or [N, T, H, W, 3]" if temporal_factor else "")
        raise UserError(f"pixels: must be {wanted}, found {pixels.dtype} {shape}")
    for what, size in zip(("height", "width"), shape[-3:-1], strict=True):
        if size < 1 or size % spatial_factor:
            raise UserError(f"pixels: {what} {size} is not a multiple of {spatial_factor}")
    if len(shape) == 5 and (shape[1] < 1 or shape[1] % temporal_factor):
        raise UserError(f"pixels: {shape[1]} frames are not a multiple of {temporal_factor}")


def check_codes(codes: Tensor, codebook_size: int, temporal_factor: int) -> None:
    """Check that codes have the right dtype and shape, and are in the codebook.

    Args:
        codes: int64 ``[N, h, w]``. Also codes of clips ``[N, T, h, w]`` if ``temporal_factor`` is not 0.
        codebook_size, temporal_factor: sizes of the tokenizer.

    Raises:
        UserError: dtype or shape is wrong, or a code is not in the codebook.
    """
    shape = list(codes.shape)
    if codes.dtype != torch.int64 or len(shape) not in (3, 4 if temporal_factor else 3) or 0 in shape[1:]:
        wanted = "int64 [N, h, w]" + (" or [N, T, h, w]" if temporal_factor else "")
        raise UserError(f"codes: must be {wanted}, found {codes.dtype} {shape}")
    # Checked here, since a lookup outside the table ends a process on a GPU.
    if codes.numel() and not 0 <= (lowest := int(codes.min())) <= (highest := int(codes.max())) < codebook_size:
        raise UserError(f"codes: {lowest if lowest < 0 else highest} does not fit a codebook of {codebook_size}")


@contextmanager
def full_float32(device_type: str) -> Iterator[None]:
    """Switch autocast and TF32 off inside the block.

    Less precision, such as cuDNN's default TF32, changes codes of images.
    """
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    with ExitStack() as undo:
        undo.enter_context(torch.autocast(device_type, enabled=False))
        _switch(undo, cudnn, "deterministic", True)
        _switch(undo, cudnn, "benchmark", False)
        if hasattr(cudnn, "conv"):  # torch 2.9
            _switch(undo, cudnn.conv, "fp32_precision", "ieee")
            _switch(undo, mkldnn.conv, "fp32_precision", "ieee")
        else:
            _switch(undo, cudnn, "allow_tf32", False)
        try:
            undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        except RuntimeError:
            # torch cannot read its older switch once its newer ones were set.
            _switch(undo, torch.backends.cuda.matmul, "fp32_precision", "ieee")
            _switch(undo, mkldnn.matmul, "fp32_precision", "ieee")
        yield


def _switch(undo: ExitStack, place: Any, name: str, value: Any) -> None:
    undo.callback(setattr, place, name, getattr(place, name))
    setattr(place, name, value)


def fingerprint(facts: Any, state: Mapping[str, Tensor]) -> str:
    """Return a short hash of facts, as JSON, and of named tensors on the CPU."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().numpy())
    return digest.hexdigest()[:16]


def moved_to(model: torch.nn.Module, device: str | torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """Move a model to a device and return it.

    Raises:
        UserError: there is no such device, or no room on it.
    """
    try:
        return model.to(torch.device(device), dtype)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device}: {str(error).splitlines()[0]}") from None
