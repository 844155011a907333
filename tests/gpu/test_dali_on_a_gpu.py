"""One GPU: images decoded by nvJPEG and resized there, against Pillow."""

import io

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("nvidia.dali")

from PIL import Image, ImageOps

from megatron_cca import platform
from megatron_cca.data.image_headers import Rejected
from tests.unit.test_images import allowed, chunk, encoded, exif, picture

pytestmark = [pytest.mark.gpu, pytest.mark.needs_hardware("nvJPEG")]


@pytest.fixture(scope="module")
def decoder():
    from megatron_cca.data.dali_images import ImageDecoder

    return ImageDecoder(platform.device())


def expected(data, size):
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC), dtype=np.float32)


@pytest.mark.parametrize("size", [(300, 400), (150, 200), (97, 211), (600, 800)])
def test_every_kind_is_near_pillows(size, decoder):
    """nvJPEG rounds otherwise than libjpeg, by a grey level or so; the other formats are decoded on the CPU."""
    images = allowed(picture(300, 400))
    images |= {f"turned {turn}": encoded(picture(300, 400), "JPEG", exif=exif(turn)) for turn in range(1, 9)}
    found = decoder.decode(list(images.values()), [size] * len(images))
    for (name, data), pixels in zip(images.items(), found, strict=True):
        assert pixels.device == platform.device() and pixels.dtype == torch.uint8
        assert tuple(pixels.shape) == (*size, 3)
        mean = np.abs(pixels.cpu().numpy().astype(np.float32) - expected(data, size)).mean()
        assert mean < (3.5 if "1-bit" in name else 1.5 if "JPEG" in name or "turned" in name else 0.5), name


def test_results_outlive_the_calls_after_them(decoder):
    shades = [encoded(Image.new("RGB", (640, 480), (shade,) * 3), "PNG") for shade in range(0, 256, 5)]
    found = [decoder.decode([data] * 8, [(480, 640)] * 8) for data in shades]
    for shade, batch in zip(range(0, 256, 5), found, strict=True):
        assert all(bool((pixels == shade).all()) for pixels in batch)


def test_a_bad_image_does_not_end_the_decoder(decoder):
    good, png = (encoded(picture(), form) for form in ("JPEG", "PNG"))
    found = decoder.decode([good, png[:33] + chunk(b"GLTE", b"") + png[33:], good, b""], [(40, 56)] * 4)
    assert [isinstance(result, Rejected) for result in found] == [False, True, False, True]
    assert not isinstance(decoder.decode([good], [(40, 56)])[0], Rejected)
