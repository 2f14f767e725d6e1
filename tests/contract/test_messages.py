"""Messages of invalid requests in all dialects: the field, its value and what is accepted."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest
from tests.support.serving import served

from alphalayer.core.samplers import SAMPLERS

NATIVE, JOBS, A1111, OPENAI = (
    "/alpha/v1/txt2img",
    "/alpha/v1/jobs",
    "/sdapi/v1/txt2img",
    "/v1/images/generations",
)
JSON = {"Content-Type": "application/json"}
RESIZE_MODES = "'Just Resize', 'Crop and Resize' or 'Resize and Fill'"
SIZES = "auto or WIDTHxHEIGHT, each a whole number from 64 to 2048"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with served(tmp_path_factory.mktemp("service")) as client:
        yield client


@pytest.mark.parametrize(
    ("path", "fields", "words"),
    [
        (NATIVE, {"width": 4096}, "width: got 4096; at most 2048."),
        (NATIVE, {"height": 63}, "height: got 63; at least 64."),
        (NATIVE, {"steps": 2.5}, "steps: got 2.5; a whole number."),
        (NATIVE, {"steps": "many"}, 'steps: got "many"; a whole number.'),
        (NATIVE, {"steps": [1]}, "steps: got [1]; a whole number."),
        (NATIVE, {"cfg_scale": "strong"}, 'cfg_scale: got "strong"; a number.'),
        (NATIVE, {"trim": "perhaps"}, 'trim: got "perhaps"; true or false.'),
        (NATIVE, {"prompt": 7}, "prompt: got 7; a text."),
        (NATIVE, {"prompt": None}, "prompt: it must be given."),
        (
            NATIVE,
            {"sampler_name": "Magic"},
            f'sampler_name: unknown sampler "Magic"; use one of: {", ".join(SAMPLERS)}.',
        ),
        (NATIVE, {"colour": None}, "colour: there is no such field."),
        (
            NATIVE,
            {"layerdiffuse_resize_mode": "Stretch"},
            f'layerdiffuse_resize_mode: got "Stretch"; {RESIZE_MODES}.',
        ),
        (
            NATIVE,
            {"layerdiffuse_output_origin": True},
            "layerdiffuse_output_origin: the image before decoding is not implemented.",
        ),
        (NATIVE, {"prompt": "a" * 10_001}, "prompt: got 10001 characters; at most 10000."),
        (NATIVE, {"format": "gif"}, "format: got \"gif\"; 'png', 'webp' or 'avif'."),
        (NATIVE, {"format": "g" * 99}, f"format: got \"{'g' * 59}…; 'png', 'webp' or 'avif'."),
        (NATIVE, {"background": "white"}, 'background: got "white"; a colour such as "#ffffff".'),
        (NATIVE, {"loras": "x"}, 'loras: got "x"; a list.'),
        (NATIVE, {"loras": [{"name": "x"}] * 17}, "loras: got 17 entries; at most 16."),
        (
            NATIVE,
            {"loras": [{"name": "x", "weight": 101}]},
            "loras.0.weight: got 101; at most 100.",
        ),
        (NATIVE, {"checkpoint": ""}, "checkpoint: it is empty."),
        (NATIVE, {"colour": "red"}, "colour: there is no such field."),
        (JOBS, {"previews": 3}, "previews: got 3; true or false."),
        (A1111, {"width": 4096}, "width: got 4096; at most 2048."),
        (A1111, {"steps": 2.5}, "steps: got 2.5; a whole number."),
        (A1111, {"n_iter": 100}, "n_iter: got 100; at most 16."),
        (A1111, {"override_settings": 1}, "override_settings: got 1; an object."),
        (OPENAI, {"size": "63x64"}, f'size: got "63x64"; {SIZES}.'),
        (OPENAI, {"size": "64x2049"}, f'size: got "64x2049"; {SIZES}.'),
        (OPENAI, {"size": "64x64\n"}, f'size: got "64x64\\n"; {SIZES}.'),
        (OPENAI, {"size": "large"}, f'size: got "large"; {SIZES}.'),
        (OPENAI, {"n": 11}, "n: got 11; at most 10."),
        (OPENAI, {"response_format": "png"}, "response_format: got \"png\"; 'url' or 'b64_json'."),
    ],
)
def test_invalid_field_message_is_plain(
    client: httpx.Client, path: str, fields: dict[str, object], words: str
):
    answer = client.post(path, json={"prompt": "an apple", **fields})
    assert answer.status_code in (400, 422)
    body = answer.json()
    text = body["error"]["message"] if "error" in body else body["detail"]
    assert text.removesuffix(" The fields are described at /docs.") == words


@pytest.mark.parametrize(
    ("fields", "like"),
    [
        ({"promt": "an apple"}, "prompt"),
        ({"model": "apples"}, "checkpoint"),
        ({"sampler": "Euler"}, "sampler_name"),
        ({"colour": "red"}, None),
    ],
)
def test_unknown_field_is_reported_before_missing_ones(
    client: httpx.Client, fields: dict[str, object], like: str | None
):
    for path in (NATIVE, JOBS):
        body = client.post(path, json=fields).json()
        assert body["detail"] == f"{next(iter(fields))}: there is no such field."
        assert body["hint"].partition(" The fields")[0] == (
            f'Did you mean "{like}"?' if like else body["hint"]
        )


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "it must be given."), (b"[]", "got []; an object.")]
)
def test_invalid_body_message_is_plain(client: httpx.Client, content: bytes, words: str):
    assert (
        client.post(NATIVE, content=content, headers=JSON).json()["detail"] == f"the body: {words}"
    )


@pytest.mark.parametrize(
    ("path", "query", "words"), [(JOBS, "?limit=all", 'limit: got "all"; a whole number.')]
)
def test_invalid_query_message_is_plain(client: httpx.Client, path: str, query: str, words: str):
    assert client.get(path + query).json()["detail"] == words


@pytest.mark.parametrize(
    "more",
    [
        {"alwayson_scripts": {"\ud800": {"args": []}}},
        {"alwayson_scripts": {"\ud800": 3}},
        {"alwayson_scripts": {"LayerDiffuse": {"args": []}, "\ud800": {}}},
        {"alwayson_scripts": {"LayerDiffuse": {"args": [True, "\ud800"]}}},
        {"alwayson_scripts": {"LayerDiffuse": {"args": [True, *[None] * 11, "\ud800"]}}},
        {"sampler_name": "Euler", "sampler_index": "\ud800"},
        {"sampler_name": "Euler Karras", "scheduler": "\ud800"},
        {"override_settings": {"sd_model_checkpoint": "\ud800"}},
        {"force_task_id": "\ud800"},
    ],
)
def test_invalid_unicode_is_reported(client: httpx.Client, more: dict[str, object]):
    answer = client.post(
        A1111, content=json.dumps({"prompt": "a", "width": 64, "height": 64, **more}), headers=JSON
    )
    assert answer.status_code == 422
    assert "Unicode" in answer.json()["detail"]


def test_missing_prompt_and_invalid_text_are_named(client: httpx.Client):
    assert client.post(NATIVE, json={}).json()["detail"] == "prompt: it must be given."
    lone = client.post(NATIVE, content=b'{"prompt": "a", "format": "\\ud800"}', headers=JSON)
    assert lone.status_code == 422
    assert lone.json()["detail"].startswith("format: got ")
