"""Image codecs: RGBA arrays to PNG, WebP or AVIF files with their settings, and back.

Arrays are uint8 (height, width, 4), straight alpha.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import Any, Literal, NamedTuple, get_args

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
    check_size,
    open_image,
    orientation_of,
    settings_of,
)

Rgba = NDArray[np.uint8]
Size = tuple[int, int]
"""Width and height in pixels."""

MAX_INPUT_SIDE = 16_384
"""Longest side of an input image, because fitting takes memory by the side."""
OPAQUE_ALPHA = 255
STRIP_PIXELS = 1 << 18
"""Pixels that are processed at once. Large images take little memory beside themselves."""
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
_AVIF_OPTIONS = {"quality": 90, "speed": 9, "max_threads": 1}
"""Speed 9 takes a fifteenth of the default's time, for files that are up to 15 % larger."""


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
    options: dict[str, Any] = {"lossless": True, "exact": True} if kind == "webp" else _AVIF_OPTIONS
    if parameters:
        exif = Image.Exif()
        exif.get_ifd(EXIF_IFD)[USER_COMMENT] = b"UNICODE\0" + parameters.encode(
            "utf-16-be", errors="replace"
        )
        # as bytes, because Pillow treats an Exif without main tags as empty
        options = {**options, "exif": exif.tobytes()}
    image.save(buffer, format=kind.upper(), **options)
    return buffer.getvalue()


