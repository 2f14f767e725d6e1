"""Encoded images: round trips, the `parameters` text, damaged files, trim, defringe, composite."""

from __future__ import annotations

import importlib
import io
import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from alphalayer.core.errors import InvalidRequest
from alphalayer.core.job import Output
from alphalayer.core.request import ImageFormat
from alphalayer.images import codecs, files, postprocess


def _image(height: int = 33, width: int = 50, seed: int = 0) -> np.ndarray:
    """Return a smooth colour under a disc of alpha, with some noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    rgba = np.stack([x * 5, y * 7, x + y, 255 - np.hypot(x - width / 2, y - height / 2) * 9], -1)
    return (rgba + rng.integers(0, 9, rgba.shape)).clip(0, 255).astype(np.uint8)


SHAPES = [(1, 1), (1, 7), (9, 1), (33, 50), (64, 64), (130, 257)]


@pytest.mark.parametrize("kind", ["png", "webp"])
@pytest.mark.parametrize("shape", SHAPES)
def test_encode_lossless_format_decodes_exactly(kind: ImageFormat, shape: tuple[int, int]):
    """Keep the colour under alpha 0, too."""
    rgba = _image(*shape)
    rgba[0, 0] = (9, 8, 7, 0)
    back, _ = codecs.decode(codecs.encode(rgba, kind))
    assert np.array_equal(back, rgba)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.binary(min_size=1, max_size=64))
def test_encode_any_image_survives_png(height: int, width: int, content: bytes):
    rgba = np.resize(np.frombuffer(content, np.uint8), (height, width, 4))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(codecs.encode(rgba)))), rgba)


def test_mime_type_without_a_system_list_is_known(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mimetypes.guess_type", lambda _: (None, None))
    types = {"a_1.png": "png", "preview_1.webp": "webp", "a_1.avif": "avif", "a_1.jpeg": "jpeg"}
    assert {name: codecs.mime_type(name) for name in types} == {
        name: f"image/{kind}" for name, kind in types.items()
    }
    assert codecs.mime_type("a_1") == "application/octet-stream"


def test_encode_view_of_a_larger_array_keeps_its_pixels():
    whole = _image(40, 40)
    part = whole[3:20, 5:33]
    assert np.array_equal(codecs.decode(codecs.encode(np.ascontiguousarray(part)))[0], part)
    assert np.array_equal(codecs.decode(codecs.encode(part))[0], part)


def test_encode_png_follows_the_specification():
    """Check the signature and each chunk.

    The chunks are IHDR of 8-bit RGBA, one deflate stream of filter byte and row, and IEND.
    """
    rgba = _image()
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


def test_encode_avif_keeps_alpha_and_colour_nearly():
    rgba = _image(64, 64)
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
def test_encode_parameters_are_kept_in_every_format(kind: ImageFormat, text: str):
    assert codecs.decode(codecs.encode(_image(), kind, text))[1] == text


@pytest.mark.parametrize("text", ["latin é", "more 苹果"])
def test_encode_png_text_is_readable_by_pillow(text: str):
    assert (
        Image.open(io.BytesIO(codecs.encode(_image(), parameters=text))).info["parameters"] == text
    )


@pytest.mark.parametrize("kind", ["png", "webp", "avif"])
def test_decode_without_parameters_returns_none(kind: ImageFormat):
    assert codecs.decode(codecs.encode(_image(), kind))[1] is None


@pytest.mark.parametrize("kind", ["png", "webp"])
@pytest.mark.parametrize("text", ["nul \0 inside", "lone \ud800 surrogate"])
def test_encode_invalid_characters_of_a_text_are_replaced(kind: ImageFormat, text: str):
    rgba, parameters = codecs.decode(codecs.encode(_image(), kind, text))
    assert parameters is not None
    assert parameters.split()[0] == text.split()[0]
    assert np.array_equal(rgba, _image())


@pytest.mark.parametrize(
    "data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", codecs.encode(_image())[:200]]
)
def test_decode_other_data_is_a_clear_error(data: bytes):
    with pytest.raises(InvalidRequest, match="image"):
        codecs.decode(data)


def test_decode_flipped_byte_is_a_clear_error():
    data = bytearray(codecs.encode(_image(130, 257)))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(InvalidRequest, match="damaged"):
        codecs.decode(bytes(data))


def _chunk(name: bytes, body: bytes = b"") -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _huge_png(text: bytes = b"parameters\0a cup", side: int = 9000) -> bytes:
    """Return a PNG of 9000x9000 with a text and without pixels."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)),
        (b"tEXt", text),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, body) for name, body in chunks)


