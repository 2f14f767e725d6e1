"""Encoder of Photoshop documents with layers: 8-bit RGB with transparency.

Source:
    Adobe Photoshop File Formats Specification, November 2019.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

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


def encode_psd(layers: Sequence[tuple[str, Rgba, bool]], merged: Rgba) -> bytes:
    """Encode a document.

    Args:
        layers: Name, image and visibility of each layer, bottom to top, all of one size.
        merged: The image of all layers, for programs that read no layers.
    """
    height, width = merged.shape[:2]
    records: list[bytes] = []
    data: list[bytes] = []
    for name, rgba, is_visible in layers:
        planes = [
            struct.pack(">H", ZIP)
            + isal_zlib.compress(np.ascontiguousarray(rgba[..., index]).data, 1)
            for _, index in CHANNELS
        ]
        records.append(_record(name, (width, height), [len(plane) for plane in planes], is_visible))
        data += planes
    # a negative count means that the merged image has transparency
    info = [struct.pack(">h", -len(records)), *records, *data]
    length = sum(len(part) for part in info)
    padding = length % 2
    empty = struct.pack(">I", 0)
    # readers remove the white again
    on_white = composite(merged, WHITE)
    # one join, because the parts are large
    return b"".join(
        [
            struct.pack(">4sH6xHIIHH", b"8BPS", 1, 4, height, width, 8, RGB_MODE),
            empty,  # colour table
            empty,  # image resources
            struct.pack(">II", length + padding + 8, length + padding),
            *info,
            bytes(padding),
            empty,  # mask of the document
            struct.pack(">H", RAW),
            *(on_white[..., channel].tobytes() for channel in range(3)),
            merged[..., 3].tobytes(),
        ]
    )


def _record(name: str, size: tuple[int, int], lengths: Sequence[int], is_visible: bool) -> bytes:
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
