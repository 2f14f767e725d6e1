"""Image codecs: RGBA arrays to PNG, WebP or AVIF files with their settings, and back.

Arrays are uint8 (height, width, 4), straight alpha.
"""

from __future__ import annotations

import io
import struct
from pathlib import PurePath
from typing import Any, get_args

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray
from PIL import Image

from alphalayer.core.errors import InvalidRequest
from alphalayer.core.request import ImageFormat
from alphalayer.images.files import (
    EXIF_IFD,
    MAX_PIXELS,
    USER_COMMENT,
    open_image,
    settings_of,
    too_large,
)

Rgba = NDArray[np.uint8]

MAX_INPUT_SIDE = 16_384
"""Longest side of an input image, because fitting takes memory by the side."""
MIME_TYPES: dict[ImageFormat, str] = {
    "png": "image/png",
    "webp": "image/webp",
    "avif": "image/avif",
}
_MIME_TYPES_BY_EXTENSION = {
    **{f".{kind}": mime for kind, mime in MIME_TYPES.items()},
    ".jpeg": "image/jpeg",
}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_UP_FILTER = 2


def mime_type(filename: str) -> str:
    """Return the MIME type of an image file by its name.

    The standard library's `mimetypes` knows .webp only on some machines.
    """
    return _MIME_TYPES_BY_EXTENSION.get(PurePath(filename).suffix, "application/octet-stream")


def check_format(name: str) -> ImageFormat:
    """Return the format of that name, in any case.

    Raises:
        InvalidRequest: The format is unknown, or has no alpha channel, as JPEG.
    """
    for kind in get_args(ImageFormat):
        if name.lower() == kind:
            return kind
    raise InvalidRequest(
        f'"{name}" is not a supported format with transparency.',
        hint="Use png, webp or avif.",
        field="format",
    )


def encode(rgba: Rgba, kind: ImageFormat = "png", parameters: str = "") -> bytes:
    """Encode an image, lossless for PNG and WebP. Colour under alpha 0 is kept.

    Args:
        rgba: Image, uint8 (height, width, 4).
        kind: Format of the file.
        parameters: Text with the generation settings, stored in the file.
    """
    if kind == "png":
        return _encode_png(rgba, parameters)
    image, buffer = Image.fromarray(rgba), io.BytesIO()
    options: dict[str, Any] = (
        {"lossless": True, "exact": True} if kind == "webp" else {"quality": 90}
    )
    if parameters:
        exif = Image.Exif()
        exif.get_ifd(EXIF_IFD)[USER_COMMENT] = b"UNICODE\0" + parameters.encode(
            "utf-16-be", errors="replace"
        )
        # as bytes, because Pillow treats an Exif without main tags as empty
        options["exif"] = exif.tobytes()
    image.save(buffer, format=kind.upper(), **options)
    return buffer.getvalue()


def encode_preview(rgb: NDArray[np.uint8]) -> bytes:
    """Encode an RGB image, uint8 (height, width, 3), as a small lossy WebP."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format="WEBP", quality=70)
    return buffer.getvalue()


def decode(data: bytes) -> tuple[Rgba, str | None]:
    """Decode an image file.

    Returns:
        The image as uint8 (height, width, 4), and its `parameters` text, if it has one.

    Raises:
        InvalidRequest: The file is not a PNG, WebP, AVIF or JPEG, or is damaged,
            or has more than 16 megapixels.
    """
    with open_image(data) as image:
        if image.width * image.height > MAX_PIXELS:
            raise too_large(f"{image.width}x{image.height} pixels")
        image.load()
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        return np.asarray(rgba), settings_of(image)


def encode_input(data: bytes) -> bytes:
    """Convert an image file to a PNG without settings text.

    Equal images are one file then.

    Raises:
        InvalidRequest: See `decode`, or a side is longer than `MAX_INPUT_SIDE`.
    """
    rgba, _ = decode(data)
    height, width = rgba.shape[:2]
    if max(height, width) > MAX_INPUT_SIDE:
        raise InvalidRequest(
            f"the image is too large: the limit is {MAX_INPUT_SIDE} pixels a side, "
            f"and it has {width}x{height} pixels."
        )
    return encode(rgba)


def _encode_png(rgba: Rgba, parameters: str) -> bytes:
    """Encode 8-bit RGBA: each row is its difference to the row above, deflated.

    Source:
        PNG specification, third edition.
    """
    height, width = rgba.shape[:2]
    pixels = rgba.reshape(height, width * 4)
    rows = np.empty((height, 1 + width * 4), np.uint8)
    rows[:, 0] = _UP_FILTER
    rows[0, 1:] = pixels[0]
    np.subtract(pixels[1:], pixels[:-1], out=rows[1:, 1:])
    body = isal_zlib.compress(rows.reshape(-1).data, level=1)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))]
    if parameters:
        chunks.append(_text_chunk(parameters))
    chunks += [(b"IDAT", body), (b"IEND", b"")]
    return _PNG_SIGNATURE + b"".join(_chunk(name, data) for name, data in chunks)


def _text_chunk(text: str) -> tuple[bytes, bytes]:
    """Encode Latin-1 text as tEXt, other text as iTXt. Replace invalid characters."""
    text = text.replace("\0", " ")
    try:
        return b"tEXt", b"parameters\0" + text.encode("latin-1")
    except UnicodeEncodeError:
        return b"iTXt", b"parameters\0\0\0\0\0" + text.encode("utf-8", errors="replace")


def _chunk(name: bytes, data: bytes) -> bytes:
    return (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", isal_zlib.crc32(name + data))
    )