def _with_chunks(chunks: bytes) -> bytes:
    """Return a PNG with additional chunks after its header."""
    data = codecs.encode(_image())
    return data[:33] + chunks + data[33:]


def test_decode_short_chunk_is_a_clear_error():
    data = codecs.encode(_image())
    chunk = b"iCCP?"
    added = struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(InvalidRequest, match="damaged"):
        codecs.decode(data[:-12] + added + data[-12:])


def test_decode_huge_size_in_header_is_refused_unread():
    with pytest.raises(InvalidRequest, match="16 megapixels, and it has 9000x9000"):
        codecs.decode(_huge_png())


def test_decode_size_far_beyond_the_limit_is_refused():
    with pytest.raises(InvalidRequest, match="far more pixels"):
        codecs.decode(_huge_png(side=60_000))


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        (_chunk(b"tEXt", b"parameters\0" + b"x" * (files.MAX_TEXT + 1)), "1,000,001 characters"),
        (_chunk(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(5_000_000))), "damaged"),
        (_chunk(b"iTXt", b"parameters\0\1\0\0\0" + zlib.compress(bytes(5_000_000))), "damaged"),
        (_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(5_000_000))), "damaged"),
        (_chunk(b"abCd") * 500, "too many parts"),
    ],
    ids=["tEXt", "zTXt", "iTXt", "iCCP", "chunks"],
)
def test_png_bomb_of_chunks_is_refused(
    chunks: bytes, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(files, "MAX_READS", 500)
    for read in (codecs.decode, files.read_settings):
        with pytest.raises(InvalidRequest, match=message):
            read(_with_chunks(chunks))


def test_exif_with_many_damaged_tags_is_silent(recwarn: pytest.WarningsRecorder):
    """Log nothing: each tag was a warning, and a file has up to 60,000 of them."""
    tags = b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHIII", 0x8769, 4, 1, 26, 0)
    tags += struct.pack("<H", 500)
    tags += b"".join(struct.pack("<HHII", number, 2, 10**7, 100) for number in range(500))
    with warnings.catch_warnings():
        warnings.resetwarnings()
        importlib.reload(files)
        assert files.read_settings(_with_chunks(_chunk(b"eXIf", tags)))[1] is None
    assert not recwarn.list


def _jpeg(mode: str = "RGB", **options: bool) -> bytes:
    written = io.BytesIO()
    Image.fromarray(_image()).convert(mode).save(written, "JPEG", **options)
    return written.getvalue()


def test_jpeg_with_many_scans_or_segments_is_refused(monkeypatch: pytest.MonkeyPatch):
    """A scan takes time by the pixels of the image, and a file has room for thousands."""
    data = _jpeg(progressive=True)
    last = data.rindex(b"\xff\xda")
    assert codecs.decode(data)[0].shape == (33, 50, 4)
    with pytest.raises(InvalidRequest, match="has 110 scans; at most 100"):
        codecs.decode(data[:last] + data[last:-2] * 101 + data[-2:])
    monkeypatch.setattr(files, "MAX_READS", 500)
    for segments in (b"\xff\xfe\0\2" * 500, b"\xff" * 1000):
        with pytest.raises(InvalidRequest, match="too many parts"):
            codecs.decode(data[:2] + segments + data[2:])


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_decode_animation_decodes_its_first_frame(kind: str):
    frames = [Image.new("RGBA", (9, 7), (number, 0, 0, 255)) for number in range(200)]
    written = io.BytesIO()
    frames[0].save(written, kind, save_all=True, append_images=frames[1:], lossless=True)
    assert codecs.decode(written.getvalue())[0].tolist() == np.asarray(frames[0]).tolist()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_decode_any_mode_of_png_equals_pillow(mode: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(codecs, "STRIP_PIXELS", 200)
    image = Image.fromarray(_image()).convert(mode)
    written = io.BytesIO()
    image.save(written, "PNG", **({"transparency": 3} if mode == "P" else {}))
    expected = np.asarray(Image.open(io.BytesIO(written.getvalue())).convert("RGBA"))
    assert np.array_equal(codecs.decode(written.getvalue())[0], expected)


def test_decode_cmyk_jpeg_equals_pillow():
    data = _jpeg("CMYK")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))
    assert np.array_equal(codecs.decode(data)[0], expected)


