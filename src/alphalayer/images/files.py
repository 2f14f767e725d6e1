"""Image files: opening them, and the settings text in them. Free of NumPy."""

from __future__ import annotations

import codecs
import io
import struct
import warnings
import zlib
from collections.abc import Generator
from contextlib import contextmanager

from PIL import Image, UnidentifiedImageError

from alphalayer.core.errors import InvalidRequest

MAX_PIXELS = 16_000_000
"""Limit for decoding: four times the largest generated image. It takes about 150 MB."""
READABLE = ("PNG", "WEBP", "AVIF", "JPEG")
"""Formats that are opened. Some other readers of Pillow start other programs."""
EXIF_IFD, USER_COMMENT, ORIENTATION = 0x8769, 0x9286, 0x0112
MAX_TEXT = 1_000_000
"""Longest `parameters` text. Pillow has this limit for compressed text."""
MAX_EXIF_BYTES = 2 * MAX_TEXT + 1000
"""Largest EXIF data that are searched: such a text in UTF-16, and its tags."""
MAX_SCANS = 100
"""Most scans of a JPEG. Each takes time by the pixels, and encoders write about ten."""
MAX_READS = 50_000
"""Most reads of a file. Pillow reads some 4 times a chunk, and millions of chunks take long."""
_JPEG, _SCAN = b"\xff\xd8", b"\xff\xda"
_USE = "Use a PNG, WebP, AVIF or JPEG file."
_SAVE = "Save it again with another program."


# a file with many damaged tags would fill the log
warnings.filterwarnings("ignore", module="PIL.TiffImagePlugin")


class _Reader(io.BytesIO):
    """Content of a file with a limit of reads."""

    _reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes. Raises `InvalidRequest` after too many reads."""
        self._reads += 1
        if self._reads > MAX_READS:
            raise InvalidRequest("the image has too many parts.", hint=_SAVE)
        return super().read(size)


def read_settings(data: bytes) -> tuple[tuple[int, int], str | None]:
    """Return (width, height) and the `parameters` text of an image file of any size.

    No pixels are decoded.

    Raises:
        InvalidRequest: The file is not a PNG, WebP, AVIF or JPEG, or its header is damaged.
    """
    with open_image(data) as image:
        return image.size, settings_of(image)


@contextmanager
def open_image(data: bytes) -> Generator[Image.Image]:
    """Open an image file. Errors inside the block are reported as damage."""
    try:
        with Image.open(_Reader(data), formats=READABLE) as image:
            yield image
    except UnidentifiedImageError:
        raise InvalidRequest("not an image.", hint=_USE) from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        RuntimeError,
        ArithmeticError,
        LookupError,
        struct.error,
        zlib.error,
    ) as error:
        raise InvalidRequest(f"the image is damaged ({error}).", hint=_USE) from None
    except Image.DecompressionBombError:
        raise _too_large("far more pixels than that", MAX_PIXELS) from None


def check_size(image: Image.Image, data: bytes, max_pixels: int) -> None:
    """Check an open image before its pixels are decoded.

    Raises:
        InvalidRequest: It has too many pixels or scans.
    """
    if image.width * image.height > max_pixels:
        raise _too_large(f"{image.width}x{image.height} pixels", max_pixels)
    # in a scan's data 0xff is followed by 0, so that only markers match
    scans = data.count(_SCAN) if data.startswith(_JPEG) else 0
    if scans > MAX_SCANS:
        raise InvalidRequest(f"the image has {scans} scans; at most {MAX_SCANS}.", hint=_SAVE)


def count_pixels(data: bytes) -> int:
    """Return the number of pixels of a file, at most `MAX_PIXELS`.

    No pixels are decoded. Files that cannot be opened count as the largest.
    """
    try:
        with open_image(data) as image:
            return min(image.width * image.height, MAX_PIXELS)
    except InvalidRequest:
        return MAX_PIXELS


def _too_large(size: str, max_pixels: int) -> InvalidRequest:
    """Return the error of an image with too many pixels."""
    limit = f"{max_pixels // 1_000_000} megapixels"
    return InvalidRequest(f"the image is too large: the limit is {limit}, and it has {size}.")


def settings_of(image: Image.Image) -> str | None:
    """Return the `parameters` text of an image, None without one.

    Raises:
        InvalidRequest: The text is too long.
    """
    text = image.info.get("parameters")
    if isinstance(text, str):
        return _check_length(text)
    comment = _read_exif(image).get_ifd(EXIF_IFD).get(USER_COMMENT)
    if isinstance(comment, bytes):
        comment = _decode_comment(comment)
    # Pillow returns a comment of another tag type as text
    comment = comment.rstrip("\0") if isinstance(comment, str) else None
    return _check_length(comment) if comment else None


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation of an image: 1 to 8, 1 without a valid one."""
    value = _read_exif(image).get(ORIENTATION)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _read_exif(image: Image.Image) -> Image.Exif:
    """Return the EXIF data of an image, empty if they are too large."""
    # not image.getexif(), which decodes all pixels of a PNG
    data: bytes = image.info.get("exif") or b""
    exif = Image.Exif()
    if len(data) <= MAX_EXIF_BYTES:
        exif.load(data)
    return exif


def _decode_comment(comment: bytes) -> str | None:
    """Return the text of a user comment, None without text.

    The first 8 bytes are the name of its encoding. Programs write UTF-16 in both byte orders.
    Source: EXIF 2.32, section 4.6.6.
    """
    encoding, text = comment[:8], comment[8:]
    if encoding == b"UNICODE\0":
        # most characters of a text are below 256, and have a zero in their upper byte
        is_little = text.startswith(codecs.BOM_UTF16_LE)
        is_little |= text[1::2].count(0) > text[::2].count(0)
        order = "le" if is_little else "be"
        decoded = text.decode(f"utf-16-{order}", errors="replace").removeprefix("\ufeff")
    elif encoding in (b"ASCII\0\0\0", bytes(8)):
        decoded = text.decode(errors="replace")
    else:
        return None
    return decoded.rstrip("\0") or None


def _check_length(text: str) -> str:
    if len(text) > MAX_TEXT:
        raise InvalidRequest(
            f"the text in the image has {len(text):,} characters; at most {MAX_TEXT:,}.",
            hint=_SAVE,
        )
    return text
