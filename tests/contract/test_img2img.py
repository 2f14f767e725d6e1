"""Images in the native dialect: img2img and layers, as JSON and as forms, at once and as jobs."""

from __future__ import annotations

import base64
import gc
import io
import json
import struct
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image
from tests.support.serving import put_model, served, wait_until

from alphalayer.api.a1111 import routes as a1111_routes
from alphalayer.api.middleware.body_limit import HELD_BODIES, BodyLimit
from alphalayer.api.native import fields as fields_module
from alphalayer.api.openai import routes as openai_routes
from alphalayer.api.uploads import MAX_UPLOAD_BYTES, release_images
from alphalayer.core.layers import STACK
from alphalayer.core.modes import MODES
from alphalayer.images import codecs
from alphalayer.images.layered import composite_layers

FIELDS = {"prompt": "an apple", "steps": 2}
EDIT, LAYERS, JOBS = "/alpha/v1/img2img", "/alpha/v1/layers", "/alpha/v1/jobs"


def png_of(width: int = 64, height: int = 64, *, opaque: bool = False, seed: int = 0) -> bytes:
    rgba = np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)
    rgba[..., 3] |= 255 if opaque else 0
    return codecs.encode(rgba)


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def bomb(width: int = 100_000, height: int = 100_000) -> bytes:
    """Return a PNG whose header declares many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put_model(tmp_path_factory.mktemp("service"))


@pytest.fixture(scope="module")
def client(folder: Path):
    with served(folder, webhook_secret="of the test", webhook_allow_private=True) as client:
        yield client


def test_img2img_json_changes_an_image(client):
    answer = client.post(EDIT, json={**FIELDS, "image": text(png_of(96, 64))})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert set(body) == {"url", "filename", "info", "seconds"}
    info = json.loads(body["info"])
    assert (info["width"], info["height"]) == (96, 64)
    assert client.get(body["url"]).status_code == 200


def test_img2img_form_equals_json(client):
    fields = {**FIELDS, "width": 128, "strength": 0.5, "exact_steps": True}
    files = {"image": ("apple.png", png_of(), "image/png"), "mask": png_of(seed=2)}
    sent = client.post(EDIT, data={**fields, "n_iter": "1"}, files=files)
    assert sent.status_code == 200, sent.text
    as_json = client.post(
        EDIT, json={**fields, "image": text(files["image"][1]), "mask": text(files["mask"])}
    )
    assert client.get(sent.json()["url"]).content == client.get(as_json.json()["url"]).content
    assert json.loads(sent.json()["info"])["width"] == 128


def test_form_and_json_of_one_request_are_one_job(client):
    key = {"Idempotency-Key": "same image"}
    image = png_of()
    sent = [
        client.post("/alpha/v1/jobs/img2img", headers=key, **body)
        for body in (
            {"json": {**FIELDS, "image": text(image)}},
            {"data": FIELDS, "files": {"image": image}},
            {"data": FIELDS, "files": {"image": image}},
            {"json": {**FIELDS, "image": f"data:image/png;base64,{text(image)}"}},
        )
    ]
    assert [answer.status_code for answer in sent] == [202] * 4, sent[-1].text
    assert len({answer.json()["id"] for answer in sent}) == 1
    other = client.post(
        "/alpha/v1/jobs/img2img", headers=key, data=FIELDS, files={"image": png_of(seed=9)}
    )
    assert (other.status_code, other.json()["field"]) == (422, "Idempotency-Key")


def test_form_takes_loras_as_json_or_not_at_all(client):
    image = {"image": png_of()}
    answer = client.post(EDIT, data={**FIELDS, "loras": '[{"name": "none"}]'}, files=image)
    assert "none" in answer.json()["detail"]
    answer = client.post(EDIT, data={**FIELDS, "loras": "[{"}, files=image)
    assert (answer.status_code, answer.json()["field"]) == (422, "loras")


def test_stored_image_is_a_source_by_its_name(client):
    first = client.post("/alpha/v1/txt2img", json={**FIELDS, "width": 64, "height": 64}).json()
    answer = client.post(EDIT, json={**FIELDS, "image": first["filename"]})
    assert answer.status_code == 200, answer.text
    missing = f"alpha_1700000000_{'0' * 12}.png"
    answer = client.post(EDIT, json={**FIELDS, "image": missing})
    assert (answer.status_code, answer.json()["field"]) == (422, "image")
    assert missing in answer.json()["detail"]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 200), (64, 200)),
        ((32, 48), (64, 96)),
    ],
)
def test_img2img_size_is_nearly_that_of_the_image(client, size, expected):
    image = io.BytesIO()
    Image.new("RGBA", size, (1, 2, 3, 4)).save(image, "PNG")
    body = client.post(
        "/alpha/v1/jobs/img2img",
        data={"prompt": "x", "steps": 1},
        files={"image": image.getvalue()},
    ).json()
    wait_until(lambda: client.get(body["url"]).json()["state"] == "done", 30)
    done = client.get(body["url"]).json()["images"][0]
    assert (done["width"], done["height"], done["role"]) == (*expected, "image")


OPAQUE = png_of(opaque=True)
WRONG = [
    ({}, "image", "it must be given"),
    ({"image": ""}, "image", "it is empty"),
    ({"image": 5}, "image", "got 5"),
    ({"image": ["x"]}, "image", "a text with an image"),
    ({"image": "!"}, "image", "not base64"),
    ({"image": "apple.png"}, "image", 'no stored image "apple.png"'),
    ({"image": text(b"no image")}, "image", "not an image"),
    ({"image": "https://example.com/a.png"}, "image", "URLs are not fetched"),
    ({"image": text(bomb())}, "image", "too large"),
    ({"image": text(bomb(17_000, 1_000))}, "image", "16 megapixels"),
    ({"image": text(png_of()[:200])}, "image", "damaged"),
    ({"image": text(OPAQUE)}, "image", "layerdiffuse_enabled"),
    ({"mask": "x"}, "mask", "not base64"),
    ({"mask": text(bomb())}, "mask", "too large"),
    ({"mask_blur": 8}, "mask_blur", "no effect without mask"),
    ({"strength": 1.5}, "strength", "at most 1"),
    ({"strength": -0.1}, "strength", "at least 0"),
    ({"alpha": "odd"}, "alpha", "new"),
    ({"resize_mode": "odd"}, "resize_mode", "Crop and Resize"),
    ({"hires_scale": 2}, "hires_scale", "no such field"),
    ({"init_image": "x"}, "init_image", "no such field"),
]


@pytest.mark.parametrize(("fields", "field", "words"), WRONG)
def test_img2img_wrong_values_name_their_field(client, fields, field, words):
    image = {} if not fields else {"image": text(png_of())}
    answer = client.post(EDIT, json={**FIELDS, **image, **fields})
    assert answer.status_code == 422, answer.text
    body = answer.json()
    assert body["field"] == field
    assert words in f"{body['detail']} {body['hint']}"


def test_img2img_numbers_that_are_not_finite_are_refused(client):
    body = json.dumps({**FIELDS, "image": text(png_of()), "strength": float("nan")})
    sent = client.post(EDIT, content=body, headers={"Content-Type": "application/json"})
    form = client.post(EDIT, data={**FIELDS, "strength": "nan"}, files={"image": png_of()})
    for answer in (sent, form):
        assert (answer.status_code, answer.json()["field"]) == (422, "strength")


def test_file_of_a_form_has_a_limit(client):
    large = bytes(MAX_UPLOAD_BYTES + 1)
    answer = client.post(EDIT, data=FIELDS, files={"image": large})
    assert (answer.status_code, answer.json()["field"]) == (422, "image")
    assert "at most 20,000,000" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--\r\n", "cannot be read"),
        (b"no boundary", "cannot be read"),
        (
            b"".join(
                b'--x\r\nContent-Disposition: form-data; name="steps"\r\n\r\n%d\r\n' % number
                for number in range(2)
            )
            + b"--x--\r\n",
            "more than once",
        ),
        (
            b"".join(
                b'--x\r\nContent-Disposition: form-data; name="f%d"\r\n\r\n1\r\n' % number
                for number in range(200)
            )
            + b"--x--\r\n",
            "Too many fields",
        ),
    ],
)
def test_wrong_form_is_refused(client, content, words):
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = client.post(EDIT, content=content, headers=kind)
    assert answer.status_code == 422, answer.text
    assert words in answer.json()["detail"]


def test_waiting_requests_hold_no_files_of_their_forms(tmp_path: Path):
    # of random pixels, which take all of their 262 kB
    image, limit = png_of(256, 256), 300_000
    with (
        served(put_model(tmp_path), engine=None, max_request_bytes=limit, drain_s=1) as client,
        ThreadPoolExecutor() as pool,
    ):

        def wait() -> int:
            answer = client.post(EDIT, data=FIELDS, files={"image": image}, timeout=5)
            return answer.status_code

        waiting = list[Future[int]]()
        for count in range(1, HELD_BODIES + 3):
            waiting.append(pool.submit(wait))
            wait_until(lambda count=count: len(client.get(JOBS).json()["jobs"]) == count)
        client.server.should_exit = True  # type: ignore[attr-defined]
        assert {future.result() for future in waiting} == {503}


def url_of(data: bytes) -> dict[str, str]:
    return {"image_url": f"data:image/png;base64,{text(data)}"}


WAITING: dict[str, dict[str, Any]] = {
    EDIT: {"image": text(png_of(seed=3))},
    LAYERS: {"foreground": text(png_of(seed=4))},
    "/v1/images/edits": {"images": [url_of(png_of(seed=5))]},
    "/sdapi/v1/img2img": {"init_images": [text(png_of(seed=6))], "mask": text(png_of(seed=6))},
    "/sdapi/v1/txt2img": {
        "alwayson_scripts": {
            "layerdiffuse": {
                "args": [True, MODES["fg2ble"].label, 1, 1, text(png_of(seed=7))],
            }
        }
    },
}
"""Requests with images by route."""


def test_waiting_request_in_any_dialect_holds_no_images(tmp_path: Path):
    dropped = list[Any]()

    def keep(request: Any, body: Any, fields: Any) -> None:
        release_images(request, body, fields)
        dropped.append((body, request.state.fields))

    modules = (fields_module, openai_routes, a1111_routes)
    with (
        served(put_model(tmp_path), engine=None, drain_s=1) as client,
        ThreadPoolExecutor() as pool,
        ExitStack() as patches,
    ):
        for module in modules:
            patches.enter_context(patch.object(module, "release_images", keep))
        for count, (path, images) in enumerate(WAITING.items(), 1):
            pool.submit(client.post, path, json={**FIELDS, **images}, timeout=5)
            wait_until(lambda count=count: len(client.get(JOBS).json()["jobs"]) == count)
        limits = [one for one in gc.get_objects() if type(one) is BodyLimit]
        assert sum(limit._held_bytes for limit in limits) == 0
        assert len(dropped) == len(WAITING)
        for body, sent in dropped:
            assert len(repr(body)) + len(repr(body._sent)) + len(repr(sent)) < 10_000
        client.server.should_exit = True  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", ["/v1/images/edits", "/sdapi/v1/img2img"])
def test_image_in_another_form_is_the_same_request(client, path: str):
    image = png_of(seed=11)
    plain, address = text(image), f"data:image/png;base64,{text(image)}"
    sources = ("images", lambda one: [{"image_url": one}])
    if path.startswith("/sdapi"):
        sources = ("init_images", lambda one: [one])
    name, wrap = sources
    bodies: list[dict[str, Any]] = [
        {"json": {**FIELDS, name: wrap(source), "seed": -1}} for source in (plain, address)
    ]
    if path.startswith("/v1"):
        bodies.append({"data": {**FIELDS, "seed": -1}, "files": {"image": image}})
    before = len(client.get(JOBS).json()["jobs"])
    for body in bodies:
        answer = client.post(path, headers={"Idempotency-Key": path}, **body)
        assert answer.status_code == 200, answer.text
    assert len(client.get(JOBS).json()["jobs"]) == before + 1


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (EDIT, {"mask_blur": 8}),
        (EDIT, {"layerdiffuse_output_origin": True}),
        (LAYERS, {"n_iter": 16, "batch_size": 8}),
        ("/sdapi/v1/img2img", {"mask_round": False}),
        ("/sdapi/v1/img2img", {"mask": "https://example.org/a.png"}),
        ("/v1/images/edits", {"background": "transparent", "output_format": "jpeg"}),
    ],
)
def test_refused_request_stores_no_image(client, folder: Path, path: str, fields: dict[str, Any]):
    data = png_of(seed=hash((path, *fields)) % 1000 + 1000)
    images: dict[str, Any] = {
        EDIT: {"image": text(data)},
        LAYERS: {"foreground": text(data)},
        "/sdapi/v1/img2img": {"init_images": [text(data)]},
        "/v1/images/edits": {"images": [url_of(data)]},
    }[path]
    before = {file.name for file in folder.rglob("input_*")}
    answer = client.post(path, json={**FIELDS, **images, **fields})
    assert answer.status_code in (400, 422), answer.text
    assert {file.name for file in folder.rglob("input_*")} == before


def test_missing_file_of_a_later_stage_is_named_at_submission(tmp_path: Path):
    models = put_model(tmp_path) / "models" / "layer_model"
    for name in ("layer_xl_fgble2bg.safetensors", "vae_transparent_encoder.safetensors"):
        (models / name).unlink()
    with served(tmp_path, engine=None) as client:
        chain = client.post("/alpha/v1/jobs/layers", json=FIELDS)
        edit = client.post("/alpha/v1/jobs/img2img", json={**FIELDS, "image": text(png_of())})
        for answer, file, download in (
            (chain, "layer_xl_fgble2bg", "layerdiffuse-fgble2bg"),
            (edit, "vae_transparent_encoder", "layerdiffuse-encoder"),
        ):
            body = answer.json()
            assert (answer.status_code, body["code"]) == (503, "layerdiffuse_missing")
            assert file in body["detail"]
            assert body["hint"].endswith(f"models pull {download}")
        assert client.post("/alpha/v1/jobs/layers", json={**FIELDS, "want": "foreground"})
        (models / "layer_xl_fg2ble.safetensors").unlink()
        script = {"LayerDiffuse": {"args": [True, MODES["fg2ble"].label, 1, 1, text(png_of())]}}
        answer = client.post("/sdapi/v1/txt2img", json={**FIELDS, "alwayson_scripts": script})
        assert f'mode "{MODES["fg2ble"].label}" needs it' in answer.json()["detail"]


def test_layers_of_the_embedded_model_hint_at_the_foreground(tmp_path: Path):
    with served(tmp_path, engine=None) as client:
        body = client.post("/alpha/v1/jobs/layers", json=FIELDS).json()
        assert (body["field"], body["code"]) == ("want", "invalid_request")
        assert body["hint"] == (
            'Want "foreground", or use another model. Its file layer_xl_fg2ble.safetensors comes '
            "with: alphalayer models pull layerdiffuse-fg2ble"
        )
        answer = client.post("/alpha/v1/jobs/layers", json={**FIELDS, "foreground": text(png_of())})
        assert answer.json()["hint"].startswith("Use another model.")


def test_other_routes_take_no_form(client):
    answer = client.post("/alpha/v1/txt2img", data=FIELDS, files={"image": png_of()})
    assert (answer.status_code, answer.json()["field"]) == (422, "Content-Type")


def test_layers_lists_the_stack_with_documents(client):
    answer = client.post(LAYERS, json={**FIELDS, "width": 64, "height": 64})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert [layer["role"] for layer in body["layers"]] == list(STACK)
    assert [layer["is_visible"] for layer in body["layers"]] == [True, True, False, False]
    assert {(layer["width"], layer["height"]) for layer in body["layers"]} == {(64, 64)}
    files = {layer["role"]: client.get(layer["url"]).content for layer in body["layers"]}
    pixels = {role: codecs.decode(file)[0] for role, file in files.items()}
    np.testing.assert_array_equal(
        pixels["composite"], composite_layers([pixels["background"], pixels["foreground"]])
    )
    assert set(body["documents"]) == {"psd", "ora", "tiff", "zip"}
    for kind, start in (("psd", b"8BPS"), ("ora", b"PK"), ("zip", b"PK"), ("tiff", b"II")):
        sent = client.get(body["documents"][kind])
        assert sent.status_code == 200, sent.text
        assert sent.content.startswith(start)
        assert f".{kind}" in sent.headers["content-disposition"]
        assert int(sent.headers["content-length"]) == len(sent.content)
        head = client.head(body["documents"][kind])
        assert (head.status_code, head.content) == (200, b"")
        names = ("content-disposition", "content-type", "cache-control")
        assert [head.headers[name] for name in names] == [sent.headers[name] for name in names]
    texts = json.loads(body["info"])["infotexts"]
    assert ["From Foreground and Blending to Background" in one for one in texts] == [
        True,
        False,
        False,
        False,
    ]


def test_layers_form_with_a_given_foreground(client):
    files = {"foreground": png_of(80, 64)}
    answer = client.post(LAYERS, data={**FIELDS, "want": "background"}, files=files)
    assert answer.status_code == 200, answer.text
    layers = answer.json()["layers"]
    assert [layer["role"] for layer in layers] == list(STACK)
    stored = client.get(layers[1]["url"]).content
    np.testing.assert_array_equal(codecs.decode(stored)[0], codecs.decode(files["foreground"])[0])


def test_layers_of_several_sets(client):
    body = client.post(
        LAYERS, json={**FIELDS, "width": 64, "height": 64, "batch_size": 2, "seed": 3}
    ).json()
    assert [{layer["seed"] for layer in one["layers"]} for one in body["sets"]] == [{3}, {4}]
    assert body["sets"][0]["layers"] == body["layers"]
    first, second = (client.get(one["documents"]["zip"]).content for one in body["sets"])
    assert first != second
    answer = client.get(f"{body['documents']['zip']}?set=3")
    assert (answer.status_code, answer.json()["code"]) == (404, "file_not_found")


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"want": "all"}, "want", "layers"),
        ({"want": "foreground", "foreground": text(png_of())}, "want", "given already"),
        ({"blended": text(png_of())}, "blended", "foreground"),
        ({"foreground": text(OPAQUE)}, "foreground", "Remove its background"),
        ({"background": "x"}, "background", "not base64"),
        ({"trim": True}, "trim", "no such field"),
        (
            {"layerdiffuse_resize_mode": "x"},
            "layerdiffuse_resize_mode",
            'Did you mean "resize_mode"?',
        ),
        ({"prompt": ""}, "prompt", "empty"),
        ({"background_prompt": "x" * 9_999, "prompt": "y" * 9}, "background_prompt", "bytes"),
    ],
)
def test_layers_wrong_values_name_their_field(client, fields, field, words):
    answer = client.post(LAYERS, json={**FIELDS, **fields})
    assert answer.status_code == 422, answer.text
    body = answer.json()
    assert body["field"] == field
    assert words in f"{body['detail']} {body['hint']}"


def test_layers_job_shows_roles_and_documents(client):
    body = client.post(
        "/alpha/v1/jobs/layers", json={**FIELDS, "width": 64, "height": 64, "previews": True}
    ).json()
    assert body["documents"] == []
    answer = client.get(f"{body['url']}/layers.psd")
    assert answer.status_code in (200, 404)
    wait_until(lambda: client.get(body["url"]).json()["state"] == "done", 30)
    done = client.get(body["url"]).json()
    assert [image["role"] for image in done["images"]] == list(STACK)
    assert client.get(done["documents"][0]["psd"]).content.startswith(b"8BPS")
    assert done["steps"] == 6


@pytest.mark.parametrize("job_id", ["0" * 24, "x"])
def test_document_of_no_job_is_missing(client, job_id):
    answer = client.get(f"/alpha/v1/jobs/{job_id}/layers.psd")
    assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found")


def test_document_of_a_job_without_layers_is_missing(client):
    body = client.post("/alpha/v1/jobs", json={**FIELDS, "width": 64, "height": 64}).json()
    answer = client.get(f"/alpha/v1/jobs/{body['id']}/layers.psd")
    assert (answer.status_code, answer.json()["code"]) == (404, "file_not_found")
    assert answer.json()["detail"] == "the job has no layers."


def test_document_of_a_waiting_job_names_its_state(tmp_path: Path):
    with served(put_model(tmp_path), engine=None) as client:
        body = client.post("/alpha/v1/jobs/layers", json={**FIELDS, "width": 64, "height": 64})
        answer = client.get(f"{body.json()['url']}/layers.psd")
    assert answer.status_code == 404
    assert answer.json()["detail"] == "the job is queued, so it has no layers."


def test_signed_service_wants_signed_names_and_documents(tmp_path: Path):
    with served(put_model(tmp_path), sign_file_urls="a secret of the test") as client:
        body = client.post(LAYERS, json={**FIELDS, "width": 64, "height": 64}).json()
        signed = body["layers"][1]["url"].rpartition("/")[2]
        name = signed.partition("?")[0]
        for source in (name, f"{name}?expires=99999999999&signature=00", f"{name}?expires=x"):
            answer = client.post(EDIT, json={**FIELDS, "image": source})
            assert (answer.status_code, answer.json()["field"]) == (403, "image")
        assert client.post(EDIT, json={**FIELDS, "image": signed}).status_code == 200
        for source, status in ((name, 403), (signed, 200)):
            edit = {"prompt": "x", "images": [{"file_id": source}]}
            assert client.post("/v1/images/edits", json=edit).status_code == status
        url = body["documents"]["psd"]
        assert client.get(url).status_code == 200
        assert client.get(url.partition("?")[0]).status_code == 403
        assert client.get(url.replace(".psd", ".ora")).status_code == 403
