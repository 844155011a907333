"""Judging encoded images. Oracle: Pillow, which made them, says their size; what was spoilt was spoilt here."""

import io
import re
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("PIL")

from PIL import Image, ImageFile, ImageOps

from megatron_cca.data.image_headers import ImageLimits, Rejected, check_image, read_header

HEIGHT, WIDTH = 40, 56


def picture(height=HEIGHT, width=WIDTH, seed=0):
    """Waves, an edge and noise: RGB."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([127 + 100 * np.sin(x / 7 + y / 11), 127 + 100 * np.cos(y / 5), x * 255 / width], -1)
    pixels[height // 3 : height // 2, width // 3 : width // 2] = [255, 0, 0]
    pixels += np.random.default_rng(seed).normal(0, 6, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def exif(orientation, order="<", kind=3):
    start = b"Exif\0\0" + (b"II*\0" if order == "<" else b"MM\0*")
    return start + struct.pack(f"{order}IHHHIHHI", 8, 1, 0x0112, kind, 1, orientation, 0, 0)


def by_adobes_word(jpeg):
    """An RGB JPEG whose components do not say that they are R, G and B: only Adobe's segment does."""
    assert b"Adobe" in jpeg and b"R\x11\0G\x11\0B\x11\0" in jpeg and b"\3R\0G\0B\0" in jpeg
    jpeg = jpeg.replace(b"R\x11\0G\x11\0B\x11\0", b"\1\x11\0\2\x11\0\3\x11\0")
    return jpeg.replace(b"\3R\0G\0B\0", b"\3\1\0\2\0\3\0")


def allowed(image):
    """Every mode that is allowed, by name."""
    grey, alpha = image.convert("L"), image.copy()
    alpha.putalpha(grey)
    grey_alpha = grey.copy()
    grey_alpha.putalpha(grey.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    modes = {"rgb": image, "grey": grey, "palette": image.quantize(32), "rgba": alpha, "1-bit": image.convert("1")}
    found = {f"{form} {mode}": encoded(modes[mode], form) for form in ("PNG", "BMP") for mode in modes}
    found |= {f"JPEG {mode}": encoded(modes[mode], "JPEG", quality=90) for mode in ("rgb", "grey")}
    found |= {f"WebP {mode}": encoded(modes[mode], "WEBP") for mode in ("rgb", "rgba")}
    return found | {
        "JPEG progressive": encoded(image, "JPEG", progressive=True),
        "JPEG 4:4:4": encoded(image, "JPEG", subsampling=0),
        "JPEG of RGB": encoded(image, "JPEG", keep_rgb=True),
        "JPEG of RGB, says Adobe": by_adobes_word(encoded(image, "JPEG", keep_rgb=True)),
        "WebP lossless": encoded(alpha, "WEBP", lossless=True, exact=True),
        "PNG grey and alpha": encoded(grey_alpha, "PNG"),
        "PNG 4-bit": encoded(grey, "PNG", bits=4),
        "PNG palette, one transparent": encoded(modes["palette"], "PNG", transparency=3),
        "PNG grey, one transparent": encoded(grey, "PNG", transparency=127),
        "JPEG beside another": encoded(image, "MPO", save_all=True, append_images=[image]),
    }


ALLOWED = allowed(picture())


def with_checksums(png):
    """Right checksums for whatever stands there, so that damage is found inside."""
    out, position = bytearray(png), 8
    while position + 12 <= len(out):
        end = position + 12 + struct.unpack_from(">I", out, position)[0]
        if end > len(out):
            break
        struct.pack_into(">I", out, end - 4, zlib.crc32(out[position + 4 : end - 4]))
        position = end
    return bytes(out)


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def reason(data, *limits):
    with warnings.catch_warnings(), pytest.raises(Rejected) as error:
        warnings.simplefilter("error")
        check_image(data, *limits)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ALLOWED)
def test_what_is_allowed_has_pillows_size(name):
    assert check_image(ALLOWED[name]) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(10))
