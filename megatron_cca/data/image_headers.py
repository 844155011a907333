"""Read the header of an encoded image without decoding it, and check that the file is whole and its format known.

Headers are read here and not by Pillow. A decompression bomb is therefore found before any memory is allocated. Pillow
gets no metadata, on which it prints warnings, and its own global limits do not matter. The end of an image is found,
too. Phones and other programs append a video, an archive or a second image, which no later step sees. Any thread may
call everything here.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

from megatron_cca.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

READ_HERE = "JPEG, PNG, WebP and BMP are read"
_OTHER_FORMATS = (
    (0, b"GIF8", "a GIF image"),
    (0, b"II*\0", "a TIFF image"),
    (0, b"MM\0*", "a TIFF image"),
    (4, b"ftypavi", "an AVIF image"),
    (4, b"ftyp", "a HEIC image or a video"),
    (4, b"jP  ", "a JPEG 2000 image"),
    (0, b"\0\0\1\0", "an icon"),
    (0, b"\xff\x0a", "a JPEG XL image"),
    (0, b"\xff\xd8", "a damaged JPEG image"),
)
_JPEG_PROCESSES = {0xC0: "baseline", 0xC1: "extended", 0xC2: "progressive"}
_JPEG_HUFFMAN, _JPEG_EXTENSION, _JPEG_ARITHMETIC = 0xC4, 0xC8, 0xCC
_JPEG_FRAMES = set(range(0xC0, 0xD0)) - {_JPEG_HUFFMAN, _JPEG_EXTENSION, _JPEG_ARITHMETIC}
_JPEG_BEGIN, _JPEG_END, _JPEG_SCAN, _JPEG_ADOBE, _JPEG_COMMENT = 0xD8, 0xD9, 0xDA, 0xEE, 0xFE
# Tables, the number of lines, the restart interval, and segments that may stand anywhere.
_JPEG_BETWEEN_SCANS = {_JPEG_HUFFMAN, _JPEG_ARITHMETIC, 0xDB, 0xDC, 0xDD, *range(0xE0, 0xF0), _JPEG_COMMENT}
# In a scan 0xFF 0x00 is a byte of data, and 0xD0 to 0xD7 count restarts. Any other marker ends the scan.
# (A pattern that begins with \xff+ is 30 times slower.)
_JPEG_MARKER, _JPEG_FILLING = re.compile(rb"\xff([^\x00\xd0-\xd7])"), re.compile(rb"\xff*")
# Limit for progressive images, as in DALI. Each scan is a pass over the whole image.
_JPEG_MAX_SCANS = 256
_BMP_UNCOMPRESSED, _BMP_BIT_FIELDS = 0, 3
_ORIENTATION, _SHORT = 0x0112, 3


class Rejected(Exception):
    """An image that is not used. The message is the reason, in words, for the list of skipped records."""


@dataclass(frozen=True)
class ImageLimits:
    """The limits of an image.

    Attributes:
        max_pixels: height times width.
        max_bytes: of the encoded image, without metadata.
        cmyk: whether a JPEG of four components is accepted. DALI does not read them.
    """

    max_pixels: int = 100_000_000
    max_bytes: int = 200_000_000
    cmyk: bool = False


DEFAULT_LIMITS = ImageLimits()


@dataclass(frozen=True)
class Header:
    """The facts in the header of an image file.

    Attributes:
        format: "JPEG", "PNG", "WebP" or "BMP".
        height, width: in pixels as stored, before ``orientation``.
        orientation: EXIF's, 1 to 8. It is 1 where there is none or it is damaged.
        essential: the encoded image, without its metadata and without bytes after its end.
        cmyk: whether it is a JPEG of four components.
    """

    format: str
    height: int
    width: int
    orientation: int
    essential: bytes
    cmyk: bool = False

    @property
    def displayed(self) -> tuple[int, int]:
        """Height and width after ``orientation`` is applied."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)


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


