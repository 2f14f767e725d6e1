"""Image files: opening them, and the settings text in them. Free of NumPy."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Generator
from contextlib import contextmanager

from PIL import Image, UnidentifiedImageError

from alphalayer.core.errors import InvalidRequest

MAX_PIXELS = 16_000_000
"""Limit for decoding: four times the largest generated image. It takes about 150 MB."""
READABLE = ("PNG", "WEBP", "AVIF", "JPEG")
"""Formats that are opened. Some other readers of Pillow start other programs."""
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
_USE = "Use a PNG, WebP, AVIF or JPEG file."


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
        with Image.open(io.BytesIO(data), formats=READABLE) as image:
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
        raise too_large("far more pixels than that") from None


def too_large(size: str) -> InvalidRequest:
    """Return the error of an image with too many pixels."""
    limit = f"{MAX_PIXELS // 1_000_000} megapixels"
    return InvalidRequest(f"the image is too large: the limit is {limit}, and it has {size}.")


def settings_of(image: Image.Image) -> str | None:
    """Return the `parameters` text of an image, None without one."""
    text = image.info.get("parameters")
    if isinstance(text, str):
        return text
    # not image.getexif(), which decodes all pixels of a PNG
    exif = Image.Exif()
    exif.load(image.info.get("exif") or b"")
    comment = exif.get_ifd(EXIF_IFD).get(USER_COMMENT)
    if isinstance(comment, bytes) and comment.startswith(b"UNICODE\0"):
        return comment[8:].decode("utf-16-be", errors="replace")
    return None