def test_the_size_is_the_upright_one(form, order, orientation):
    data = encoded(picture(), form, exif=exif(orientation, order))
    assert check_image(data) == ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size[::-1]


@pytest.mark.parametrize("length", range(6, 26, 3))
def test_damaged_exif_is_no_exif(length):
    assert check_image(encoded(picture(), "JPEG", exif=exif(6)[:length])) == (HEIGHT, WIDTH)
    assert check_image(encoded(picture(), "JPEG", exif=exif(6, kind=7))) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_the_metadata_goes_no_further(form):
    data = encoded(picture(), form, exif=exif(6), icc_profile=b"profile")
    kept = read_header(data).essential
    assert len(kept) < len(data) and b"MM\0*" not in kept and b"II*\0" not in kept and b"profile" not in kept


def test_the_first_exif_counts():
    data = encoded(picture(), "JPEG", exif=exif(8))
    first = b"\xff\xe1" + struct.pack(">H", 2 + len(exif(6))) + exif(6)
    assert read_header(data[:2] + first + data[2:]).orientation == 6


SIXTEEN = Image.fromarray(np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH))
SEVERAL = {"save_all": True, "append_images": [picture(seed=1)]}
REFUSED = {
    "empty": (b"", "the file is empty"),
    "text": (b"<html>404</html>", r"not an image \(begins with b'<html>40'\); only JPEG, PNG, WebP and BMP are read"),
    "GIF": (encoded(picture(), "GIF"), "a GIF image; only JPEG, PNG"),
    "animated GIF": (encoded(picture(), "GIF", **SEVERAL), "a GIF image; only JPEG, PNG"),
    "TIFF": (encoded(picture(), "TIFF"), "a TIFF image; only"),
    "float TIFF": (encoded(picture().convert("F"), "TIFF"), "a TIFF image; only"),
    "JPEG 2000": (encoded(picture(), "JPEG2000"), "a JPEG 2000 image; only"),
    "CMYK": (encoded(picture().convert("CMYK"), "JPEG"), "a CMYK or YCCK JPEG image"),
    "16-bit PNG": (encoded(SIXTEEN, "PNG"), "a 16-bit PNG image; at most 8 bits are read"),
    "animated PNG": (encoded(picture(), "PNG", **SEVERAL), "an animated PNG image"),
    "animated WebP": (encoded(picture(), "WEBP", **SEVERAL), "an animated WebP image"),
    "12-bit JPEG": (b"\xff\xd8\xff\xc1\0\x0b\x0c\0\x08\0\x08\1\1\x11\0", "a 12-bit JPEG image"),
    "lossless JPEG": (b"\xff\xd8\xff\xc3\0\x0b\x08\0\x08\0\x08\1\1\x11\0", "a kind that is not read .marker 0xc3"),
    "JPEG of two frames": (b"\xff\xd8" + b"\xff\xc0\0\x0b\x08\0\x08\0\x08\1\1\x11\0" * 2, "two frames"),
    "JPEG without a frame": (b"\xff\xd8\xff\xda\0\2\xff\xd9", "no frame"),
    "JPEG of ends": (b"\xff\xd8\xff\xd9\xff\xd9", "marker 0xd9"),
    "JPEG without lengths": (b"\xff\xd8\xff\xe0\0\0" * 9, "the segment at byte 2 has no length"),
    "PNG without a header": (b"\x89PNG\r\n\x1a\n" + chunk(b"IEND", b""), "its header is not in the first place"),
    "16-bit BMP": (b"BM" + struct.pack("<3I3I2H6I", 0, 0, 54, 40, 2, 2, 1, 16, 0, 0, 0, 0, 0, 0), "16 bits, compress"),
    "OS/2 BMP": (b"BM" + struct.pack("<3II4H", 0, 0, 26, 12, 2, 2, 1, 24), "a header of 12 bytes"),
    "BMP of header": (b"BM" + struct.pack("<3I3I2H6I", 0, 0, 0, 40, 2, 2, 1, 24, 0, 0, 0, 0, 0, 0), "begin inside it"),
    "WebP with a hidden animation": (b"RIFF\x0c\0\0\0WEBPANIM\0\0\0\0", "an animated WebP image"),
    "JPEG with a short table": (
        ALLOWED["JPEG rgb"][:2] + b"\xff\xdb\0\4\0\0" + ALLOWED["JPEG rgb"][2:],
        "JPEG image is damaged .bad quantization table",
    ),
    "empty WebP": (b"RIFF\4\0\0\0WEBP", "it holds no image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_each_refusal_says_what_was_found(name):
    data, expected = REFUSED[name]
    assert re.search(expected, reason(data)), reason(data)


@pytest.mark.parametrize(
    "name", ["JPEG rgb", "JPEG progressive", "PNG rgb", "BMP palette", "WebP rgb", "WebP lossless"]
)
@pytest.mark.parametrize("tolerant", [False, True])
def test_a_file_cut_anywhere_is_refused(name, tolerant, monkeypatch):
    """Whatever others have told Pillow about truncated files."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    data = ALLOWED[name]
    for length in sorted({*range(0, len(data), 1 + len(data) // 150), *range(len(data) - 12, len(data))}):
        assert reason(data[:length])
        with pytest.raises(Rejected):
            read_header(data[:length])


def test_damage_inside_is_found():
    for name in ("PNG rgb", "WebP lossless", "JPEG progressive"):
        data = bytearray(ALLOWED[name])
        data[len(data) // 2 : len(data) // 2 + 40] = b"\xff\xc4" * 20
        assert "damaged" in reason(with_checksums(data) if name == "PNG rgb" else bytes(data))
    png = bytearray(ALLOWED["PNG rgb"])
    png[len(png) // 2] ^= 1
    assert "wrong checksum" in reason(bytes(png))


def sized(form, height, width):
    """A bomb: the header of a small file, changed."""
    data = bytearray(ALLOWED[f"{form} rgb"])
    if form == "PNG":
        struct.pack_into(">II", data, 16, width, height)
        return with_checksums(data)
    if form == "JPEG":
        struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, height, width)
        return bytes(data)
    struct.pack_into("<HH", data, data.index(b"\x9d\x01\x2a") + 3, width, height)
    return bytes(data)


@pytest.mark.parametrize(("form", "side"), [("PNG", 2**31 - 1), ("JPEG", 65535), ("WebP", 16383)])
def test_a_bomb_is_known_by_its_header(form, side, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    assert f"the {form} image is {side} x {side}; at most 100000000 pixels are read" in reason(sized(form, side, side))
    if form != "WebP":  # Pillow's own limit for WebP cannot be got round.
        assert check_image(ALLOWED[f"{form} rgb"]) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WebP"])
def test_an_image_without_pixels_is_refused(form):
    assert f"the {form} image has no pixels: 0 x 9" in reason(sized(form, 9, 0))


def test_the_limits_are_the_callers():
    data = ALLOWED["PNG rgb"]
    assert check_image(data, ImageLimits(HEIGHT * WIDTH, len(data))) == (HEIGHT, WIDTH)
    assert "at most 2239 pixels" in reason(data, ImageLimits(HEIGHT * WIDTH - 1))
    assert f"has {len(data)} bytes; at most {len(data) - 1}" in reason(data, ImageLimits(max_bytes=len(data) - 1))


def test_endless_scans_are_refused():
    data = ALLOWED["JPEG progressive"]
    scan = data.rindex(b"\xff\xda")
    assert "scans; at most 256" in reason(data[:scan] + data[scan:-2] * 300 + data[-2:])


def others(form):
    """What programs write behind an image's end, by name; none of it is the image's."""
    random = np.random.default_rng(0)
    other = picture(80, 20, seed=1)
    # As many start-of-scan and end-of-image markers as an hour of video has by chance.
    video = b"\0\0\0\x18ftypmp42" + random.bytes(9000) + b"\xff\xda\0\0\xff\xd9" * 400
    chunks = chunk(b"acTL", bytes(8)) + chunk(b"eXIf", exif(6)[6:]) + chunk(b"IEND", b"")
    return {
        "the video of a motion photo": video,
        "zeros of a card's last block": bytes(4096),
        "a zip archive": b"PK\3\4" + random.bytes(500) + b"PK\5\6" + bytes(18),
        "another image of that format": encoded(other, form),
        "an animation": encoded(picture(), "WEBP", **SEVERAL) + b"ANIM\6\0\0\0" + bytes(6),
        "a JPEG turned by EXIF": encoded(other, "JPEG", exif=exif(6)),
        "chunks of a PNG": chunks,
        "half a marker": b"\xff",
    }


@pytest.mark.parametrize("name", ALLOWED)
@pytest.mark.parametrize("turned", [False, True])
def test_what_stands_behind_an_images_end_is_not_the_images(name, turned):
    data, form = ALLOWED[name], name.split()[0]
    if turned and form not in ("BMP", "WebP"):
        data = encoded(Image.open(io.BytesIO(data)), form, exif=exif(6))
    size, kept = check_image(data), read_header(data)
    for what, other in others(form).items():
        assert check_image(data + other) == size, what
        header = read_header(data + other)
        assert header.orientation == kept.orientation, what
        assert header.essential == kept.essential, what
        # What is appended does not count against the limit on bytes.
        assert check_image(data + other, ImageLimits(max_bytes=len(data))) == size, what
    with Image.open(io.BytesIO(kept.essential)) as image, Image.open(io.BytesIO(data)) as whole:
        assert (np.asarray(image.convert("RGB")) == np.asarray(whole.convert("RGB"))).all()


@pytest.mark.parametrize("name", ["JPEG rgb", "JPEG progressive", "PNG rgb"])
def test_what_stands_behind_does_not_complete_an_image(name):
    """A file cut short, with something behind the cut that has the marker or bytes that the image lacks."""
    data = ALLOWED[name]
    for what, other in others(name.split()[0]).items():
        for length in range(len(data) // 4, len(data) - 20, len(data) // 9):
            assert reason(data[:length] + other), (what, length)


def test_a_marker_inside_a_scan_is_damage():
    data = ALLOWED["JPEG rgb"]
    middle = data.index(b"\xff\xda") + 200
    assert "marker 0x42 at byte" in reason(data[:middle] + b"\xff\x42" + data[middle:])
    assert "another image begins at byte" in reason(data[:middle] + data)
    assert "the segment at byte" in reason(data[:middle] + b"\xff\xfe\0\1" + data[middle:])
    # Filling and a comment between scans are none.
    progressive = ALLOWED["JPEG progressive"]
    scan = progressive.rindex(b"\xff\xda")
    comment = b"\xff\xff\xfe\0\x08" + b"\xff\xd9\xff\xda\xff\xd8"
    assert check_image(progressive[:scan] + comment + progressive[scan:]) == (HEIGHT, WIDTH)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(ALLOWED)), st.binary(max_size=60), st.randoms(use_true_random=False))
def test_nothing_but_a_rejection_comes_out(name, noise, chance):
    data = bytearray(ALLOWED[name])
    for byte in noise[: chance.choice((2, 8, 60))]:
        data[int(len(data) * chance.random() ** chance.choice((1, 4)))] = byte
    for spoilt in (bytes(data), with_checksums(data), bytes(noise), data[: chance.choice((2, 8, 16))] + noise):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                height, width = check_image(bytes(spoilt))
                assert height > 0 < width
            except Rejected as error:
                assert "\n" not in str(error)


def test_threads_do_not_disturb_each_other():
    names = sorted(ALLOWED) * 6
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda name: check_image(ALLOWED[name]), names)) == {(HEIGHT, WIDTH)}
