"""Documents with layers: PSD, OpenRaster, TIFF and ZIP, and the image that layers give together.

Images are uint8 (height, width, 4), straight alpha. Layers are bottom to top, all of one size.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree

import numpy as np
from PIL import Image, TiffImagePlugin

from alphalayer.images.codecs import Rgba, encode, strips
from alphalayer.images.psd import encode_psd

DocumentKind = Literal["psd", "ora", "tiff", "zip"]
DOCUMENT_MIME_TYPES: dict[DocumentKind, str] = {
    "psd": "image/vnd.adobe.photoshop",
    "ora": "image/openraster",
    "tiff": "image/tiff",
    "zip": "application/zip",
}
DOCUMENT_BYTES = 32
"""Memory for encoding a document, in bytes a pixel of all its layers. Measured with noise."""
MAX_NAME = 255
"""Longest name of a layer in a PSD, in characters."""
THUMBNAIL_SIDE = 256
PAGE_NAME = 285
"""Tag of a TIFF page."""
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Characters that XML cannot hold, or that change the output of a terminal."""
_NOT_IN_FILE_NAMES = re.compile(r'[\\/:*?"<>|]')


@dataclass(frozen=True)
class DocumentLayer:
    """A layer of a document: its name, image and visibility."""

    name: str
    rgba: Rgba
    is_visible: bool = True


def encode_document(kind: DocumentKind, layers: Sequence[DocumentLayer]) -> bytes:
    """Encode layers, bottom to top, as one file. Equal layers give equal bytes.

    PSD and OpenRaster have a merged image of the visible layers, with transparency. TIFF has a page
    for each layer, ZIP a PNG. Both have no visibility.

    Args:
        kind: Format of the file.
        layers: At least one. Names may have any characters. Control characters become "?".
    """
    cleaned = [
        DocumentLayer(_UNPRINTABLE.sub("?", layer.name)[:MAX_NAME], layer.rgba, layer.is_visible)
        for layer in layers
    ]
    encoders = {"psd": _encode_psd, "ora": _encode_ora, "tiff": _encode_tiff, "zip": _encode_zip}
    return encoders[kind](cleaned)


def composite(layers: Sequence[Rgba]) -> Rgba:
    """Composite images, bottom to top, with the "over" operator.

    The sums are whole numbers, which float64 holds exactly for up to five images. Each value is
    rounded once, halves to even. Colour is 0 where all images are transparent.
    """
    result = np.empty_like(layers[0])
    for rows in strips(result):
        # both are multiplied by `scale`
        alpha = np.zeros((*result[rows].shape[:2], 1))
        colour = np.zeros((*result[rows].shape[:2], 3))
        scale = 1.0
        for layer in layers:
            opacity = layer[rows, :, 3:].astype(np.float64)
            colour = layer[rows, :, :3] * (opacity * scale) + colour * (255 - opacity)
            alpha = opacity * scale + alpha * (255 - opacity)
            scale *= 255
        result[rows, :, :3] = np.rint(colour / np.maximum(alpha, 1))
        result[rows, :, 3:] = np.rint(alpha / (scale / 255))
    return result


def _merge(layers: Sequence[DocumentLayer]) -> Rgba:
    """Return the image of the visible layers. It is transparent without any."""
    empty = np.zeros_like(layers[0].rgba)
    return composite([layer.rgba for layer in layers if layer.is_visible] or [empty])


def _encode_psd(layers: Sequence[DocumentLayer]) -> bytes:
    return encode_psd(
        [(layer.name, layer.rgba, layer.is_visible) for layer in layers], _merge(layers)
    )


def _encode_ora(layers: Sequence[DocumentLayer]) -> bytes:
    """Encode an OpenRaster document.

    Source:
        OpenRaster file layout specification 0.0.5.
    """
    merged = _merge(layers)
    height, width = merged.shape[:2]
    root = ElementTree.Element("image", version="0.0.5", w=str(width), h=str(height))
    stack = ElementTree.SubElement(root, "stack")
    members = {"mimetype": DOCUMENT_MIME_TYPES["ora"].encode(), "stack.xml": b""}
    # the stack is top to bottom
    for number, layer in reversed(list(enumerate(layers))):
        source = f"data/layer{number}.png"
        members[source] = encode(layer.rgba)
        ElementTree.SubElement(
            stack,
            "layer",
            {
                "name": layer.name,
                "src": source,
                "x": "0",
                "y": "0",
                "opacity": "1.0",
                "visibility": "visible" if layer.is_visible else "hidden",
                "composite-op": "svg:src-over",
            },
        )
    members["stack.xml"] = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    members["mergedimage.png"] = encode(merged)
    thumbnail = Image.fromarray(merged)
    thumbnail.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    members["Thumbnails/thumbnail.png"] = encode(np.asarray(thumbnail))
    return _zip(members)


def _encode_tiff(layers: Sequence[DocumentLayer]) -> bytes:
    buffer = io.BytesIO()
    with TiffImagePlugin.AppendingTiffWriter(buffer) as pages:
        for layer in layers:
            tags = TiffImagePlugin.ImageFileDirectory_v2()
            tags[PAGE_NAME] = layer.name.encode()
            Image.fromarray(layer.rgba).save(
                pages, format="TIFF", compression="tiff_adobe_deflate", tiffinfo=tags
            )
            pages.newFrame()
    return buffer.getvalue()


def _encode_zip(layers: Sequence[DocumentLayer]) -> bytes:
    """Encode a PNG for each layer, numbered from the bottom."""
    return _zip(
        {
            f"{number} {_NOT_IN_FILE_NAMES.sub('_', layer.name)}.png": encode(layer.rgba)
            for number, layer in enumerate(layers, 1)
        }
    )


def _zip(members: dict[str, bytes]) -> bytes:
    """Return a ZIP of files that are compressed already, in their order."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in members.items():
            # without a time, so that equal documents are equal bytes
            file.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()
