"""Judging an encoded image before it is decoded: whether it is of a kind that is used, and all of it is there."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

from megatron_cca.data.image_headers import DEFAULT_LIMITS, Header, ImageLimits, Rejected, read_header
from megatron_cca.errors import UserError


def judge(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> tuple[int, int]:
    """Whether an image can be used: header, completeness, and whatever damage Pillow finds by decoding it.

    Grey, palette, 1-bit and alpha images are fine; alpha is dropped.

    Args:
        data: an encoded image.
        limits: of size.

    Returns:
        Height and width in pixels as displayed, with EXIF's orientation applied.

    Raises:
        Rejected: empty, of another format, damaged, cut short, CMYK, more than 8 bits deep, animated, without pixels,
            or over the limits.
    """
    header = read_header(data, limits)
    _decode(header)
    return header.displayed


def _decode(header: Header) -> None:
    opener = _pillow()[header.format]
    try:
        with opener(BytesIO(header.essential)) as image:
            if image.size != (header.width, header.height):
                raise ValueError(f"its parts disagree on its size, {image.size} and {(header.width, header.height)}")
            # For JPEG: all of the stream is read, an eighth of the size is computed.
            image.draft("RGB", (1, 1))
            image.load()
    except Exception as error:  # Pillow promises no closed set of exceptions for damaged files.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Rejected(f"the {header.format} image is damaged ({reason})") from None


def _pillow() -> dict[str, Callable]:
    # Not Image.open: its limit on pixels is a global that others may have changed, and it prints warnings.
    try:
        from PIL.BmpImagePlugin import BmpImageFile
        from PIL.JpegImagePlugin import JpegImageFile
        from PIL.PngImagePlugin import PngImageFile
        from PIL.WebPImagePlugin import WebPImageFile
    except ImportError:
        raise UserError("reading images needs Pillow; pip install -e '.[data]'") from None
    return {"JPEG": JpegImageFile, "PNG": PngImageFile, "WebP": WebPImageFile, "BMP": BmpImageFile}
