"""`/v1/images/edits` over real HTTP: forms of the openai package, JSON, and wrong images."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from tests.support.serving import put_model, served

from alphalayer.engine.fake import render_disc

EDIT = {"prompt": "an apple", "model": "gpt-image-1"}
SEED = {"extra_body": {"seed": 7}}


def png(width: int = 96, height: int = 64, alpha: int = 255, kind: str = "PNG") -> bytes:
    """Return an image whose left half has the given alpha."""
    rgba = np.full((height, width, 4), 255, np.uint8)
    rgba[:, : width // 2, 3] = alpha
    image, buffer = Image.fromarray(rgba), io.BytesIO()
    (image.convert("RGB") if kind == "JPEG" else image).save(buffer, kind)
    return buffer.getvalue()


OPAQUE, CUT_OUT, MASK = png(), png(alpha=128), png(alpha=0)


def data_url(data: bytes) -> dict[str, str]:
    return {"image_url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with served(put_model(tmp_path_factory.mktemp("service"))) as client:
        yield client


@pytest.fixture(scope="module")
def api(client: httpx.Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=str(client.base_url.join("/v1")), api_key="x") as api:
        yield api


def image_of(b64_json: str | None) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64_json or "", validate=True)))


@pytest.mark.parametrize("images", [CUT_OUT, [CUT_OUT], [CUT_OUT, OPAQUE, OPAQUE]])
def test_openai_client_edits_images(api: openai.OpenAI, images: Any):
    answer = api.images.edit(image=images, **EDIT, n=2, quality="low", **SEED)
    for i, data in enumerate(answer.data or ()):
        np.testing.assert_array_equal(
            np.asarray(image_of(data.b64_json)), render_disc("an apple", 7 + i, 96, 64)
        )
    fields = answer.to_dict()
    assert (fields["size"], fields["background"], fields["quality"]) == (
        "96x64",
        "transparent",
        "low",
    )
    ignored = ["image: ignored 2. Only the first is changed."]
    assert fields.get("warnings") == (ignored if len(images) == 3 else None)


def test_openai_client_edits_with_a_mask(api: openai.OpenAI):
    answer = api.images.edit(
        image=OPAQUE, mask=MASK, **EDIT, **SEED, input_fidelity="high", size="64x64"
    )
    assert (answer.size, answer.background) == ("64x64", "opaque")
    assert image_of((answer.data or [])[0].b64_json).size == (64, 64)


async def test_openai_async_client_edits_and_streams(client: httpx.Client):
    async with openai.AsyncOpenAI(base_url=str(client.base_url.join("/v1")), api_key="x") as api:
        stream = await api.images.edit(
            image=[("a.png", CUT_OUT, "image/png")], **EDIT, **SEED, stream=True, partial_images=1
        )
        *partial, last = [event async for event in stream]
    assert {event.type for event in partial} <= {"image_edit.partial_image"}
    assert (last.type, last.size, last.background) == (
        "image_edit.completed",
        "96x64",
        "transparent",
    )
    np.testing.assert_array_equal(
        np.asarray(image_of(last.b64_json)), render_disc("an apple", 7, 96, 64)
    )


def test_stream_of_an_edit_has_partial_images(tmp_path):
    with served(tmp_path, engine_options={"step_s": 0.05}) as slow:
        body = {"prompt": "an apple", "images": [data_url(CUT_OUT)], "stream": True}
        text = slow.post("/v1/images/edits", json={**body, "partial_images": 2}).text
    assert [line for line in text.splitlines() if line.startswith("event")] == [
        "event: image_edit.partial_image",
        "event: image_edit.partial_image",
        "event: image_edit.completed",
    ]


def test_json_and_form_give_the_same_image(client: httpx.Client):
    fields = {"prompt": "an apple", "seed": 3, "quality": "low"}
    body = {**fields, "images": [data_url(CUT_OUT)], "mask": data_url(MASK)}
    by_json = client.post("/v1/images/edits", json=body).json()
    files = {"image[]": ("a.png", CUT_OUT), "mask": ("m.png", MASK)}
    by_form = client.post("/v1/images/edits", data=fields, files=files).json()
    assert by_json["data"] == by_form["data"]
    url = client.post("/v1/images/edits", json={**body, "response_format": "url"}).json()
    name = url["data"][0]["url"].rpartition("/")[2]
    stored = {**fields, "images": [{"file_id": name}]}
    assert client.post("/v1/images/edits", json=stored).json()["size"] == "96x64"
    form = client.post("/v1/images/edits", data={**fields, "image": name}, files={"x": (None, "x")})
    assert form.json()["size"] == "96x64"


def test_repeated_form_has_one_job(client: httpx.Client):
    def edit(image: bytes) -> httpx.Response:
        return client.post(
            "/v1/images/edits",
            data={"prompt": "an apple"},
            files={"image": image},
            headers={"Idempotency-Key": "edit-1"},
        )

    assert edit(CUT_OUT).json()["data"] == edit(CUT_OUT).json()["data"]
    other = edit(OPAQUE)
    assert (other.status_code, other.json()["error"]["code"]) == (400, "invalid_request")


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_edit_of_a_jpeg_is_opaque(api: openai.OpenAI, kind: Any):
    answer = api.images.edit(image=png(kind="JPEG"), **EDIT, output_format=kind)
    assert answer.background == "opaque"
    assert image_of((answer.data or [])[0].b64_json).format == kind.upper()


_FILE = io.BytesIO()
Image.new("1", (5000, 4000)).save(_FILE, "PNG")
BOMB = _FILE.getvalue()


@pytest.mark.parametrize(
    ("files", "fields", "param", "message"),
    [
        ({}, {}, "image", "must be given"),
        ({"image[]": [OPAQUE] * 17}, {}, "image", "got 17 images; at most 16"),
        ({"image[]": [OPAQUE] * 40}, {}, None, "Too many files"),
        ({"image": b"no image"}, {}, "image", "not an image"),
        ({"image": BOMB}, {}, "image", "pixels"),
        ({"image": CUT_OUT, "mask": OPAQUE}, {}, "mask", "opaque"),
        (
            {"image": CUT_OUT, "mask": png(64, 64, 0)},
            {},
            "mask",
            "64x64 pixels, and the image 96x64",
        ),
        ({"image": CUT_OUT, "mask": [MASK, MASK]}, {}, "mask", "more than once"),
        ({"image": CUT_OUT, "markup": MASK}, {}, "markup", "not supported"),
        ({"image": CUT_OUT, "prompt": b"an apple"}, {}, "prompt", "got a file"),
        ({"image": CUT_OUT}, {"prompt": ""}, "prompt", "must be given"),
        ({"image": CUT_OUT}, {"n": "11"}, "n", "at most 10"),
        ({"image": CUT_OUT}, {"n": "NaN"}, "n", "a whole number"),
        ({"image": CUT_OUT}, {"size": "16x16"}, "size", "16x16"),
        ({"image": CUT_OUT}, {"stream": "perhaps"}, "stream", "true or false"),
        ({"image": CUT_OUT}, {"input_fidelity": "medium"}, "input_fidelity", "high"),
        ({"image": CUT_OUT}, {"output_format": "gif"}, "output_format", "png"),
        ({"image": OPAQUE}, {"background": "transparent"}, "background", "opaque"),
        (
            {"image": CUT_OUT},
            {"background": "transparent", "output_format": "jpeg"},
            "output_format",
            "no transparency",
        ),
        (
            {"image": CUT_OUT},
            {"mask": "https://example.org/a.png"},
            "mask.image_url",
            "not fetched",
        ),
        ({"image": CUT_OUT}, {"mask": "nothing.png"}, "mask", "no stored image"),
    ],
)
def test_wrong_form_is_refused(
    client: httpx.Client, files: dict[str, Any], fields: dict[str, str], param: str, message: str
):
    parts = [
        (name, ("a.png", data))
        for name, value in files.items()
        for data in (value if isinstance(value, list) else [value])
    ]
    answer = client.post(
        "/v1/images/edits", data={"prompt": "x", **fields}, files=parts or {"x": (None, "x")}
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error"), error
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({}, "images", "must be given"),
        ({"images": []}, "images", "got 0 entries; at least 1"),
        ({"images": [data_url(OPAQUE)] * 17}, "images", "got 17 entries; at most 16"),
        ({"images": "a.png"}, "images", "a list"),
        ({"images": ["a.png"]}, "images.0", "an object"),
        ({"images": [{}]}, "images.0", "either image_url or file_id"),
        (
            {"images": [{"image_url": "http://127.0.0.1/a.png"}]},
            "images.0.image_url",
            "not fetched",
        ),
        ({"images": [{"image_url": "FILE:///etc/passwd"}]}, "images.0.image_url", "not fetched"),
        ({"images": [{"image_url": "data:image/png;base64,%"}]}, "images.0", "not base64"),
        ({"images": [{"file_id": "file-abc123"}]}, "images.0", "not base64"),
        ({"images": [{"file_id": "../../etc/passwd"}]}, "images.0", "no stored image"),
        ({"images": [data_url(CUT_OUT)], "mask": data_url(OPAQUE)}, "mask", "opaque"),
        ({"images": [data_url(CUT_OUT)], "mask": []}, "mask", "an object"),
    ],
)
def test_wrong_json_is_refused(
    client: httpx.Client, fields: dict[str, Any], param: str, message: str
):
    answer = client.post("/v1/images/edits", json={"prompt": "x", **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert message in error["message"]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "multipart/form-data; boundary=b"),
        (b"x", "multipart/form-data"),
        (b"no form", "multipart/form-data; boundary=b"),
        (
            b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\nx',
            "multipart/form-data; boundary=b",
        ),
        (b"--b\r\n" + b"a: b\r\n" * 99, "multipart/form-data; boundary=b"),
        (b"prompt=x", "application/x-www-form-urlencoded"),
        (b"{", "application/json"),
    ],
)
def test_damaged_body_is_refused(client: httpx.Client, content: bytes, kind: str):
    answer = client.post("/v1/images/edits", content=content, headers={"Content-Type": kind})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_form_without_a_key_is_not_read(tmp_path):
    with served(tmp_path, api_auth="ann:secret", engine=None) as client:
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        answer = client.post("/v1/images/edits", content=b"no form", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")
