"""Writer of TIFF files with a page for each image: 8-bit RGBA, deflated.

libtiff would hold the interpreter while it compresses a page.

Source:
    TIFF 6.0 and its technical note 1 (deflate), Adobe.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import IO

from isal import isal_zlib

from alphalayer.images.codecs import Rgba, strips

_HEADER = struct.Struct("<2sHI")
_ASCII, _SHORT, _LONG = 2, 3, 4
"""Types of values."""
_FORMS = {_ASCII: "B", _SHORT: "H", _LONG: "I"}
_Tags = Mapping[int, tuple[int, Sequence[int]]]
"""Type and values of each tag, in the order of the tags."""


def write_tiff(file: IO[bytes], pages: Iterable[tuple[str, Rgba]]) -> None:
    """Write images as pages with names.

    Args:
        file: Empty file that can seek.
        pages: Name and image of each page. They are used one after another.
    """
    file.write(_HEADER.pack(b"II", 42, 0))
    # where the offset of the next directory belongs
    link = _HEADER.size - 4
    for name, rgba in pages:
        offsets, sizes = _write_strips(file, rgba)
        tags = _page_tags(name, rgba, offsets, sizes)
        file.write(bytes(file.tell() % 2))
        start = file.tell()
        file.write(_directory(start, tags))
        file.seek(link)
        file.write(struct.pack("<I", start))
        file.seek(0, 2)
        link = start + 2 + 12 * len(tags)


def _write_strips(file: IO[bytes], rgba: Rgba) -> tuple[list[int], list[int]]:
    """Write the deflated rows of an image. Return the offsets and sizes of its strips."""
    offsets, sizes = list[int](), list[int]()
    for rows in strips(rgba):
        difference = rgba[rows].copy()
        difference[:, 1:] -= rgba[rows, :-1]
        data = isal_zlib.compress(difference.data, 1)
        offsets.append(file.tell())
        sizes.append(file.write(data))
    return offsets, sizes


def _page_tags(name: str, rgba: Rgba, offsets: Sequence[int], sizes: Sequence[int]) -> _Tags:
    height, width = rgba.shape[:2]
    rows = next(strips(rgba))
    return {
        256: (_LONG, [width]),
        257: (_LONG, [height]),
        258: (_SHORT, [8, 8, 8, 8]),  # bits of each sample
        259: (_SHORT, [8]),  # deflate
        262: (_SHORT, [2]),  # RGB
        273: (_LONG, offsets),
        277: (_SHORT, [4]),  # samples of a pixel
        278: (_LONG, [rows.stop - rows.start]),
        279: (_LONG, sizes),
        284: (_SHORT, [1]),  # samples are together
        285: (_ASCII, [*name.encode(), 0]),
        317: (_SHORT, [2]),  # each row is the difference to the pixel on the left
        338: (_SHORT, [2]),  # straight alpha
    }


def _directory(start: int, tags: _Tags) -> bytes:
    """Encode the tags of a page. Long values follow them.

    Args:
        start: Offset of the result in the file.
        tags: The tags.
    """
    entries, values = b"", b""
    after = start + 2 + 12 * len(tags) + 4
    for tag, (kind, numbers) in tags.items():
        data = struct.pack(f"<{len(numbers)}{_FORMS[kind]}", *numbers)
        if len(data) > 4:
            offset = after + len(values)
            values += data + bytes(len(data) % 2)
            data = struct.pack("<I", offset)
        entries += struct.pack("<HHI4s", tag, kind, len(numbers), data)
    return struct.pack("<H", len(tags)) + entries + bytes(4) + values
