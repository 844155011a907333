"""Decoding by DALI. Oracle: Pillow's pixels, exactly; and Pillow's bicubic interpolation, in float and in bytes."""

import builtins
import io
import os
import threading

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("nvidia.dali")

from PIL import Image, ImageOps

from megatron_cca.data import dali_images
from megatron_cca.data.dali_images import ImageDecoder
from megatron_cca.data.image_headers import ImageLimits, Rejected
from megatron_cca.errors import UserError
from tests.unit.test_images import ALLOWED, HEIGHT, WIDTH, allowed, chunk, encoded, exif, picture

CPU = torch.device("cpu")
LARGE = allowed(picture(300, 400))
# Judged sound, but DALI does not decode it: a chunk that claims to be indispensable.
_PNG = ALLOWED["PNG rgb"]
ONLY_PILLOW = _PNG[:33] + chunk(b"GLTE", b"") + _PNG[33:]


@pytest.fixture(scope="module")
def decoder():
    return ImageDecoder(CPU, threads=1)


def upright(data):
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def bicubic(image, size):
    """Pillow's, in float32 until the end."""
    bands = [np.asarray(band, dtype=np.float32) for band in image.split()]
    resized = [np.asarray(Image.fromarray(band).resize(size[::-1], Image.Resampling.BICUBIC)) for band in bands]
    return np.stack(resized, -1).clip(0, 255)


def difference(found, expected):
    return np.abs(found.numpy().astype(np.float32) - np.asarray(expected, dtype=np.float32))


def test_without_resizing_the_pixels_are_pillows(decoder):
    found = decoder.decode(list(ALLOWED.values()), [(HEIGHT, WIDTH)] * len(ALLOWED))
    for name, pixels in zip(ALLOWED, found, strict=True):
        assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
        assert (pixels.numpy() == np.asarray(upright(ALLOWED[name]))).all(), name


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_upright_is_pillows_upright(form, decoder):
    images = [encoded(picture(), form, exif=exif(orientation)) for orientation in range(1, 9)]
    for data, pixels in zip(images, decoder.decode(images, [upright(data).size[::-1] for data in images]), strict=True):
        assert (pixels.numpy() == np.asarray(upright(data))).all()


@pytest.mark.parametrize("size", [(150, 200), (97, 211), (600, 800), (450, 331)])
def test_resizing_is_pillows_bicubic(size, decoder):
    """Half a grey level is rounding; only at the borders, which DALI repeats and Pillow leaves out, is there more."""
    names = ["JPEG rgb", "PNG palette", "PNG rgba", "WebP rgb", "BMP grey", "PNG 1-bit"]
    found = decoder.decode([LARGE[name] for name in names], [size] * len(names))
    for name, pixels in zip(names, found, strict=True):
        image = upright(LARGE[name])
        exact = difference(pixels, bicubic(image, size))
        assert exact[12:-12, 12:-12].max() < 0.8, name
        assert exact.mean() < 0.5
        in_bytes = difference(pixels, image.resize(size[::-1], Image.Resampling.BICUBIC))
        # Pillow cuts off at 0 and 255 between its two passes, which dithering makes felt.
        assert in_bytes.mean() < (3.5 if name == "PNG 1-bit" else 0.3), name


def test_turned_images_are_resized_upright(decoder):
    images = [encoded(picture(300, 400), "JPEG", exif=exif(orientation)) for orientation in (3, 5, 6, 7, 8)]
    for data, pixels in zip(images, decoder.decode(images, [(97, 211)] * len(images)), strict=True):
        assert difference(pixels, bicubic(upright(data), (97, 211)))[12:-12, 12:-12].max() < 0.8


def test_any_number_of_images_each_with_its_size(decoder):
    assert decoder.decode([], []) == []
    names = list(ALLOWED) * 5
    assert len(names) > 2 * dali_images.BATCH
    sizes = [(1 + 3 * index % 50, 1 + 7 * index % 60) for index in range(len(names))]
    found = decoder.decode([ALLOWED[name] for name in names], sizes)
    assert [tuple(pixels.shape) for pixels in found] == [(*size, 3) for size in sizes]


def test_a_call_gets_its_own_images_and_keeps_them(decoder):
    black, white = (encoded(Image.new("RGB", (9, 7), shade), "PNG") for shade in ("black", "white"))
    first = decoder.decode([black] * 3, [(7, 9)] * 3)
    second = decoder.decode([white] * 2, [(20, 30)] * 2)
    third = decoder.decode([black], [(7, 9)])
    assert [int(pixels.min()) for pixels in first + second + third] == [0, 0, 0, 255, 255, 0]
    assert [int(pixels.max()) for pixels in first + second + third] == [0, 0, 0, 255, 255, 0]