def test_count_pixels_of_an_unknown_size_is_the_limit():
    assert files.count_pixels(codecs.encode(_image())) == 33 * 50
    assert files.count_pixels(_huge_png()) == files.count_pixels(b"x") == files.MAX_PIXELS


def test_read_settings_needs_no_pixels():
    """Read images of any size; Pillow would decode a PNG to search its Exif."""
    assert files.read_settings(_huge_png()) == ((9000, 9000), "a cup")
    assert files.read_settings(_huge_png(b"Comment\0a cup")) == ((9000, 9000), None)


COMMENT = "ein großer Apfel\nSteps: 2"


@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + COMMENT.encode("utf-16-be"),
        b"UNICODE\0" + COMMENT.encode("utf-16-le"),
        b"UNICODE\0" + b"\xff\xfe" + COMMENT.encode("utf-16-le"),
        b"UNICODE\0" + f"{COMMENT}\0\0".encode("utf-16-be"),
        b"ASCII\0\0\0" + COMMENT.encode(),
        bytes(8) + COMMENT.encode() + b"\0",
    ],
)
def test_read_settings_reads_each_encoding_of_comments(comment: bytes):
    assert files.read_settings(_commented(comment)) == ((2, 2), COMMENT)


@pytest.mark.parametrize("head", [b"UNICODE\0", b"ASCII\0\0\0", bytes(8), b"JIS\0\0\0\0\0"])
def test_read_settings_without_text_in_a_comment_has_none(head: bytes):
    for text in (b"", bytes(4)):
        assert files.read_settings(_commented(head + text)) == ((2, 2), None)


def _commented(comment: bytes) -> bytes:
    """Return a JPEG file with a user comment."""
    exif = Image.Exif()
    exif.get_ifd(files.EXIF_IFD)[files.USER_COMMENT] = comment
    written = io.BytesIO()
    Image.new("RGB", (2, 2)).save(written, "JPEG", exif=exif)
    return written.getvalue()


@pytest.mark.parametrize("kind", ["png", "webp", "avif"])
def test_read_settings_equals_decode(kind: ImageFormat):
    assert files.read_settings(codecs.encode(_image(), kind, "a cup")) == ((50, 33), "a cup")


def test_decode_uses_no_other_reader_of_pillow():
    """Refuse EPS, for example, whose reader starts Ghostscript."""
    written = io.BytesIO()
    Image.fromarray(_image()[..., :3].copy()).save(written, "EPS")
    for read in (codecs.decode, files.read_settings):
        with pytest.raises(InvalidRequest, match="not an image"):
            read(written.getvalue())


def test_check_format_without_alpha_is_refused_by_name():
    assert codecs.check_format("PNG") == "png"
    with pytest.raises(InvalidRequest, match="jpeg") as error:
        codecs.check_format("jpeg")
    assert error.value.field == "format"


