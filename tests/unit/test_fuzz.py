"""Bytes and texts from outside: whatever they are, a parser answers or names its own error. Inputs are generated, and kept
near to what is valid by damaging real files."""

# ruff: noqa: PT017 - an error is one of the two answers that are right
from __future__ import annotations

import contextlib
import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from alphalayer.catalog.headers import family_of, read_header
from alphalayer.core.errors import CorruptFile, FileMissing, InvalidRequest
from alphalayer.core.job import Output
from alphalayer.core.request import GenerationRequest
from alphalayer.engine.text.grammar import parse_weights, schedule_prompt, split_and
from alphalayer.images import codecs, infotext
from alphalayer.storage.objects import open_storage

often = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
entries = st.dictionaries(
    st.text(max_size=12) | st.just("__metadata__"),
    json_values
    | st.fixed_dictionaries(
        {
            "dtype": st.just("F16"),
            "shape": st.lists(st.integers(), max_size=4),
            "data_offsets": st.lists(json_values, max_size=3),
        }
    ),
    max_size=4,
)


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """A file with some of its bytes changed, its end cut off, or something put in."""
    changes = st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=12)

    def apply(parts: tuple[list[tuple[int, int]], int, bytes]) -> bytes:
        changed, end, more = parts
        data = bytearray(whole)
        for at, value in changed:
            data[at] = value
        return bytes(data[:end]) + more

    return st.tuples(changes, st.integers(0, len(whole)), st.binary(max_size=8)).map(apply)


@often
@given(
    header=json_values | entries,
    length=st.none() | st.integers(0, 2**64 - 1),
    rest=st.binary(max_size=64),
)
def test_safetensors_headers(tmp_path: Path, header: object, length: int | None, rest: bytes):
    text = json.dumps(header).encode()
    file = tmp_path / "any.safetensors"
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + rest)
    try:
        assert isinstance(family_of(read_header(file)), str)
    except CorruptFile as error:
        assert str(file) in str(error)


@often
@given(data=st.binary(max_size=200))
def test_files_that_are_no_safetensors_at_all(tmp_path: Path, data: bytes):
    file = tmp_path / "any.safetensors"
    file.write_bytes(data)
    try:
        read_header(file)
    except CorruptFile as error:
        assert str(file) in str(error)


def _picture(kind: str) -> bytes:
    rgba = np.random.default_rng(0).integers(0, 255, (12, 9, 4), dtype=np.uint8)
    return codecs.encode(rgba, kind, "an apple\nSteps: 20, Sampler: Euler, Seed: 1")


def _foreign_png() -> bytes:
    """A PNG of another program: palette, compressed text, EXIF."""
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "x" * 300, zip=True)
    written = io.BytesIO()
    picture = Image.new("P", (5, 5))
    exif = Image.Exif()
    exif[0x9286] = b"UNICODE\0\0a"
    picture.save(written, "PNG", pnginfo=text, exif=exif, transparency=0)
    return written.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "whole",
    [_picture("png"), _picture("webp"), _picture("avif"), _foreign_png()],
    ids=["png", "webp", "avif", "foreign png"],
)
def test_pictures(whole: bytes):
    @often
    @given(data=damaged(whole) | st.binary(max_size=60))
    def check(data: bytes) -> None:
        try:
            codecs.read_settings(data)
            rgba, parameters = codecs.decode(data)
            assert rgba.shape[2] == 4
            assert parameters is None or isinstance(infotext.read_parameters(parameters), dict)
        except InvalidRequest as error:
            assert "picture" in str(error)

    check()


words = st.text(alphabet=st.sampled_from("ab ,():[]|\\\n0.9-&BREAKND<>"), max_size=60) | st.text(
    max_size=60
)


@often
@given(prompt=words, steps=st.integers(1, 150))
def test_prompts(prompt: str, steps: int):
    try:
        until = 0
        for last, text in schedule_prompt(prompt, steps):
            assert last > until
            until = last
            for part, weight in split_and(text):
                assert isinstance(weight, float)
                for fragment in parse_weights(part):
                    assert abs(fragment.weight) <= 10_000
        assert until == steps, "the schedule reaches the last step"
    except InvalidRequest as error:
        assert error.field == "prompt"


@often
@given(text=words)
def test_infotexts(text: str):
    pairs = infotext.read_parameters(text)
    assert all(isinstance(value, str) for value in pairs.values())


@often
@given(prompt=st.text(min_size=1, max_size=80).filter(str.strip), negative=st.text(max_size=40))
def test_the_settings_in_a_png_come_back(prompt: str, negative: str):
    request = GenerationRequest(prompt=prompt, negative_prompt=negative)
    text = infotext.write_parameters(request, "model", "0" * 10, 7)
    data = codecs.encode(np.zeros((1, 1, 4), np.uint8), Output().format, text)
    assert codecs.decode(data)[1] is not None
    assert infotext.read_parameters(text)["Seed"] == "7"


names = st.text(alphabet=st.sampled_from("./\\%2eF0~a\0\n :-_"), max_size=24) | st.text(max_size=40)


@often
@given(name=names)
async def test_no_name_reads_outside_the_folder(tmp_path: Path, name: str):
    folder = tmp_path / "pictures"
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "pictures.png").write_bytes(b"secret")
    storage = open_storage(str(folder))
    storage.put("mine.png", b"mine")
    try:
        stored = await storage.open(name)
        assert b"".join([chunk async for chunk in stored.chunks]) == b"mine"
        assert (folder / name).resolve().parent == folder.resolve()
    except FileMissing:
        pass
    for wish in ("delete", "put"):
        with contextlib.suppress(FileMissing):
            getattr(storage, wish)(name, *([b"mine"] if wish == "put" else []))
    assert (tmp_path / "secret.png").read_bytes() == b"secret"
    assert {each.name for each in tmp_path.iterdir()} == {"secret.png", "pictures.png", "pictures"}
