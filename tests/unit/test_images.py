"""Pictures as bytes: exact round trips, the `parameters` text in each format, damaged files, and trim, defringe and composite."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from alphalayer.core.errors import InvalidRequest
from alphalayer.core.job import Output
from alphalayer.core.request import ImageFormat
from alphalayer.images import codecs, postprocess


def _picture(height: int = 33, width: int = 50, seed: int = 0) -> np.ndarray:
    """A smooth colour under a disc of alpha, with some noise: neither flat nor random."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    rgba = np.stack([x * 5, y * 7, x + y, 255 - np.hypot(x - width / 2, y - height / 2) * 9], -1)
    return (rgba + rng.integers(0, 9, rgba.shape)).clip(0, 255).astype(np.uint8)


SHAPES = [(1, 1), (1, 7), (9, 1), (33, 50), (64, 64), (130, 257)]


@pytest.mark.parametrize("kind", ["png", "webp"])
@pytest.mark.parametrize("shape", SHAPES)
def test_lossless_formats_come_back_exactly(kind: ImageFormat, shape: tuple[int, int]):
    """Colour under alpha 0 included."""
    rgba = _picture(*shape)
    rgba[0, 0] = (9, 8, 7, 0)
    back, _ = codecs.decode(codecs.encode(rgba, kind))
    assert np.array_equal(back, rgba)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.binary(min_size=1, max_size=64))
def test_any_picture_survives_png(height: int, width: int, content: bytes):
    rgba = np.resize(np.frombuffer(content, np.uint8), (height, width, 4))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(codecs.encode(rgba)))), rgba)


def test_types_are_known_on_machines_that_have_no_list_of_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mimetypes.guess_type", lambda _: (None, None))
    types = {"a_1.png": "png", "preview_1.webp": "webp", "a_1.avif": "avif", "a_1.jpeg": "jpeg"}
    assert {name: codecs.mime_type(name) for name in types} == {
        name: f"image/{kind}" for name, kind in types.items()
    }
    assert codecs.mime_type("a_1") == "application/octet-stream"


def test_a_view_of_a_larger_picture_is_written_as_it_looks():
    whole = _picture(40, 40)
    part = whole[3:20, 5:33]
    assert np.array_equal(codecs.decode(codecs.encode(np.ascontiguousarray(part)))[0], part)
    assert np.array_equal(codecs.decode(codecs.encode(part))[0], part)


def test_png_follows_the_specification():
    """Chunk by chunk: signature, IHDR of 8-bit RGBA, checksums, one deflate stream of filter byte and row, IEND."""
    rgba = _picture()
    data = codecs.encode(rgba, parameters="x")
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = [], 8
    while at < len(data):
        length, name = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(
            name + body
        )
        chunks.append((name, body))
        at += 12 + length
    assert [name for name, _ in chunks] == [b"IHDR", b"tEXt", b"IDAT", b"IEND"]
    assert struct.unpack(">IIBBBBB", chunks[0][1]) == (50, 33, 8, 6, 0, 0, 0)
    assert len(zlib.decompress(chunks[2][1])) == 33 * (1 + 50 * 4)


def test_avif_keeps_alpha_and_colour_nearly():
    rgba = _picture(64, 64)
    back, _ = codecs.decode(codecs.encode(rgba, "avif"))
    assert back.shape == rgba.shape
    # quality 90, and half the colour resolution
    assert np.abs(back[..., 3].astype(int) - rgba[..., 3]).mean() < 3
    solid = rgba[..., 3] > 128
    assert np.abs(back.astype(int) - rgba)[solid].mean() < 8


@pytest.mark.parametrize("kind", ["png", "webp", "avif"])
@pytest.mark.parametrize(
    "text", ["a cup\nSteps: 20, Size: 64x64", "Äpfel, café", "苹果 🍎\nSteps: 1"]
)
def test_parameters_travel_in_every_format(kind: ImageFormat, text: str):
    assert codecs.decode(codecs.encode(_picture(), kind, text))[1] == text


@pytest.mark.parametrize("text", ["latin é", "more 苹果"])
def test_others_read_our_png_text(text: str):
    assert (
        Image.open(io.BytesIO(codecs.encode(_picture(), parameters=text))).info["parameters"]
        == text
    )


@pytest.mark.parametrize("kind", ["png", "webp", "avif"])
def test_no_parameters_are_none(kind: ImageFormat):
    assert codecs.decode(codecs.encode(_picture(), kind))[1] is None


@pytest.mark.parametrize("kind", ["png", "webp"])
@pytest.mark.parametrize("text", ["nul \0 inside", "lone \ud800 surrogate"])
def test_text_that_no_chunk_can_hold_is_replaced(kind: ImageFormat, text: str):
    rgba, found = codecs.decode(codecs.encode(_picture(), kind, text))
    assert found is not None
    assert found.split()[0] == text.split()[0]
    assert np.array_equal(rgba, _picture())


@pytest.mark.parametrize(
    "data", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n", codecs.encode(_picture())[:200]]
)
def test_what_is_no_picture_is_a_clear_error(data: bytes):
    with pytest.raises(InvalidRequest, match="image"):
        codecs.decode(data)


def test_a_flipped_byte_is_a_clear_error():
    data = bytearray(codecs.encode(_picture(130, 257)))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(InvalidRequest, match="damaged"):
        codecs.decode(bytes(data))


