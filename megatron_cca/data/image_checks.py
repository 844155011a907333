"""Check an encoded image before it is used: is its format supported, and is the file whole?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING

from megatron_cca.data.image_headers import DEFAULT_LIMITS, Header, ImageLimits, Rejected, read_header
from megatron_cca.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image


def check_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS, *, upright: bool = True) -> tuple[int, int]:
    """Check that an image can be used, and return its size. Pillow decodes it to find damage.

    Grey, palette, 1-bit and alpha images are accepted. Alpha is dropped.

    Args:
        data: an encoded image.
        limits: of an image.
        upright: whether EXIF's orientation applies.

    Returns:
        Height and width in pixels, as displayed or as stored.

    Raises:
        Rejected: empty, of another format, damaged, cut short, CMYK unless the limits allow it, more than 8 bits deep,
            animated, without pixels, or over the limits.
    """
    header = read_header(data, limits)
    with _opened(header) as image:
        # A JPEG is read completely, but decoded at an eighth of its size.
        image.draft("RGB", (1, 1))
        image.load()
    return header.displayed if upright else (header.height, header.width)


def stored_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Image:
    """Decode an image and convert it to RGB as Pillow does. EXIF's orientation is ignored and alpha is dropped.

    Args:
        data: an encoded image.
        limits: of an image.

    Raises:
        Rejected: as :func:`check_image`.
    """
    with _opened(read_header(data, limits)) as image:
        return image.convert("RGB")


@contextmanager
def _opened(header: Header) -> Iterator[Image]:
    opener = _pillow()[header.format]
    try:
        with opener(BytesIO(header.essential)) as image:
            if image.size != (header.width, header.height):
                raise ValueError(f"its parts disagree on its size, {image.size} and {(header.width, header.height)}")
            yield image
    except Exception as error:  # Pillow promises no closed set of exceptions for damaged files.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Rejected(f"the {header.format} image is damaged ({reason})") from None


def _pillow() -> dict[str, Callable]:
    # Not Image.open: its limit on pixels is a global that other code may change, and it prints warnings.
    try:
        from PIL.BmpImagePlugin import BmpImageFile
        from PIL.JpegImagePlugin import JpegImageFile
        from PIL.PngImagePlugin import PngImageFile
        from PIL.WebPImagePlugin import WebPImageFile
    except ImportError:
        raise UserError("reading images needs Pillow; pip install -e '.[data]'") from None
    return {"JPEG": JpegImageFile, "PNG": PngImageFile, "WebP": WebPImageFile, "BMP": BmpImageFile}
