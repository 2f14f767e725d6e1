"""The OpenAI Images contract, `/v1`, over real HTTP.

The requests are those of the openai package, recorded ones of other clients, and direct ones.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from tests.support.serving import put_model, served, wait_until

from alphalayer.api.errors import Problem
from alphalayer.api.openai.routes import DIALECT
from alphalayer.core.errors import AlphalayerError
from alphalayer.engine.fake import render_disc

RECORDED = Path(__file__).parent / "recorded"
SMALL = {"prompt": "an apple", "model": "gpt-image-1", "size": "64x64"}
SEED = {"extra_body": {"seed": 7}}
NO_TOKENS = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with served(put_model(tmp_path_factory.mktemp("service"))) as client:
        yield client


@pytest.fixture(scope="module")
def api(client):
    with openai.OpenAI(
        base_url=f"{client.base_url}/v1".replace("//v1", "/v1"), api_key="anything"
    ) as api:
        yield api


def image_of(data):
    return Image.open(io.BytesIO(base64.b64decode(data.b64_json, validate=True)))


def test_openai_client_generates_images(api):
    answer = api.images.generate(
        **SMALL, n=2, quality="low", background="transparent", user="ann", **SEED
    )
    for i, data in enumerate(answer.data):
        np.testing.assert_array_equal(
            np.asarray(image_of(data)), render_disc("an apple", 7 + i, 64, 64)
        )
        assert data.url is None
    settings = answer.to_dict()
    assert settings["created"] > 1_700_000_000
    del settings["created"], settings["data"]
    assert settings == {
        "background": "transparent",
        "output_format": "png",
        "quality": "low",
        "size": "64x64",
        "usage": NO_TOKENS,
    }
    assert "Steps: 12" in image_of(answer.data[0]).info["parameters"]


async def test_openai_async_client_generates_and_streams(client):
    async with openai.AsyncOpenAI(
        base_url=f"{client.base_url}/v1".replace("//v1", "/v1"), api_key="x"
    ) as api:
        answer = await api.images.generate(**SMALL, **SEED)
        assert image_of(answer.data[0]).size == (64, 64)
        stream = await api.images.generate(**SMALL, **SEED, stream=True)
        assert [event.type async for event in stream] == ["image_generation.completed"]


def test_stream_with_partial_images_sends_them(tmp_path):
    with (
        served(tmp_path, engine_options={"step_s": 0.05}) as client,
        openai.OpenAI(base_url=f"{client.base_url}/v1".replace("//v1", "/v1"), api_key="x") as api,
    ):
        events = list(
            api.images.generate(
                **SMALL, **SEED, stream=True, partial_images=2, output_format="webp"
            )
        )
        *partial, last = events
        assert [(event.type, event.partial_image_index) for event in partial] == [
            ("image_generation.partial_image", 0),
            ("image_generation.partial_image", 1),
        ]
        assert {image_of(event).format for event in events} == {"WEBP"}
        assert last.type == "image_generation.completed"
        assert last.size == "64x64"
        assert last.usage.total_tokens == 0
        np.testing.assert_array_equal(
            np.asarray(image_of(last).convert("RGBA")), render_disc("an apple", 7, 64, 64)
        )


def test_stream_of_a_queued_job_is_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr("alphalayer.api.openai.streaming.SILENT_S", 0.1)
    with served(tmp_path, engine_options={"step_s": 0.05}) as client:
        slow = client.post(
            "/alpha/v1/jobs", json={"prompt": "first", "steps": 20, "width": 64, "height": 64}
        ).json()
        with client.stream(
            "POST", "/v1/images/generations", json={**SMALL, "stream": True}
        ) as answer:
            assert answer.headers["cache-control"] == "no-cache"
            assert answer.headers["x-accel-buffering"] == "no"
            lines = iter(answer.iter_lines())
            assert next(lines).startswith(":")
            assert client.get(slow["url"]).json()["state"] != "done"
            assert "event: image_generation.completed" in list(lines)


def test_stream_disconnected_or_cancelled_ends_its_job(tmp_path):
    with (
        served(tmp_path, engine_options={"step_s": 0.01}) as client,
        openai.OpenAI(base_url=f"{client.base_url}/v1".replace("//v1", "/v1"), api_key="x") as api,
    ):
        slow = {**SMALL, "quality": "max", "n": 10, "stream": True, "partial_images": 3}

        def states():
            return [job["state"] for job in client.get("/alpha/v1/jobs").json()["jobs"]]

        with api.images.generate(**slow) as stream:
            next(iter(stream))
        wait_until(lambda: states() == ["cancelled"])
        stream = api.images.generate(**slow)
        next(iter(stream))
        client.delete(f"/alpha/v1/jobs/{client.get('/alpha/v1/jobs').json()['jobs'][0]['id']}")
        with pytest.raises(openai.APIError, match="cancelled"):
            list(stream)


def test_generations_sizes_models_and_qualities_are_applied(api, client):
    assert api.images.generate(prompt="x", model="any", size="auto", **SEED).size == "1024x1024"
    assert api.images.generate(prompt="x", size="144x80", **SEED).size == "144x80"
    listed = api.models.list().data
    assert listed[0].object == "model"
    assert api.models.retrieve(listed[0].id) == listed[0]
    assert api.images.generate(prompt="x", model=listed[0].id, size="64x64").data
    with pytest.raises(openai.NotFoundError) as caught:
        api.models.retrieve("nowhere")
    assert caught.value.code == "model_not_found"
    for quality, steps in (("hd", 30), ("standard", 20), ("auto", 20)):
        image = image_of(api.images.generate(**SMALL, quality=quality).data[0])
        assert f"Steps: {steps}," in image.info["parameters"]


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
@pytest.mark.parametrize("compression", [None, 60])
def test_generations_formats_and_backgrounds_are_applied(api, kind, compression):
    extra = {"output_compression": compression} if compression and kind != "png" else {}
    answer = api.images.generate(**SMALL, **SEED, output_format=kind, background="opaque", **extra)
    image = image_of(answer.data[0])
    assert image.format == kind.upper()
    assert answer.background == "opaque"
    assert np.asarray(image.convert("RGBA"))[0, 0].min() > 250
    if kind != "jpeg":
        answer = api.images.generate(
            **SMALL, **SEED, output_format=kind, background="auto", **extra
        )
        assert answer.background == "transparent"
        assert np.asarray(image_of(answer.data[0]).convert("RGBA"))[0, 0, 3] == 0


@pytest.mark.parametrize(
    ("kind", "compression"), [("png", 100), ("webp", 100), ("webp", 50), ("jpeg", 80)]
)
def test_generations_url_returns_the_image(api, client, kind, compression):
    answer = api.images.generate(
        **SMALL, **SEED, response_format="url", output_format=kind, output_compression=compression
    )
    assert answer.data[0].b64_json is None
    assert answer.data[0].url.startswith(str(client.base_url))
    download = client.get(answer.data[0].url)
    assert Image.open(io.BytesIO(download.content)).format == kind.upper()


@pytest.mark.parametrize("model", ["dall-e-2", "dall-e-3"])
def test_generations_of_dall_e_are_urls_by_default(api, model):
    small = {**SMALL, "model": model}
    assert api.images.generate(**small).data[0].url
    assert api.images.generate(**small, response_format="b64_json").data[0].b64_json


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"background": "transparent", "output_format": "jpeg"}, "output_format"),
        ({"prompt": ""}, "prompt"),
        ({"size": "big"}, "size"),
        ({"size": "16x16"}, "size"),
        ({"n": 11}, "n"),
        ({"quality": "superb"}, "quality"),
        ({"output_format": "gif"}, "output_format"),
        ({"partial_images": 4}, "partial_images"),
    ],
)
def test_generations_invalid_field_is_named(api, fields, field):
    with pytest.raises(openai.BadRequestError) as caught:
        api.images.generate(**{**SMALL, **fields})
    error = caught.value.body
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == (
        "invalid_request_error",
        field,
        "invalid_request",
    )
    assert field in error["message"]


def test_errors_have_the_shape_of_openai(client, api):
    answer = client.post("/v1/images/variations", files={"image": b"x"})
    assert answer.status_code == 400
    assert answer.headers["x-should-retry"] == "false"
    assert answer.json() == {
        "error": {
            "message": "variations of images are not implemented. Use /v1/images/edits.",
            "type": "invalid_request_error",
            "param": None,
            "code": "not_implemented",
        }
    }
    with pytest.raises(openai.BadRequestError, match="not implemented"):
        api.images.create_variation(image=b"x")
    assert client.get("/v1/nothing").json()["error"]["code"] == "not_found"
    assert client.post("/v1/images/generations", content=b"{").status_code == 400
    large = client.post("/v1/images/generations", content=b" " * 16_100_000)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "too_large")


@pytest.mark.parametrize(
    ("code", "again"),
    [("out_of_memory", False), ("engine_failed", False), ("queue_full", True), ("stopping", True)],
)
def test_openai_client_retries_only_temporary_errors(code, again):
    """Prevent retries of a request that stops the engine each time."""
    problem = Problem.of(AlphalayerError.from_dict({"code": code, "message": "."}))
    answer = DIALECT.render_error(problem, {})
    with openai.OpenAI(api_key="x") as api:
        assert (
            api._should_retry(httpx.Response(answer.status_code, headers=answer.headers)) is again
        )


def test_bearer_token_is_required(tmp_path):
    with served(tmp_path, api_auth="ann:secret") as client:
        base = f"{client.base_url}/v1".replace("//v1", "/v1")
        with (
            openai.OpenAI(base_url=base, api_key="wrong") as api,
            pytest.raises(openai.AuthenticationError) as caught,
        ):
            api.images.generate(**SMALL)
        assert caught.value.code == "unauthorized"
        with openai.OpenAI(base_url=base, api_key="ann:secret") as api:
            assert api.images.generate(**SMALL).data


def test_full_queue_is_a_rate_limit_error(tmp_path):
    with served(tmp_path, engine=None, queue_limit=1) as client:
        client.post("/alpha/v1/jobs", json={"prompt": "x"})
        answer = client.post("/v1/images/generations", json=SMALL)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert (answer.json()["error"]["type"], answer.json()["error"]["code"]) == (
            "rate_limit_error",
            "queue_full",
        )


@pytest.mark.parametrize("name", ["open_webui_openai", "librechat_openai", "litellm_openai"])
def test_recorded_client_requests_succeed(client, name):
    for request in json.loads((RECORDED / f"{name}.json").read_text())["requests"]:
        answer = client.request(request["method"], request["path"], json=request["json"])
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert len(body["data"]) == request["json"]["n"]
        for data in body["data"]:
            image = Image.open(io.BytesIO(base64.b64decode(data["b64_json"], validate=True)))
            assert image.mode == "RGBA"
            assert image.format == request["json"].get("output_format", "png").upper()
            if request["json"]["size"] != "auto":
                assert f"{image.width}x{image.height}" == request["json"]["size"]