def test_encode_preview_is_a_small_webp():
    data = codecs.encode_preview(_image()[..., :3].copy())
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size) == ("WEBP", (50, 33))


# --- strips, trim, composite, defringe


@pytest.mark.parametrize("strip", [1, 37, 400])
def test_image_in_strips_equals_the_whole(strip: int, monkeypatch: pytest.MonkeyPatch):
    rgba = _image(130, 57)
    rgba[60:64, ::3, 3] = 255

    def results() -> list[np.ndarray]:
        encoded = codecs.encode(rgba)
        return [
            postprocess.defringe(rgba),
            postprocess.composite(rgba, (10, 20, 30)),
            codecs.decode(encoded)[0],
            np.asarray(Image.open(io.BytesIO(encoded))),
        ]

    whole = results()
    assert not np.array_equal(whole[0], rgba)
    monkeypatch.setattr(codecs, "STRIP_PIXELS", strip)
    assert all(map(np.array_equal, results(), whole))


def test_defringe_takes_little_memory_beside_the_image(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(codecs, "STRIP_PIXELS", 4096)
    rgba = np.resize(_image(128, 128), (1024, 128, 4))
    tracemalloc.start()
    postprocess.defringe(rgba)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * rgba.nbytes


def _spot() -> np.ndarray:
    """Return 10 x 12 pixels, visible in rows 3-5 and columns 4-8.

    One faint pixel is at the top left.
    """
    rgba = np.zeros((10, 12, 4), np.uint8)
    rgba[3:6, 4:9] = (200, 100, 50, 255)
    rgba[0, 0, 3] = 4
    return rgba


def test_trim_cuts_to_the_visible_pixels():
    assert postprocess.trim(_spot()).shape == (6, 9, 4)
    trimmed = postprocess.trim(_spot(), threshold=4)
    assert trimmed.shape == (3, 5, 4)
    assert (trimmed == (200, 100, 50, 255)).all()


def test_trim_leaves_padding_within_the_image():
    assert postprocess.trim(_spot(), threshold=4, padding=2).shape == (7, 9, 4)
    assert postprocess.trim(_spot(), threshold=4, padding=100).shape == (10, 12, 4)


def test_trim_empty_image_is_unchanged():
    empty = np.zeros((5, 6, 4), np.uint8)
    assert np.array_equal(postprocess.trim(empty), empty)


def test_trim_result_can_be_encoded():
    trimmed = postprocess.trim(_spot(), threshold=4)
    assert np.array_equal(codecs.decode(codecs.encode(trimmed))[0], trimmed)


def test_composite_blends_straight_alpha_over_a_colour():
    rgba = np.array([[(200, 100, 0, 255), (200, 100, 0, 0), (200, 100, 0, 51)]], np.uint8)
    # 51 / 255 = 0.2
    expected = [[(200, 100, 0, 255), (10, 20, 30, 255), (48, 36, 24, 255)]]
    assert postprocess.composite(rgba, (10, 20, 30)).tolist() == np.array(expected).tolist()


def test_defringe_spreads_solid_colour_within_its_reach():
    rgba = np.zeros((1, 9, 4), np.uint8)
    rgba[0, :, :3] = (0, 255, 0)
    rgba[0, 0] = (200, 10, 10, 255)
    rgba[0, 1:7, 3] = 128
    result = postprocess.defringe(rgba, reach=3)
    assert np.array_equal(result[..., 3], rgba[..., 3])
    assert result[0, :4, :3].tolist() == [[200, 10, 10]] * 4
    assert result[0, 4:, :3].tolist() == [[0, 255, 0]] * 5


def test_defringe_without_solid_pixels_changes_nothing():
    rgba = _image()
    rgba[..., 3] = rgba[..., 3] // 2
    assert np.array_equal(postprocess.defringe(rgba), rgba)


def test_finish_applies_the_output_options_in_order():
    assert np.array_equal(postprocess.finish(_spot(), Output()), _spot())
    finished = postprocess.finish(
        _spot(), Output(trim=True, trim_threshold=4, trim_padding=1, background="#0A141E")
    )
    assert finished.shape == (5, 7, 4)
    assert finished[0, 0].tolist() == [10, 20, 30, 255]
    assert finished[2, 3].tolist() == [200, 100, 50, 255]


def test_convert_of_more_pixels_than_generated_is_refused():
    data = codecs.encode(np.zeros((1, 16_000_001, 4), np.uint8))
    with pytest.raises(InvalidRequest, match="the limit is 16 megapixels"):
        postprocess.convert(data, Output())


def test_encode_input_drops_the_settings_and_refuses_a_long_side():
    rgba = np.full((2, 3, 4), 9, np.uint8)
    plain, with_settings = codecs.encode(rgba), codecs.encode(rgba, parameters="Steps: 1")
    assert codecs.encode_input(with_settings).data == codecs.encode_input(plain).data == plain
    long = codecs.encode(np.zeros((1, codecs.MAX_INPUT_SIDE + 1, 4), np.uint8))
    with pytest.raises(InvalidRequest, match="16384 pixels a side, and it has 16385x1 pixels"):
        codecs.encode_input(long)


def test_input_is_turned_by_its_exif_data():
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[0, 0] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # a quarter turn to the right shows it upright
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, "PNG", exif=exif)
    file = codecs.encode_input(buffer.getvalue())
    turned, _ = codecs.decode(file.data)
    assert (file.width, file.height, file.is_opaque) == (2, 3, False)
    assert turned.shape == (3, 2, 4)
    assert turned[0, 1].tolist() == [255] * 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_input_is_turned_as_pillow_turns_it(orientation: int):
    rgba = np.random.default_rng(0).integers(0, 256, (2, 3, 4), np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, "PNG", exif=exif)
    with Image.open(buffer) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(codecs.decode_upright(buffer.getvalue()), expected)


