"""Image codecs: RGBA arrays to PNG, WebP or AVIF files with their settings, and back.

Arrays are uint8 (height, width, 4), straight alpha.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any, get_args

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from alphalayer.core.errors import InvalidRequest
from alphalayer.core.request import ImageFormat

Rgba = NDArray[np.uint8]

MAX_PIXELS = 16_000_000
"""Limit for decoding: four times the largest generated image. It takes about 150 MB."""
MAX_INPUT_SIDE = 16_384
"""Longest side of an input image, because fitting takes memory by the side."""
READABLE = ("PNG", "WEBP", "AVIF", "JPEG")
"""Formats that are opened. Some other readers of Pillow start other programs."""
MIME_TYPES: dict[ImageFormat, str] = {
    "png": "image/png",
    "webp": "image/webp",
    "avif": "image/avif",
}
_MIME_TYPES_BY_EXTENSION = {
    **{f".{kind}": mime for kind, mime in MIME_TYPES.items()},
    ".jpeg": "image/jpeg",
}
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_UP_FILTER = 2
_USE = "Use a PNG, WebP, AVIF or JPEG file."


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
        exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + parameters.encode(
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
    with _open(data) as image:
        if image.width * image.height > MAX_PIXELS:
            raise _too_large(f"{image.width}x{image.height} pixels")
        image.load()
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        return np.asarray(rgba), _parameters(image)


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


def read_settings(data: bytes) -> tuple[tuple[int, int], str | None]:
    """Return (width, height) and the `parameters` text of an image file of any size.

    No pixels are decoded.

    Raises:
        InvalidRequest: The file is not a PNG, WebP, AVIF or JPEG, or its header is damaged.
    """
    with _open(data) as image:
        return image.size, _parameters(image)


@contextmanager
def _open(data: bytes) -> Generator[Image.Image]:
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
        raise _too_large("far more pixels than that") from None


def _too_large(size: str) -> InvalidRequest:
    limit = f"{MAX_PIXELS // 1_000_000} megapixels"
    return InvalidRequest(f"the image is too large: the limit is {limit}, and it has {size}.")


def _parameters(image: Image.Image) -> str | None:
    text = image.info.get("parameters")
    if isinstance(text, str):
        return text
    # not image.getexif(), which decodes all pixels of a PNG
    exif = Image.Exif()
    exif.load(image.info.get("exif") or b"")
    comment = exif.get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    if isinstance(comment, bytes) and comment.startswith(b"UNICODE\0"):
        return comment[8:].decode("utf-16-be", errors="replace")
    return None


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