def encode_preview(rgb: NDArray[np.uint8]) -> bytes:
    """Encode an RGB image, uint8 (height, width, 3), as a small lossy WebP."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format="WEBP", quality=70)
    return buffer.getvalue()


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[Rgba, str | None]:
    """Decode an image file. Of an animation, decode the first frame.

    Args:
        data: The file.
        max_pixels: Limit of width times height.

    Returns:
        The image as uint8 (height, width, 4), and its `parameters` text, if it has one.

    Raises:
        InvalidRequest: The file is not a PNG, WebP, AVIF or JPEG, or is damaged,
            or has too many pixels or parts.
    """
    with open_image(data) as image:
        check_size(image, data, max_pixels)
        image.load()
        rgba = np.empty((image.height, image.width, 4), np.uint8)
        for rows in strips(rgba):
            strip = image.crop((0, rows.start, image.width, rows.stop))
            rgba[rows] = _to_rgba(strip)
        return rgba, settings_of(image)


def _to_rgba(image: Image.Image) -> NDArray[np.uint8]:
    """Convert the pixels of an image. Of 16 bits, the upper 8 are used."""
    if image.mode.startswith("I;16"):
        # Pillow would make everything above 255 white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.asarray(image if image.mode == "RGBA" else image.convert("RGBA"))


def strips(rgba: Rgba) -> Iterator[slice]:
    """Yield the rows of an image in strips of about `STRIP_PIXELS` pixels."""
    height, width = rgba.shape[:2]
    count = max(1, STRIP_PIXELS // width)
    for top in range(0, height, count):
        yield slice(top, min(top + count, height))


class InputFile(NamedTuple):
    """An input image as it is stored: a PNG without settings text."""

    data: bytes
    width: int
    height: int
    is_opaque: bool
    """Whether every pixel is opaque."""


MaskReading = Literal["white", "transparent"]
"""Which part of a mask image is changed."""
ROUNDED_ALPHA = 128
"""Alpha of a mask above which a pixel is changed, as in AUTOMATIC1111."""


def encode_input(data: bytes) -> InputFile:
    """Convert an image file to a PNG, turned by its EXIF orientation.

    Equal images are one file then.

    Raises:
        InvalidRequest: See `decode`, or a side is longer than `MAX_INPUT_SIDE`.
    """
    rgba = decode_upright(data)
    return _input_file(rgba, is_opaque=bool(rgba[..., 3].min() == OPAQUE_ALPHA))


def encode_mask(data: bytes, reading: MaskReading = "white", *, invert: bool = False) -> InputFile:
    """Convert a mask image to a grey PNG that is white where an image is changed.

    Args:
        data: The file.
        reading: "white": white is changed. If the image has transparency, its opaque part is.
            "transparent": the transparent part is changed.
        invert: Whether the other part is changed.

    Raises:
        InvalidRequest: See `encode_input`, or an opaque image was read as "transparent".
    """
    rgba = decode_upright(data)
    alpha = rgba[..., 3]
    is_opaque = alpha.min() == OPAQUE_ALPHA
    if reading == "transparent" and is_opaque:
        raise InvalidRequest(
            "the mask is opaque; its transparent part is changed.",
            hint="Save the mask as a PNG with an alpha channel.",
        )
    if is_opaque:
        grey = np.asarray(Image.fromarray(rgba).convert("L"))
    else:
        grey = np.where(alpha > ROUNDED_ALPHA, np.uint8(255), np.uint8(0))
    if invert != (reading == "transparent"):
        grey = 255 - grey
    mask = np.dstack([grey, grey, grey, np.full_like(grey, OPAQUE_ALPHA)])
    return _input_file(mask, is_opaque=True)


def decode_upright(data: bytes) -> Rgba:
    """Decode an input image and turn it by its EXIF orientation."""
    rgba, _ = decode(data)
    height, width = rgba.shape[:2]
    if max(height, width) > MAX_INPUT_SIDE:
        raise InvalidRequest(
            f"the image is too large: the limit is {MAX_INPUT_SIDE} pixels a side, "
            f"and it has {width}x{height} pixels."
        )
    with open_image(data) as image:
        orientation = orientation_of(image)
    return _turn(rgba, orientation)


def _turn(rgba: Rgba, orientation: int) -> Rgba:
    """Turn an image upright.

    Source:
        EXIF 2.32, section 4.6.4: 5 to 8 swap rows and columns.
    """
    if orientation in (5, 6, 7, 8):
        rgba = rgba.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(rgba[::rows, ::columns])


def _input_file(rgba: Rgba, *, is_opaque: bool) -> InputFile:
    height, width = rgba.shape[:2]
    return InputFile(encode(rgba), width, height, is_opaque)


def _encode_png(rgba: Rgba, parameters: str) -> bytes:
    """Encode 8-bit RGBA: each row is its difference to the row above, deflated.

    Source:
        PNG specification, third edition.
    """
    height, width = rgba.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    chunks = [(b"IHDR", [header])]
    if parameters:
        name, text = _text_chunk(parameters)
        chunks.append((name, [text]))
    chunks += [(b"IDAT", _deflate(rgba)), (b"IEND", [])]
    file = io.BytesIO()
    file.write(_PNG_SIGNATURE)
    for name, parts in chunks:
        _write_chunk(file, name, parts)
    return file.getvalue()


def _deflate(rgba: Rgba) -> Iterator[bytes]:
    """Yield the deflated rows of an image, strip by strip."""
    height, width = rgba.shape[:2]
    pixels = rgba.reshape(height, width * 4)
    compressor = isal_zlib.compressobj(level=1)
    above = np.zeros((1, width * 4), np.uint8)
    for strip in strips(rgba):
        rows = np.empty((strip.stop - strip.start, 1 + width * 4), np.uint8)
        rows[:, 0] = _UP_FILTER
        np.subtract(pixels[strip], np.vstack([above, pixels[strip][:-1]]), out=rows[:, 1:])
        above = pixels[strip][-1:]
        yield compressor.compress(rows.reshape(-1).data)
    yield compressor.flush()


def _text_chunk(text: str) -> tuple[bytes, bytes]:
    """Encode Latin-1 text as tEXt, other text as iTXt. Replace invalid characters."""
    text = text.replace("\0", " ")
    try:
        return b"tEXt", b"parameters\0" + text.encode("latin-1")
    except UnicodeEncodeError:
        return b"iTXt", b"parameters\0\0\0\0\0" + text.encode("utf-8", errors="replace")


def _write_chunk(file: io.BytesIO, name: bytes, parts: Iterable[bytes]) -> None:
    """Write a chunk: its length, name, content and checksum."""
    start = file.tell()
    file.write(bytes(4) + name)
    checksum = isal_zlib.crc32(name)
    for part in parts:
        file.write(part)
        checksum = isal_zlib.crc32(part, checksum)
    end = file.tell()
    file.seek(start)
    file.write(struct.pack(">I", end - start - 8))
    file.seek(end)
    file.write(struct.pack(">I", checksum))