@pytest.mark.filterwarnings("ignore:Truncated")
@pytest.mark.parametrize("kind", range(14))
def test_orientation_of_an_odd_type_is_ignored(kind: int):
    exif = b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHI4s", 0x112, kind, 1, b"\xff" * 4)
    data = _with_chunks(_chunk(b"eXIf", exif + bytes(4)))
    np.testing.assert_array_equal(codecs.decode_upright(data), codecs.decode(data)[0])


def test_grey_of_16_bits_is_scaled():
    grey = np.array([[0, 255, 256, 0x8000, 0xFFFF]], np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG")
    rgba, _ = codecs.decode(buffer.getvalue())
    assert rgba[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    assert (rgba[..., 3] == 255).all()


@pytest.mark.parametrize(
    ("pixel", "reading", "invert", "changed"),
    [
        ((255, 255, 255, 255), "white", False, 255),
        ((255, 255, 255, 255), "white", True, 0),
        ((90, 90, 90, 255), "white", False, 90),
        ((0, 0, 0, 129), "white", False, 255),
        ((255, 255, 255, 128), "white", False, 0),
        ((9, 9, 9, 0), "transparent", False, 255),
        ((9, 9, 9, 0), "transparent", True, 0),
    ],
)
def test_mask_is_white_where_the_image_is_changed(pixel, reading, invert, changed):
    rgba = np.full((2, 2, 4), pixel, np.uint8)
    mask, _ = codecs.decode(codecs.encode_mask(codecs.encode(rgba), reading, invert=invert).data)
    assert mask[0, 0].tolist() == [changed] * 3 + [255]


def test_opaque_mask_has_no_transparent_part():
    with pytest.raises(InvalidRequest, match="the mask is opaque"):
        codecs.encode_mask(codecs.encode(np.full((2, 2, 4), 255, np.uint8)), "transparent")
