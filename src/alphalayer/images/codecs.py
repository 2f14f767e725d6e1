"""Pictures as bytes: RGBA arrays to PNG, WebP or AVIF with their settings, and back; and what is done to a finished picture.

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
"""Of a picture that is decoded: four times the largest that is drawn. It takes about 150 MB."""
READABLE = ("PNG", "WEBP", "AVIF", "JPEG")
"""What is opened, of all that Pillow knows: some of its readers start other programs."""
MIME_TYPES: dict[ImageFormat, str] = {
    "png": "image/png",
    "webp": "image/webp",
    "avif": "image/avif",
}
_MIME_TYPES_BY_ENDING = {
    **{f".{kind}": mime for kind, mime in MIME_TYPES.items()},
    ".jpeg": "image/jpeg",
}
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_UP_FILTER = 2
_USE = "Use a PNG, WebP, AVIF or JPEG file."


def mime_type(filename: str) -> str:
    """The type of a picture file by its name; `mimetypes` knows .webp on some machines only."""
    return _MIME_TYPES_BY_ENDING.get(PurePath(filename).suffix, "application/octet-stream")


def check_format(name: str) -> ImageFormat:
    """The format of that name. Raises `InvalidRequest` for others, jpeg above all, which has no alpha."""
    for known in get_args(ImageFormat):
        if name.lower() == known:
            return known
    raise InvalidRequest(
        f'"{name}" is not a format with transparency that is written here.',
        hint="Use png, webp or avif.",
        field="format",
    )


def encode(rgba: Rgba, kind: ImageFormat = "png", parameters: str = "") -> bytes:
    """A picture file, lossless for PNG and WebP, with the `parameters` text inside. Colour under alpha 0 is kept."""
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
        # as bytes: Pillow takes an Exif without main tags for an empty one
        options["exif"] = exif.tobytes()
    image.save(buffer, format=kind.upper(), **options)
    return buffer.getvalue()


def encode_preview(rgb: NDArray[np.uint8]) -> bytes:
    """A small WebP of an RGB picture (height, width, 3), for the eye only."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format="WEBP", quality=70)
    return buffer.getvalue()


def decode(data: bytes) -> tuple[Rgba, str | None]:
    """A picture file → (RGBA, `parameters` text if it carries one).

    Raises:
        InvalidRequest: not a PNG, WebP, AVIF or JPEG, damaged, or larger than 16 megapixels.
    """
    with _opened(data) as image:
        if image.width * image.height > MAX_PIXELS:
            raise _too_large(f"{image.width}x{image.height} pixels")
        image.load()
        return np.asarray(image if image.mode == "RGBA" else image.convert("RGBA")), _parameters(
            image
        )


def read_settings(data: bytes) -> tuple[tuple[int, int], str | None]:
    """(width, height) and the `parameters` text of a picture file, of any size: no pixel is decoded.

    Raises:
        InvalidRequest: not a PNG, WebP, AVIF or JPEG, or its head is damaged.
    """
    with _opened(data) as image:
        return image.size, _parameters(image)


@contextmanager
def _opened(data: bytes) -> Generator[Image.Image]:
    """A picture file whose head was read. What goes wrong inside the block is said of the file, too."""
    try:
        with Image.open(io.BytesIO(data), formats=READABLE) as image:
            yield image
    except UnidentifiedImageError:
        raise InvalidRequest("not a picture.", hint=_USE) from None
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
        raise InvalidRequest(f"the picture is damaged ({error}).", hint=_USE) from None
    except Image.DecompressionBombError:
        raise _too_large("far more pixels than that") from None


def _too_large(what: str) -> InvalidRequest:
    limit = f"{MAX_PIXELS // 1_000_000} megapixels"
    return InvalidRequest(f"the picture is too large: the limit is {limit}, and it has {what}.")


def _parameters(image: Image.Image) -> str | None:
    text = image.info.get("parameters")
    if isinstance(text, str):
        return text
    # not image.getexif(), which decodes a PNG to look behind its pixels
    exif = Image.Exif()
    exif.load(image.info.get("exif") or b"")
    comment = exif.get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    if isinstance(comment, bytes) and comment.startswith(b"UNICODE\0"):
        return comment[8:].decode("utf-16-be", errors="replace")
    return None


def _encode_png(rgba: Rgba, parameters: str) -> bytes:
    """8-bit RGBA: every row as its difference to the row above, deflated by ISA-L; PNG specification, third edition."""
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
    """Latin-1 text as tEXt, other text as iTXt; what neither can hold is replaced."""
    text = text.replace("\0", " ")
    try:
        return b"tEXt", b"parameters\0" + text.encode("latin-1")
    except UnicodeEncodeError:
        return b"iTXt", b"parameters\0\0\0\0\0" + text.encode("utf-8", errors="replace")


def _chunk(name: bytes, data: bytes) -> bytes:
    return (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", isal_zlib.crc32(name + data))
    )
