"""Writer of Photoshop documents with layers: 8-bit RGB with transparency.

Source:
    Adobe Photoshop File Formats Specification, November 2019.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import IO

import numpy as np
from isal import isal_zlib

from alphalayer.images.codecs import Rgba
from alphalayer.images.postprocess import composite

RAW, ZIP = 0, 2
"""Compressions of channel data."""
CHANNELS = ((-1, 3), (0, 0), (1, 1), (2, 2))
"""Id of each channel in the file and its index in the array. -1 is alpha."""
HIDDEN = 2
"""Flag of a layer that is not visible."""
RGB_MODE = 3
WHITE = (255, 255, 255)


def write_psd(
    file: IO[bytes],
    layers: Sequence[tuple[str, bool]],
    images: Iterable[Rgba],
    merge: Callable[[], Rgba],
) -> None:
    """Write a document.

    Args:
        file: Empty file that can seek.
        layers: Name and visibility of each layer, bottom to top.
        images: Their images, all of one size. They are used one after another.
        merge: Function that returns the image of all layers, for programs that read no layers.
            It is called after the last image.
    """
    empty = struct.pack(">I", 0)
    # the header and the lengths are written at the end, over these zeros
    file.write(bytes(26) + empty + empty + bytes(10))
    records = file.tell()
    file.write(bytes(sum(len(_record(*layer, (0, 0), [0] * 4)) for layer in layers)))
    sizes = [_write_planes(file, rgba) for rgba in images]
    file.write(bytes(file.tell() % 2))
    end = file.tell()
    file.write(empty)  # mask of the document
    merged = merge()
    height, width = merged.shape[:2]
    _write_merged(file, merged)
    file.seek(0)
    file.write(struct.pack(">4sH6xHIIHH", b"8BPS", 1, 4, height, width, 8, RGB_MODE))
    file.seek(records - 10)
    # without colour table and image resources; a negative count: the merged image has transparency
    lengths = end + 4 - (records - 6), end - (records - 2)
    file.write(struct.pack(">IIh", *lengths, -len(layers)))
    for layer, planes in zip(layers, sizes, strict=True):
        file.write(_record(*layer, (width, height), planes))


def _write_planes(file: IO[bytes], rgba: Rgba) -> list[int]:
    """Write the deflated channels of a layer. Return their sizes."""
    return [
        file.write(struct.pack(">H", ZIP))
        + file.write(isal_zlib.compress(np.ascontiguousarray(rgba[..., index]).data, 1))
        for _, index in CHANNELS
    ]


def _write_merged(file: IO[bytes], merged: Rgba) -> None:
    file.write(struct.pack(">H", RAW))
    # readers remove the white again
    on_white = composite(merged, WHITE)
    for index in range(3):
        file.write(np.ascontiguousarray(on_white[..., index]).data)
    file.write(np.ascontiguousarray(merged[..., 3]).data)


def _record(name: str, is_visible: bool, size: tuple[int, int], lengths: Sequence[int]) -> bytes:
    """Encode the description of a layer that fills the document."""
    width, height = size
    channels = b"".join(
        struct.pack(">hI", number, length)
        for (number, _), length in zip(CHANNELS, lengths, strict=True)
    )
    short = name.encode("mac_roman", errors="replace")[:255]
    units = name.encode("utf-16-be")
    unicode_name = _padded(struct.pack(">I", len(units) // 2) + units, 4)
    extra = b"".join(
        [
            struct.pack(">II", 0, 0),  # no mask, no blending ranges
            _padded(bytes([len(short)]) + short, 4),
            b"8BIMluni",
            _block(unicode_name),
        ]
    )
    return b"".join(
        [
            struct.pack(">iiiiH", 0, 0, height, width, len(CHANNELS)),
            channels,
            struct.pack(">8sBBBx", b"8BIMnorm", 255, 0, 0 if is_visible else HIDDEN),
            _block(extra),
        ]
    )


def _block(content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + content


def _padded(content: bytes, multiple: int) -> bytes:
    return content + bytes(-len(content) % multiple)