def read_header(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Header:
    """Parse the header of an image without decoding it.

    Raises:
        Rejected: as :func:`check_image`, except for damage inside the compressed stream.
    """
    if not data:
        raise Rejected("the file is empty")
    name, reader = _reader_of(data)
    try:
        header = reader(data)
    except (struct.error, IndexError):
        raise Rejected(f"the {name} file is cut short") from None
    if header.height < 1 or header.width < 1:
        raise Rejected(f"the {name} image has no pixels: {header.width} x {header.height}")
    if header.height * header.width > limits.max_pixels:
        raise Rejected(
            f"the {name} image is {header.width} x {header.height}; at most {limits.max_pixels} pixels are read"
        )
    if len(header.essential) > limits.max_bytes:
        raise Rejected(f"the {name} image has {len(header.essential)} bytes; at most {limits.max_bytes} are read")
    if header.cmyk and not limits.cmyk:
        raise Rejected("a CMYK or YCCK JPEG image (4 components); save it as RGB")
    return header


def _reader_of(data: bytes) -> tuple[str, Callable[[bytes], Header]]:
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG", _jpeg
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG", _png
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP", _webp
    if data.startswith(b"BM"):
        return "BMP", _bmp
    for offset, magic, what in _OTHER_FORMATS:
        if data.startswith(magic, offset):
            raise Rejected(f"{what}; only {READ_HERE}")
    raise Rejected(f"not an image (begins with {data[:8]!r}); only {READ_HERE}")


def _jpeg(data: bytes) -> Header:
    """Parse the segments up to the first scan, and find the end of the scans."""
    orientation, frame, kept = 1, None, [data[:2]]
    for marker, start, end in _jpeg_segments(data):
        body = data[start + 4 : end]
        if marker == 0xE1 and body.startswith(b"Exif\0\0") and orientation == 1:
            orientation = _exif_orientation(body[6:])
        if marker in _JPEG_FRAMES:
            if frame:
                raise Rejected("the JPEG header is damaged: it describes two frames")
            frame = _jpeg_frame(marker, body)
        # JFIF's and Adobe's segments say what the colours mean.
        if marker in (0xE0, _JPEG_ADOBE) or not (0xE0 <= marker <= 0xEF or marker == _JPEG_COMMENT):
            kept.append(data[start:end])
    if frame is None:
        raise Rejected("the JPEG header is damaged: it describes no frame")
    return Header("JPEG", *frame[:2], orientation, b"".join([*kept, data[end : _jpeg_end(data, end)]]), frame[2] == 4)


def _jpeg_end(data: bytes, position: int) -> int:
    """Return where the image ends. The data of its first scan begin at ``position``. Any bytes may follow the end."""
    scans = 1
    while scans <= _JPEG_MAX_SCANS:
        found = _JPEG_MARKER.search(data, position)
        if found is None:
            raise Rejected("the JPEG file is cut short: it has no end marker")
        marker, start = found[1][0], found.start()
        if marker == 0xFF:
            position = _JPEG_FILLING.match(data, start).end() - 1
            continue
        if marker == _JPEG_END:
            return found.end()
        if marker == _JPEG_BEGIN:
            raise Rejected(f"the JPEG file is cut short: another image begins at byte {start}, before this one's end")
        if marker != _JPEG_SCAN and marker not in _JPEG_BETWEEN_SCANS:
            raise Rejected(f"the JPEG image is damaged: marker {marker:#04x} at byte {start}")
        scans += marker == _JPEG_SCAN
        length = struct.unpack_from(">H", data, start + 2)[0]
        position = start + 2 + length
        if length < 2 or position > len(data):
            raise Rejected(f"the JPEG file is damaged or cut short: the segment at byte {start} has no end")
    raise Rejected(f"a JPEG image in more than {_JPEG_MAX_SCANS} scans; at most {_JPEG_MAX_SCANS} are read")


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of each segment. The scan's header is the last."""
    position, marker = 2, None
    while marker != _JPEG_SCAN:
        if data[position] != 0xFF:
            raise Rejected(f"the JPEG header is damaged: byte {position} is no marker")
        while data[position + 1] == 0xFF:
            position += 1
        marker = data[position + 1]
        if marker in (0, 1, _JPEG_END) or 0xD0 <= marker <= 0xD8:
            raise Rejected(f"the JPEG header is damaged: marker {marker:#04x} at byte {position}")
        end = position + 2 + struct.unpack_from(">H", data, position + 2)[0]
        if end < position + 4:
            raise Rejected(f"the JPEG header is damaged: the segment at byte {position} has no length")
        yield marker, position, end
        position = end


def _jpeg_frame(marker: int, body: bytes) -> tuple[int, int, int]:
    """Return height, width and number of components."""
    depth, height, width, components = struct.unpack_from(">BHHB", body)
    if depth != 8:
        raise Rejected(f"a {depth}-bit JPEG image; 8 bits are read")
    if components not in (1, 3, 4) or marker not in _JPEG_PROCESSES:
        raise Rejected(f"a JPEG image of a kind that is not read (marker {marker:#04x}, {components} components)")
    return height, width, components


def _png(data: bytes) -> Header:
    """Check every chunk and its checksum, from IHDR to IEND."""
    kind, position, orientation, kept = None, 8, 1, [data[:8]]
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + length + 12
        if zlib.crc32(memoryview(data)[position + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            raise Rejected(f"the PNG file is damaged: wrong checksum at byte {position}")
        if (kind == b"IHDR") != (position == 8):
            raise Rejected("the PNG file is damaged: its header is not in the first place")
        if kind == b"acTL":
            raise Rejected("an animated PNG image")
        if kind == b"eXIf":
            orientation = _exif_orientation(data[position + 8 : end - 4])
        # A lower-case first letter marks a chunk that can be left out.
        if kind[:1].isupper():
            kept.append(data[position:end])
        position = end
    width, height, depth = struct.unpack_from(">IIB", data, 16)
    if depth > 8:
        raise Rejected(f"a {depth}-bit PNG image; at most 8 bits are read")
    return Header("PNG", height, width, orientation, b"".join(kept))


def _webp(data: bytes) -> Header:
    chunks: dict[bytes, bytes] = {}
    for kind, body in _webp_chunks(data):
        chunks.setdefault(kind, body)
    extended = chunks.get(b"VP8X", b"\0")
    if b"ANIM" in chunks or b"ANMF" in chunks or extended[0] & 0x02:
        raise Rejected("an animated WebP image")
    height, width = _webp_size(chunks)
    orientation = _exif_orientation(chunks.get(b"EXIF", b"").removeprefix(b"Exif\0\0"))
    return Header("WebP", height, width, orientation, data[: _webp_end(data)])


def _webp_end(data: bytes) -> int:
    return struct.unpack_from("<I", data, 4)[0] + 8


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    end = _webp_end(data)
    if end > len(data):
        raise IndexError
    position = 12
    while position < end:
        kind, length = struct.unpack_from("<4sI", data, position)
        if position + 8 + length > end:
            raise IndexError
        yield kind, data[position + 8 : position + 8 + length]
        position += 8 + length + length % 2


def _webp_size(chunks: dict[bytes, bytes]) -> tuple[int, int]:
    if b"VP8X" in chunks:
        canvas = chunks[b"VP8X"]
        return 1 + int.from_bytes(canvas[7:10], "little"), 1 + int.from_bytes(canvas[4:7], "little")
    if b"VP8L" in chunks:
        (bits,) = struct.unpack_from("<I", chunks[b"VP8L"], 1)
        return 1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF)
    if b"VP8 " in chunks:
        width, height = struct.unpack_from("<HH", chunks[b"VP8 "], 6)
        return height & 0x3FFF, width & 0x3FFF
    raise Rejected("the WebP file is damaged: it holds no image")


def _bmp(data: bytes) -> Header:
    offset, header_size = struct.unpack_from("<II", data, 10)
    if header_size < 40:
        raise Rejected(f"a BMP image of a kind that is not read (a header of {header_size} bytes)")
    width, height, _, depth, compression = struct.unpack_from("<iiHHI", data, 18)
    if depth not in (1, 4, 8, 24, 32) or compression not in (_BMP_UNCOMPRESSED, _BMP_BIT_FIELDS):
        raise Rejected(f"a BMP image of a kind that is not read ({depth} bits, compression {compression})")
    if offset < 14 + header_size:
        raise Rejected("the BMP header is damaged: its pixels begin inside it")
    # A negative height means rows from top to bottom. Each row fills whole words of 32 bits.
    end = offset + -(-width * depth // 32) * 4 * abs(height)
    if end > len(data):
        raise IndexError
    return Header("BMP", abs(height), width, 1, data[:end])


def _exif_orientation(exif: bytes) -> int:
    """Return the orientation, 1 to 8.

    Like viewers, take damaged metadata for none, since the image can still be whole.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", exif, entry)
            if tag == _ORIENTATION:
                return value if kind == _SHORT and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


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
        raise UserError("reading images needs Pillow; pip install 'megatron-cca[data]'") from None
    return {"JPEG": JpegImageFile, "PNG": PngImageFile, "WebP": WebPImageFile, "BMP": BmpImageFile}
