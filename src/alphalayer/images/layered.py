"""Documents with layers: PSD, OpenRaster, TIFF and ZIP, and the image that layers give together.

Images are uint8 (height, width, 4), straight alpha. Layers are bottom to top, all of one size.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Literal
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from alphalayer.core.job import ImageRef
from alphalayer.images.codecs import Rgba, encode, strips
from alphalayer.images.psd import write_psd
from alphalayer.images.tiff import write_tiff

DocumentKind = Literal["psd", "ora", "tiff", "zip"]
DOCUMENT_MIME_TYPES: dict[DocumentKind, str] = {
    "psd": "image/vnd.adobe.photoshop",
    "ora": "image/openraster",
    "tiff": "image/tiff",
    "zip": "application/zip",
}
DOCUMENT_BYTES = 24
"""Memory for writing a document, in bytes a pixel of one layer. See `document_bytes`."""
MAX_NAME = 255
"""Longest name of a layer in a PSD, in characters."""
THUMBNAIL_SIDE = 256
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Characters that XML cannot hold, or that change the output of a terminal."""
_NOT_IN_FILE_NAMES = re.compile(r'[\\/:*?"<>|]')


@dataclass(frozen=True)
class DocumentLayer:
    """A layer of a document: its name, image and visibility."""

    name: str
    load: Callable[[], Rgba]
    """Function that returns the image. It is called once a document, for one layer after another.

    So few images are in memory at one time.
    """
    is_visible: bool = True


def describe_layers(layers: Sequence[ImageRef], load: Callable[[str], Rgba]) -> list[DocumentLayer]:
    """Return the layers of a document for stored images, bottom to top.

    Args:
        layers: The images of one set.
        load: Function of a storage key that returns the image.
    """
    return [
        DocumentLayer(layer.role.capitalize(), partial(load, layer.key), is_visible(layer, layers))
        for layer in layers
    ]


def is_visible(layer: ImageRef, layers: Sequence[ImageRef]) -> bool:
    """Return whether a layer is visible in documents.

    Foreground over background is the composite. The blended image and the composite would hide
    them.
    """
    is_complete = any(one.role == "composite" for one in layers)
    return not is_complete or layer.role in ("background", "foreground")


def document_bytes(pixels: int, visible: int) -> int:
    """Return the memory for writing a document, as measured with noise.

    Args:
        pixels: Pixels of one layer.
        visible: Number of visible layers, which stay in memory for the merged image.
    """
    return pixels * (DOCUMENT_BYTES + 4 * visible)


def write_document(file: IO[bytes], kind: DocumentKind, layers: Sequence[DocumentLayer]) -> None:
    """Write layers, bottom to top, as one document. Equal layers give equal bytes.

    PSD and OpenRaster have a merged image of the visible layers, with transparency. TIFF has a page
    for each layer, ZIP a PNG. Both have no visibility.

    Args:
        file: Empty file that can seek.
        kind: Format of the document.
        layers: At least one. Names may have any characters. Control characters become "?".
    """
    cleaned = [
        DocumentLayer(_UNPRINTABLE.sub("?", layer.name)[:MAX_NAME], layer.load, layer.is_visible)
        for layer in layers
    ]
    writers = {"psd": _write_psd, "ora": _write_ora, "tiff": _write_tiff, "zip": _write_zip}
    writers[kind](file, cleaned)


def composite_layers(layers: Sequence[Rgba]) -> Rgba:
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


class _Merge:
    """The visible layers of a document, and their merged image."""

    def __init__(self):
        self._visible: list[Rgba] = []
        self._last: Rgba | None = None

    def load(self, layer: DocumentLayer) -> Rgba:
        """Return the image of a layer, and keep it if it is visible."""
        self._last = rgba = layer.load()
        if layer.is_visible:
            self._visible.append(rgba)
        return rgba

    def finish(self, *, is_top_down: bool = False) -> Rgba:
        """Return the image of the visible layers. It is transparent without any."""
        assert self._last is not None
        visible = self._visible or [np.zeros_like(self._last)]
        merged = composite_layers(visible[::-1] if is_top_down else visible)
        self._visible, self._last = [], None
        return merged


def _write_psd(file: IO[bytes], layers: Sequence[DocumentLayer]) -> None:
    merge = _Merge()
    images = (merge.load(layer) for layer in layers)
    write_psd(file, [(layer.name, layer.is_visible) for layer in layers], images, merge.finish)


def _write_ora(file: IO[bytes], layers: Sequence[DocumentLayer]) -> None:
    """Write an OpenRaster document.

    Source:
        OpenRaster file layout specification 0.0.5.
    """
    _write_zip_members(file, _ora_members(layers))


def _ora_members(layers: Sequence[DocumentLayer]) -> Iterator[tuple[str, bytes]]:
    """Yield the names and contents of the files of an OpenRaster document."""
    yield "mimetype", DOCUMENT_MIME_TYPES["ora"].encode()
    # the stack is top to bottom
    stack = [(f"data/layer{number}.png", layer) for number, layer in reversed([*enumerate(layers)])]
    merge = _Merge()
    for source, layer in stack:
        yield source, encode(merge.load(layer))
    merged = merge.finish(is_top_down=True)
    yield "stack.xml", _ora_stack(stack, merged.shape[1], merged.shape[0])
    yield "mergedimage.png", encode(merged)
    thumbnail = Image.fromarray(merged)
    thumbnail.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    yield "Thumbnails/thumbnail.png", encode(np.asarray(thumbnail))


def _ora_stack(layers: Iterable[tuple[str, DocumentLayer]], width: int, height: int) -> bytes:
    """Encode the list of layers, top to bottom, with their files."""
    root = ElementTree.Element("image", version="0.0.5", w=str(width), h=str(height))
    stack = ElementTree.SubElement(root, "stack")
    for source, layer in layers:
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
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)


def _write_tiff(file: IO[bytes], layers: Sequence[DocumentLayer]) -> None:
    write_tiff(file, ((layer.name, layer.load()) for layer in layers))


def _write_zip(file: IO[bytes], layers: Sequence[DocumentLayer]) -> None:
    """Write a PNG for each layer, numbered from the bottom."""
    _write_zip_members(
        file,
        (
            (f"{number} {_NOT_IN_FILE_NAMES.sub('_', layer.name)}.png", encode(layer.load()))
            for number, layer in enumerate(layers, 1)
        ),
    )


def _write_zip_members(file: IO[bytes], members: Iterable[tuple[str, bytes]]) -> None:
    """Write a ZIP of files that are compressed already, in their order."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members:
            # without a time, so that equal documents are equal bytes
            archive.writestr(zipfile.ZipInfo(name), data)