def test_bad_images_are_told_and_the_others_delivered(decoder, capfd):
    good = ALLOWED["JPEG rgb"]
    images = [good, ONLY_PILLOW, good, b"", good, ONLY_PILLOW, good, b"<html>"]
    pipeline = decoder._pipeline
    found = decoder.decode(images, [(HEIGHT, WIDTH)] * len(images))
    assert decoder._pipeline is not pipeline
    assert [isinstance(result, Rejected) for result in found] == [False, True] * 4
    assert str(found[1]) == "DALI does not decode this PNG image (libpng error: GLTE: unhandled critical chunk)"
    assert str(found[3]) == "the file is empty"
    for result in (*found[::2], *decoder.decode([good], [(HEIGHT, WIDTH)])):
        assert (result.numpy() == np.asarray(upright(good))).all()
    assert capfd.readouterr() == ("", "")


def test_libjpegs_remarks_stay_off_the_terminal_and_others_do_not(decoder, capfd, monkeypatch):
    jpeg = ALLOWED["JPEG rgb"]
    run = decoder._run

    def run_beside_another_thread(batch):
        thread = threading.Thread(target=os.write, args=(2, b"from elsewhere\n"))
        thread.start()
        thread.join()
        return run(batch)

    monkeypatch.setattr(decoder, "_run", run_beside_another_thread)
    (pixels,) = decoder.decode([jpeg[:-2] + b"\0\0\0" + jpeg[-2:]], [(HEIGHT, WIDTH)])
    assert (pixels.numpy() == np.asarray(upright(jpeg))).all()
    assert capfd.readouterr() == ("", "from elsewhere\n")


def test_large_images_are_not_in_memory_together(decoder, monkeypatch):
    run, batches = decoder._run, []
    monkeypatch.setattr(decoder, "_run", lambda batch: batches.append(len(batch)) or run(batch))
    decoder.decode([ALLOWED["JPEG rgb"]] * 70, [(5, 5)] * 70)
    assert batches == [32, 32, 6]
    batches.clear()
    monkeypatch.setattr(dali_images, "_BATCH_PIXELS", 2 * HEIGHT * WIDTH)
    decoder.decode([ALLOWED["JPEG rgb"]] * 5 + [LARGE["JPEG rgb"]] * 2, [(5, 5)] * 7)
    assert batches == [2, 2, 1, 1, 1]


def test_the_limits_are_the_callers():
    decoder = ImageDecoder(CPU, threads=1, limits=ImageLimits(max_pixels=HEIGHT * WIDTH - 1))
    (reason,) = decoder.decode([ALLOWED["JPEG rgb"]], [(5, 5)])
    assert "at most 2239 pixels are read" in str(reason)


def test_a_dali_that_decodes_nothing_is_an_error_and_not_a_rejection(monkeypatch):
    decoder = ImageDecoder(CPU, threads=1)

    def fail(batch):
        raise RuntimeError("Critical error\nencountered:\n\nno memory\nCurrent pipeline object is no longer valid.")

    monkeypatch.setattr(decoder, "_run", fail)
    with pytest.raises(UserError, match=r"^DALI does not decode on cpu: no memory$"):
        decoder.decode([ALLOWED["JPEG rgb"]], [(5, 5)])


def test_whatever_thread_decodes_waits_for_the_device_of_its_copies(monkeypatch):
    """The current device of a thread is the machine's first GPU, not its rank's."""
    decoder, waited = ImageDecoder(CPU, threads=1), []
    monkeypatch.setattr(decoder, "_device", torch.device("cuda", 3))
    monkeypatch.setattr(dali_images.platform, "synchronize", lambda *device: waited.append(device))
    decoder.decode([ALLOWED["JPEG rgb"]], [(5, 5)])
    assert waited == [(torch.device("cuda", 3),)]


def test_a_missing_dali_says_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def without_dali(name, *args, **options):
        if name.startswith("nvidia"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without_dali)
    with pytest.raises(UserError, match=r"needs NVIDIA DALI; pip install 'megatron-cca\[data\]'"):
        ImageDecoder(CPU)


def test_a_gpu_that_is_not_there_is_said_in_one_line():
    with pytest.raises(UserError, match=r"^DALI does not start on cuda:0: ") as error:
        ImageDecoder(torch.device("cuda", 0))
    assert "\n" not in str(error.value)
