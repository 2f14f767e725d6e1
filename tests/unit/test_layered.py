"""Documents with layers: every pixel and name comes back, and the merged image is exact."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
import weakref
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from alphalayer.images import codecs
from alphalayer.images.codecs import Rgba
from alphalayer.images.layered import (
    DOCUMENT_MIME_TYPES,
    DocumentKind,
    DocumentLayer,
    composite_layers,
    write_document,
)

NAMES = ("Hintergrund ü", "前景 👩‍🎨", "hidden")
HEIGHT, WIDTH = 23, 37


def layer_of(name: str, image: Rgba, is_visible: bool = True) -> DocumentLayer:
    return DocumentLayer(name, lambda: image, is_visible)


def encode_document(kind: DocumentKind, layers: list[DocumentLayer]) -> bytes:
    file = io.BytesIO()
    write_document(file, kind, layers)
    return file.getvalue()


@pytest.fixture(scope="module")
def layers() -> list[DocumentLayer]:
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (HEIGHT, WIDTH, 4), np.uint8) for _ in NAMES]
    images[0][:8, :, 3] = 0
    images[1][4:12, :, 3] = 0
    images[1][12:, :20, 3] = 255
    return [
        layer_of(name, image, name != "hidden") for name, image in zip(NAMES, images, strict=True)
    ]


def over(front: list[int], back: list[int]) -> list[int]:
    """Composite one pixel in fractions, each value rounded once."""
    a, b = Fraction(front[3], 255), Fraction(back[3], 255)
    alpha = a + b * (1 - a)
    colours = [
        round((c * a + d * b * (1 - a)) / alpha) if alpha else 0
        for c, d in zip(front[:3], back[:3], strict=True)
    ]
    return [*colours, round(alpha * 255)]


def test_composite_equals_the_over_operator_in_fractions(layers: list[DocumentLayer]):
    back, front = layers[0].load(), layers[1].load()
    result = composite_layers([back, front])
    expected = [
        [over(f, b) for f, b in zip(*rows, strict=True)]
        for rows in zip(front.tolist(), back.tolist(), strict=True)
    ]
    assert result.tolist() == expected


def test_composite_of_three_images_is_rounded_once():
    pixels = [[200, 10, 90, 255], [30, 250, 7, 1], [1, 2, 250, 1]]
    below = [Fraction(value) for value in pixels[0][:3]]
    for *colour, alpha in pixels[1:]:
        a = Fraction(alpha, 255)
        below = [c * a + d * (1 - a) for c, d in zip(colour, below, strict=True)]
    result = composite_layers([np.full((1, 1, 4), pixel, np.uint8) for pixel in pixels])
    assert result[0, 0].tolist() == [*(round(value) for value in below), 255]


def test_composite_keeps_the_front_where_the_back_is_empty(layers: list[DocumentLayer]):
    front = layers[1].load().copy()
    front[front[..., 3] == 0] = 0
    assert (composite_layers([np.zeros_like(front), front]) == front).all()


@dataclass
class PsdLayer:
    """A layer of a PSD, as `read_psd` returns it."""

    name: str
    short_name: bytes
    is_hidden: bool
    rgba: Rgba


def read_psd(data: bytes) -> tuple[list[PsdLayer], Rgba, bool]:
    """Return the layers, the merged image on white, and whether that has transparency."""
    file = io.BytesIO(data)

    def read(form: str) -> tuple[Any, ...]:
        return struct.unpack(f">{form}", file.read(struct.calcsize(f">{form}")))

    signature, version, channels, height, width, depth, mode = read("4sH6xHIIHH")
    assert (signature, version, channels, depth, mode) == (b"8BPS", 1, 4, 8, 3)
    for _ in ("colour table", "resources"):
        file.seek(read("I")[0], 1)
    (section,) = read("I")
    end = file.tell() + section
    length, count = read("Ih")
    assert length % 2 == 0
    data_end = file.tell() - 2 + length
    records = [read_record(read, file) for _ in range(abs(count))]
    layers: list[PsdLayer] = []
    for box, ids, flags, short, name in records:
        assert box == (0, 0, height, width)
        rgba = np.empty((height, width, 4), np.uint8)
        for number, size in ids:
            (compression,) = read("H")
            assert compression == 2
            plane = zlib.decompress(file.read(size - 2))
            rgba[..., number % 4] = np.frombuffer(plane, np.uint8).reshape(height, width)
        layers.append(PsdLayer(name, short, bool(flags & 2), rgba))
    assert data_end - file.tell() in (0, 1)
    file.seek(end)
    assert read("H") == (0,)
    planes = np.frombuffer(file.read(), np.uint8).reshape(4, height, width)
    return layers, np.moveaxis(planes, 0, 2), count < 0


def read_record(read: Any, file: io.BytesIO) -> tuple[Any, list[tuple[int, int]], int, bytes, str]:
    box = read("iiii")
    ids = [read("hI") for _ in range(read("H")[0])]
    signature, opacity, clipping, flags, length = read("8sBBBxI")
    assert (signature, opacity, clipping) == (b"8BIMnorm", 255, 0)
    end = file.tell() + length
    assert read("II") == (0, 0)
    short = file.read(read("B")[0])
    file.seek(-(1 + len(short)) % 4, 1)
    block, size, characters = read("8sII")
    assert (block, size % 4) == (b"8BIMluni", 0)
    name = file.read(2 * characters).decode("utf-16-be")
    file.seek(size - 4 - 2 * characters, 1)
    assert file.tell() == end
    return box, ids, flags, short, name


def test_psd_holds_each_layer_exactly(layers: list[DocumentLayer]):
    stored, _, _ = read_psd(encode_document("psd", layers))
    assert [layer.name for layer in stored] == list(NAMES)
    assert stored[0].short_name == "Hintergrund ü".encode("mac_roman")
    assert [layer.is_hidden for layer in stored] == [False, False, True]
    for layer, original in zip(stored, layers, strict=True):
        assert (layer.rgba == original.load()).all()


def test_psd_merged_image_is_the_visible_layers_on_white(layers: list[DocumentLayer]):
    _, merged, has_transparency = read_psd(encode_document("psd", layers))
    expected = composite_layers([layer.load() for layer in layers[:2]])
    white = np.full_like(expected, 255)
    assert has_transparency
    assert (merged[..., 3] == expected[..., 3]).all()
    assert (merged[..., :3] == composite_layers([white, expected])[..., :3]).all()


def test_psd_is_opened_by_pillow(layers: list[DocumentLayer]):
    with Image.open(io.BytesIO(encode_document("psd", layers))) as image:
        assert (image.format, image.mode, image.size) == ("PSD", "RGBA", (WIDTH, HEIGHT))


def test_psd_is_read_by_psd_tools(layers: list[DocumentLayer]):
    psd_tools = pytest.importorskip("psd_tools")
    document = psd_tools.PSDImage.open(io.BytesIO(encode_document("psd", layers)))
    assert [layer.name for layer in document] == list(NAMES)
    assert [layer.visible for layer in document] == [True, True, False]
    for layer, original in zip(document, layers, strict=True):
        assert (np.asarray(layer.topil()) == original.load()).all()


def test_psd_is_read_by_imagemagick(layers: list[DocumentLayer], tmp_path: Path):
    program = shutil.which("magick") or (shutil.which("identify") and shutil.which("convert"))
    if not program:
        pytest.skip("ImageMagick is not installed")
    (tmp_path / "a.psd").write_bytes(encode_document("psd", layers))
    command = [program, "a.psd", "-depth", "8", "layer%d.png"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    # the first image is the merged one
    for number, layer in enumerate(layers, 1):
        rgba, _ = codecs.decode((tmp_path / f"layer{number}.png").read_bytes())
        visible = layer.load()[..., 3] > 0
        assert (rgba[visible] == layer.load()[visible]).all()


def test_openraster_holds_layers_and_the_merged_image(layers: list[DocumentLayer]):
    with zipfile.ZipFile(io.BytesIO(encode_document("ora", layers))) as file:
        first = file.infolist()[0]
        assert (first.filename, first.compress_type) == ("mimetype", zipfile.ZIP_STORED)
        assert file.read("mimetype") == b"image/openraster"
        root = ElementTree.fromstring(file.read("stack.xml"))
        assert (root.get("w"), root.get("h")) == (str(WIDTH), str(HEIGHT))
        elements = root.findall("stack/layer")
        assert [element.get("name") for element in elements] == list(reversed(NAMES))
        visibility = [element.get("visibility") for element in elements]
        assert visibility == ["hidden", "visible", "visible"]
        for element, layer in zip(reversed(elements), layers, strict=True):
            rgba, _ = codecs.decode(file.read(element.get("src", "")))
            assert (rgba == layer.load()).all()
        merged, _ = codecs.decode(file.read("mergedimage.png"))
        assert (merged == composite_layers([layer.load() for layer in layers[:2]])).all()
        thumbnail, _ = codecs.decode(file.read("Thumbnails/thumbnail.png"))
        assert thumbnail.shape == (HEIGHT, WIDTH, 4)


def test_openraster_is_read_by_pyora(layers: list[DocumentLayer], tmp_path: Path):
    pyora = pytest.importorskip("pyora")
    path = tmp_path / "a.ora"
    path.write_bytes(encode_document("ora", layers))
    project = pyora.Project.load(str(path))
    for layer in layers:
        stored = project.get_by_path(f"/{layer.name}")
        assert (np.asarray(stored.get_image_data(raw=True)) == layer.load()).all()
        assert stored.visible == layer.is_visible


def test_openraster_thumbnail_is_at_most_256_pixels():
    image = np.full((30, 600, 4), 255, np.uint8)
    with zipfile.ZipFile(io.BytesIO(encode_document("ora", [layer_of("a", image)]))) as document:
        thumbnail, _ = codecs.decode(document.read("Thumbnails/thumbnail.png"))
    assert thumbnail.shape == (13, 256, 4)


def test_tiff_has_a_page_for_each_layer(layers: list[DocumentLayer]):
    unassociated = (2,)
    with Image.open(io.BytesIO(encode_document("tiff", layers))) as image:
        assert getattr(image, "n_frames", 0) == len(layers)
        for number, layer in enumerate(layers):
            image.seek(number)
            tags: Any = getattr(image, "tag_v2", {})
            assert tags[338] == unassociated
            assert tags[285].encode("latin-1").decode() == layer.name
            assert (np.asarray(image) == layer.load()).all()


def test_zip_holds_numbered_pngs(layers: list[DocumentLayer]):
    renamed = [layer_of("../a:b", layers[0].load()), *layers[1:]]
    with zipfile.ZipFile(io.BytesIO(encode_document("zip", renamed))) as file:
        assert file.namelist() == ["1 .._a_b.png", f"2 {NAMES[1]}.png", "3 hidden.png"]
        for name, layer in zip(file.namelist(), layers, strict=True):
            rgba, _ = codecs.decode(file.read(name))
            assert (rgba == layer.load()).all()


def _kinds() -> Iterator[DocumentKind]:
    yield from get_args(DocumentKind)


@pytest.mark.parametrize("kind", _kinds())
def test_document_of_hidden_layers_with_odd_names_is_written(kind: DocumentKind):
    image = np.full((1, 1, 4), 9, np.uint8)
    layers = [layer_of("\0\x1b\ud800\uffff" + "x" * 300, image, False)] * 2
    data = encode_document(kind, layers)
    assert data == encode_document(kind, layers)
    assert kind in DOCUMENT_MIME_TYPES
    if kind == "psd":
        stored, merged, _ = read_psd(data)
        assert stored[0].name == "????" + "x" * 251
        assert not merged[..., 3].any()


@pytest.mark.parametrize(("kind", "most"), [("psd", 3), ("ora", 3), ("tiff", 1), ("zip", 1)])
def test_document_holds_one_hidden_layer_at_a_time(kind: DocumentKind, most: int):
    alive: list[weakref.ref[Rgba]] = []
    counts: list[int] = []

    def load() -> Rgba:
        image = np.full((2, 2, 4), 9, np.uint8)
        alive.append(weakref.ref(image))
        counts.append(sum(one() is not None for one in alive))
        return image

    # of the visible layers, the merged image needs both
    layers = [DocumentLayer(str(number), load, number in (1, 2)) for number in range(6)]
    write_document(io.BytesIO(), kind, layers)
    assert len(counts) == 6
    assert max(counts) <= most + 1
