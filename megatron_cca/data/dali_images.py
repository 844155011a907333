"""Decode and resize images with NVIDIA DALI."""

from __future__ import annotations

import os
import re
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_cca import platform
from megatron_cca.data.dali import installed, new_pipeline, one_line, start
from megatron_cca.data.image_headers import DEFAULT_LIMITS, Header, ImageLimits, Rejected, read_header
from megatron_cca.errors import UserError

BATCH = 32
# Pixels of one batch before resizing: 400 MB of RGB at most, unless a single image has more.
_BATCH_PIXELS = 128 * 1024 * 1024
# EXIF's orientations as dimensions of [H, W, 3] to flip. From 5 on rows and columns are exchanged first.
_FLIPS = {1: (), 2: (1,), 3: (0, 1), 4: (0,), 5: (), 6: (1,), 7: (0, 1), 8: (0,)}
# A black BMP of one pixel.
_KNOWN_GOOD = struct.pack("<2s3I3I2H6I4x", b"BM", 58, 0, 54, 40, 1, 1, 1, 24, 0, 4, 0, 0, 0, 0)
_STDERR = 2
# The log of nvImageCodec, and messages of libjpeg, libpng and OpenCV.
_REMARK = re.compile(
    rb"\[(WARNING|ERROR|FATAL)\]|^libpng |JPEG|JFIF|SOS parameters|progression sequence|^Input file read error"
)
_COLOUR = re.compile(r"\x1b\[[\d;]*m")


class ImageDecoder:
    """A decoder and resizer of encoded images.

    JPEGs are decoded on the GPU ("mixed" decoding by nvJPEG) where there is one.

    One pipeline is built and used for all batches. Two threads must not call it at once, since DALI has its own
    threads.

    Args:
        device: of the results.
        threads: of DALI, on the CPU.
        limits: the limits that the images were checked against.

    Raises:
        UserError: DALI is not installed, or does not start on this device.
    """

    def __init__(self, device: torch.device, threads: int = 2, limits: ImageLimits = DEFAULT_LIMITS) -> None:
        assert threads > 0
        self._limits = limits
        self._device = device
        self._threads = threads
        self._pipeline = self._built()

    def decode(self, images: Sequence[bytes], sizes: Sequence[tuple[int, int]]) -> list[Tensor | Rejected]:
        """Decode, turn upright as EXIF says, and resize by bicubic interpolation with antialiasing.

        Check images first. Of a damaged stream, the part that can be decoded may be returned.

        Args:
            images: N encoded images.
            sizes: the wanted height and width of each in pixels, upright.

        Returns:
            For each image uint8 ``[H, W, 3]``, RGB, on the device, or the reason why there is none.

        Raises:
            UserError: DALI decodes no image at all on this device.
        """
        assert all(min(size) > 0 for size in sizes)
        found: list[Tensor | Rejected | None] = [None] * len(images)
        checked = []
        for index, (data, size) in enumerate(zip(images, sizes, strict=True)):
            try:
                checked.append(_stored_image(index, data, size, self._limits))
            except Rejected as reason:
                found[index] = reason
        for batch in _batches(checked):
            for image, result in zip(batch, self._decoded(batch), strict=True):
                found[image.index] = result
        return found

    def _decoded(self, batch: list[_StoredImage]) -> list[Tensor | Rejected]:
        """Decode a batch.

        One bad image makes the whole pipeline fail, so the batch is halved until the image is alone.
        """
        try:
            with _remarks_kept_back() as remarks:
                outputs = self._run(batch)
        except Exception as error:  # DALI has no exceptions of its own, and passes on those of C++.
            self._pipeline = self._built()
            if len(batch) == 1:
                return [self._rejection(batch[0], remarks[0] if remarks else one_line(error))]
        else:
            return self._copies(outputs, batch)
        half = len(batch) // 2
        return self._decoded(batch[:half]) + self._decoded(batch[half:])

    def _rejection(self, image: _StoredImage, reason: str) -> Rejected:
        try:
            # Without this, a broken installation would reject a whole data set, image by image.
            self._run([_stored_image(0, _KNOWN_GOOD, (1, 1))])
        except Exception:
            raise UserError(f"DALI does not decode on {self._device}: {reason}") from None
        return Rejected(f"DALI does not decode this {image.header.format} image ({reason})")

    def _run(self, batch: list[_StoredImage]) -> Any:
        (outputs,) = self._pipeline.run(
            # Without metadata: DALI gets what was checked.
            encoded=[np.frombuffer(image.header.essential, dtype=np.uint8) for image in batch],
            size=[np.array(image.size, dtype=np.float32) for image in batch],
        )
        return outputs

    def _copies(self, outputs: Any, batch: list[_StoredImage]) -> list[Tensor]:
        copies = [
            _upright(torch.from_dlpack(output), image.header.orientation)
            for image, output in zip(batch, outputs, strict=True)
        ]
        if self._device.type != "cpu":
            # DALI owns the outputs' memory, and may reuse it when they are deleted. This may be any thread.
            platform.synchronize(self._device)
        return copies

    def _built(self) -> Any:
        return start(_decoding_pipeline(self._device, self._threads), self._device)