def _huge_png(text: bytes = b"parameters\0a cup") -> bytes:
    """A PNG of 9000x9000 with a text, whose pixels are not there."""

    def chunk(name, body):
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 9000, 9000, 8, 6, 0, 0, 0)),
        (b"tEXt", text),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def test_a_chunk_that_is_too_short_is_a_clear_error():
    data = codecs.encode(_picture())
    chunk = b"iCCP?"
    added = struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(InvalidRequest, match="damaged"):
        codecs.decode(data[:-12] + added + data[-12:])


def test_a_picture_that_claims_to_be_huge_is_refused_unread():
    with pytest.raises(InvalidRequest, match="16 megapixels, and it has 9000x9000"):
        codecs.decode(_huge_png())


def test_settings_are_read_without_the_pixels():
    """So of a picture of any size, and where there are none, too: Pillow would decode a PNG to look for its Exif."""
    assert codecs.read_settings(_huge_png()) == ((9000, 9000), "a cup")
    assert codecs.read_settings(_huge_png(b"Comment\0a cup")) == ((9000, 9000), None)


@pytest.mark.parametrize("kind", ["png", "webp", "avif"])
def test_settings_are_those_that_decode_finds(kind: ImageFormat):
    assert codecs.read_settings(codecs.encode(_picture(), kind, "a cup")) == ((50, 33), "a cup")


def test_other_readers_of_pillow_are_out_of_reach():
    """Its EPS reader, for one, starts Ghostscript."""
    written = io.BytesIO()
    Image.fromarray(_picture()[..., :3].copy()).save(written, "EPS")
    for read in (codecs.decode, codecs.read_settings):
        with pytest.raises(InvalidRequest, match="not an image"):
            read(written.getvalue())


def test_formats_without_alpha_are_refused_by_name():
    assert codecs.check_format("PNG") == "png"
    with pytest.raises(InvalidRequest, match="jpeg") as error:
        codecs.check_format("jpeg")
    assert error.value.field == "format"


def test_a_preview_is_a_small_webp():
    data = codecs.encode_preview(_picture()[..., :3].copy())
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size) == ("WEBP", (50, 33))


# --- trim, composite, defringe


def _spot() -> np.ndarray:
    """10 x 12, empty but for rows 3-5 and columns 4-8; one faint pixel at the top left."""
    rgba = np.zeros((10, 12, 4), np.uint8)
    rgba[3:6, 4:9] = (200, 100, 50, 255)
    rgba[0, 0, 3] = 4
    return rgba


def test_trim_cuts_to_what_is_not_empty():
    assert postprocess.trim(_spot()).shape == (6, 9, 4)
    trimmed = postprocess.trim(_spot(), threshold=4)
    assert trimmed.shape == (3, 5, 4)
    assert (trimmed == (200, 100, 50, 255)).all()


def test_trim_leaves_padding_within_the_picture():
    assert postprocess.trim(_spot(), threshold=4, padding=2).shape == (7, 9, 4)
    assert postprocess.trim(_spot(), threshold=4, padding=100).shape == (10, 12, 4)


def test_an_empty_picture_is_not_trimmed():
    empty = np.zeros((5, 6, 4), np.uint8)
    assert np.array_equal(postprocess.trim(empty), empty)


def test_a_trimmed_picture_can_be_written():
    trimmed = postprocess.trim(_spot(), threshold=4)
    assert np.array_equal(codecs.decode(codecs.encode(trimmed))[0], trimmed)


def test_composite_lays_straight_alpha_over_a_colour():
    rgba = np.array([[(200, 100, 0, 255), (200, 100, 0, 0), (200, 100, 0, 51)]], np.uint8)
    # 51 / 255 = 0.2
    expected = [[(200, 100, 0, 255), (10, 20, 30, 255), (48, 36, 24, 255)]]
    assert postprocess.composite(rgba, (10, 20, 30)).tolist() == np.array(expected).tolist()


def test_defringe_spreads_the_solid_colour_over_the_edge_and_no_further():
    rgba = np.zeros((1, 9, 4), np.uint8)
    rgba[0, :, :3] = (0, 255, 0)
    rgba[0, 0] = (200, 10, 10, 255)
    rgba[0, 1:7, 3] = 128
    result = postprocess.defringe(rgba, reach=3)
    assert np.array_equal(result[..., 3], rgba[..., 3])
    assert result[0, :4, :3].tolist() == [[200, 10, 10]] * 4
    assert result[0, 4:, :3].tolist() == [[0, 255, 0]] * 5


def test_defringe_leaves_smoke_alone():
    rgba = _picture()
    rgba[..., 3] = rgba[..., 3] // 2
    assert np.array_equal(postprocess.defringe(rgba), rgba)


def test_finish_does_what_the_output_says_in_its_order():
    assert np.array_equal(postprocess.finish(_spot(), Output()), _spot())
    finished = postprocess.finish(
        _spot(), Output(trim=True, trim_threshold=4, trim_padding=1, background="#0A141E")
    )
    assert finished.shape == (5, 7, 4)
    assert finished[0, 0].tolist() == [10, 20, 30, 255]
    assert finished[2, 3].tolist() == [200, 100, 50, 255]