class _StoredImage(NamedTuple):
    """One image: its index in the call, the wanted size as stored, and its header."""

    index: int
    size: tuple[int, int]
    header: Header


def _stored_image(index: int, data: bytes, size: tuple[int, int], limits: ImageLimits = DEFAULT_LIMITS) -> _StoredImage:
    header = read_header(data, limits)
    return _StoredImage(index, size[::-1] if header.orientation >= 5 else size, header)


def _batches(checked: list[_StoredImage]) -> Iterator[list[_StoredImage]]:
    batch, pixels = [], 0
    for image in checked:
        more = image.header.height * image.header.width
        if batch and (len(batch) == BATCH or pixels + more > _BATCH_PIXELS):
            yield batch
            batch, pixels = [], 0
        batch.append(image)
        pixels += more
    if batch:
        yield batch


def _decoding_pipeline(device: torch.device, threads: int) -> Any:
    fn, types = installed().fn, installed().types
    # Ranks share the CPU's cores, so threads are not bound to them.
    on_cpu = device.type == "cpu"
    decoder = {"device": "cpu"} if on_cpu else {"device": "mixed", "affine": False, "jpeg_fancy_upsampling": True}
    with new_pipeline(device, BATCH, threads) as pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
        # Upright is made here afterwards, by the same reading of EXIF that gave the size.
        pixels = fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=False, **decoder)
        pipeline.set_outputs(fn.resize(pixels, size=size, interp_type=types.INTERP_CUBIC, antialias=True))
    return pipeline


def _upright(pixels: Tensor, orientation: int) -> Tensor:
    """Return a copy of uint8 ``[H, W, 3]``, turned upright."""
    turned = pixels.transpose(0, 1) if orientation >= 5 else pixels
    return turned.flip(_FLIPS[orientation]).contiguous()


@contextmanager
def _remarks_kept_back() -> Iterator[list[str]]:
    """Collect what the decoding libraries print about an image. Other output in the meantime is printed afterwards.

    The libraries write to the process's standard error themselves, and have no setting that prevents it.
    """
    remarks: list[str] = []
    try:
        terminal = os.dup(_STDERR)
    except OSError:  # Standard error is closed.
        yield remarks
        return
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), _STDERR)
        try:
            yield remarks
        finally:
            os.dup2(terminal, _STDERR)
            os.close(terminal)
            file.seek(0)
            _sort_out(file.read(), remarks)


def _sort_out(printed: bytes, remarks: list[str]) -> None:
    for line in printed.splitlines(keepends=True):
        if _REMARK.search(line):
            remarks.append(one_line(_COLOUR.sub("", line.decode(errors="replace"))))
        else:
            os.write(_STDERR, line)
