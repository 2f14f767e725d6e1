"""The native contract, `/alpha/v1`, over real HTTP: fields, defaults, answers and errors."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import json
import re
import threading
import time

import httpx
import numpy as np
import pytest
from PIL import Image
from tests.support.serving import put_lora, served, wait_until
from tests.support.tiny_models import make_diffusers_folder, make_single_file

from alphalayer import catalog
from alphalayer.api.native.txt2img import Txt2ImgRequest
from alphalayer.core.modes import MODES
from alphalayer.engine.fake import render_disc
from alphalayer.images import codecs, postprocess


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = put_lora(tmp_path_factory.mktemp("service"))
    with served(folder, allowed_hosts="pics.example.com") as client:
        yield client


def render(client: httpx.Client, **fields) -> httpx.Response:
    return client.post(
        "/alpha/v1/txt2img", json={"prompt": "an apple, high quality", "steps": 2, **fields}
    )


def test_txt2img_with_a_prompt_alone_uses_the_defaults(client):
    answer = client.post("/alpha/v1/txt2img", json={"prompt": "an apple, high quality"})
    assert answer.status_code == 200
    body = answer.json()
    assert set(body) == {"url", "filename", "info", "seconds"}
    assert re.fullmatch(r"alpha_\d{10}_[0-9a-f]{6,}\.png", body["filename"])
    assert body["url"] == f"{client.base_url}/alpha/v1/file/{body['filename']}".replace(
        "//alpha", "/alpha"
    )
    info = json.loads(body["info"])
    assert (info["seed"], info["negative_prompt"], info["steps"]) == (12345, "bad, ugly", 20)
    assert (info["sampler_name"], info["cfg_scale"], info["width"], info["height"]) == (
        "DPM++ 2M SDE",
        5,
        1024,
        1024,
    )
    assert "Schedule type: Karras" in info["infotexts"][0]


@pytest.mark.parametrize(
    ("more", "schedule"), [({}, "Karras"), ({"scheduler": "Exponential"}, "Exponential")]
)
def test_txt2img_sampler_name_may_contain_its_schedule(client, more, schedule):
    info = json.loads(
        render(client, sampler_name="Euler a Karras", width=64, height=64, **more).json()["info"]
    )
    assert info["sampler_name"] == "Euler a"
    assert f"Schedule type: {schedule}" in info["infotexts"][0]


def test_txt2img_loras_of_prompt_and_field_are_equal(client):
    tagged = render(client, prompt="an apple <lora:style:0.8>", width=64, height=64).json()
    listed = render(
        client, prompt="an apple", loras=[{"name": "style", "weight": 0.8}], width=64, height=64
    ).json()
    first, second = (json.loads(answer["info"]) for answer in (tagged, listed))
    assert first["prompt"] == second["prompt"] == "an apple"
    assert first["infotexts"] == second["infotexts"]
    assert first["infotexts"][0].startswith("an apple <lora:style:0.8>\n")


def test_txt2img_url_returns_the_image_with_its_settings(client):
    body = render(client, seed=7, width=128, height=64).json()
    answer = client.get(body["url"])
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    assert "immutable" in answer.headers["cache-control"]
    image = Image.open(io.BytesIO(answer.content))
    assert image.mode == "RGBA"
    assert "Seed: 7" in image.info["parameters"]
    np.testing.assert_array_equal(
        np.asarray(image), render_disc("an apple, high quality", 7, 128, 64)
    )


def test_txt2img_seed_repeats_the_image_and_minus_one_does_not(client):
    def pixels(seed):
        body = render(client, seed=seed, width=64, height=64).json()
        return json.loads(body["info"])["seed"], client.get(body["url"]).content

    assert pixels(5) == pixels(5)
    (first, _), (second, _) = pixels(-1), pixels(-1)
    assert first != second
    assert first >= 0


def test_txt2img_random_seeds_increase_over_all_batches(client):
    body = render(client, batch_size=2, n_iter=2, seed=-1, width=64, height=64).json()
    first, *others = [image["seed"] for image in body["images"]]
    assert others == [first + 1, first + 2, first + 3]


def test_txt2img_batches_and_iterations_return_all_images(client):
    body = render(client, batch_size=2, n_iter=2, seed=10, width=64, height=64).json()
    assert [image["seed"] for image in body["images"]] == [10, 11, 12, 13]
    assert len({image["filename"] for image in body["images"]}) == 4
    assert all(client.get(image["url"]).status_code == 200 for image in body["images"])
    assert json.loads(body["info"])["all_seeds"] == [10, 11, 12, 13]


@pytest.mark.parametrize("kind", ["png", "webp", "avif"])
def test_txt2img_every_format_has_alpha(client, kind):
    body = render(client, format=kind, width=64, height=64).json()
    assert body["filename"].endswith(f".{kind}")
    answer = client.get(body["url"])
    assert answer.headers["content-type"] == f"image/{kind}"
    alpha = np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGBA"))[..., 3]
    assert alpha[0, 0] == 0
    assert alpha[32, 32] == 255


def test_txt2img_trim_background_and_base64_are_applied(client):
    body = render(
        client, trim=True, trim_padding=1, width=128, height=128, response_format="base64"
    ).json()
    image = Image.open(io.BytesIO(base64.b64decode(body["base64"])))
    whole = render_disc("an apple, high quality", 12345, 128, 128)[..., 3] > 0
    assert image.size == (whole.any(0).sum() + 2, whole.any(1).sum() + 2)
    body = render(client, background="#ff8000", width=64, height=64).json()
    opaque = np.asarray(Image.open(io.BytesIO(client.get(body["url"]).content)))
    assert opaque[0, 0].tolist() == [255, 128, 0, 255]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * 100_000}, "prompt"),
        ({"negative_prompt": "x" * 100_000}, "negative_prompt"),
        ({"seed": "soon"}, "seed"),
        ({"seed": -2}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"width": -64}, "width"),
        ({"height": 100_000}, "height"),
        ({"steps": 0}, "steps"),
        ({"cfg_scale": 1e9}, "cfg_scale"),
        ({"sampler_name": "Magic"}, "sampler_name"),
        ({"scheduler": "Magic"}, "scheduler"),
        ({"batch_size": 1000}, "batch_size"),
        ({"format": "jpeg"}, "format"),
        ({"background": "red"}, "background"),
        ({"layerdiffuse_weight": 9}, "layerdiffuse_weight"),
        ({"denoise": 1}, "denoise"),
        ({"checkpoint": ""}, "checkpoint"),
        ({"checkpoint": "juggernaut"}, "checkpoint"),
        ({"loras": [{"name": "fluffy"}]}, "loras"),
        ({"layerdiffuse_method": "conv"}, "layerdiffuse_method"),
        ({"layerdiffuse_enabled": False, "layerdiffuse_method": "conv"}, "layerdiffuse_method"),
        ({"layerdiffuse_enabled": False, "layerdiffuse_weight": 0.5}, "layerdiffuse_weight"),
        ({"layerdiffuse_enabled": False, "layerdiffuse_stop_at": 0.5}, "layerdiffuse_stop_at"),
        ({"trim_padding": 3}, "trim_padding"),
        ({"trim_threshold": 3}, "trim_threshold"),
    ],
)
def test_txt2img_invalid_field_is_named(client, fields, field):
    answer = render(client, **fields)
    assert answer.status_code == 422
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["code"] == "invalid_request"
    assert problem["field"] == field
    assert field in problem["detail"]


def test_txt2img_defaults_are_accepted_explicitly(client):
    fields = Txt2ImgRequest(prompt="x").model_dump(
        mode="json", by_alias=True, exclude={"prompt", "width", "height", "steps"}
    )
    assert render(client, **fields, width=64, height=64).status_code == 200
    assert (
        render(client, **{**fields, "layerdiffuse_enabled": False}, width=64, height=64).status_code
        == 200
    )


@pytest.mark.parametrize("path", ["/alpha/v1/txt2img", "/alpha/v1/jobs"])
def test_null_and_fields_of_other_servers_are_accepted(client, path):
    accepted = {"layerdiffuse_resize_mode": "Resize and Fill", "layerdiffuse_output_origin": False}
    names = {field.alias or name for name, field in Txt2ImgRequest.model_fields.items()}
    nulls = dict.fromkeys(names - {"prompt", "width", "height", *accepted})
    body = {"prompt": "x", "width": 64, "height": 64, **nulls, **accepted}
    assert client.post(path, json=body).status_code in (200, 202)


def test_txt2img_unknown_model_lists_the_models(client):
    detail = render(client, checkpoint="juggernaut").json()["detail"]
    assert (
        detail == 'checkpoint: no model "juggernaut" in models/Stable-diffusion; '
        "there is: alphalayer-mini (built in)."
    )
    assert render(client, checkpoint="alphalayer-mini", width=64, height=64).status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"prompt": "x", "cfg_scale": NaN}', b'"x"', b"\xff\xfe", b"\x19\x92\x12"],
)
def test_txt2img_broken_body_is_422(client, body):
    answer = client.post(
        "/alpha/v1/txt2img", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 422
    assert answer.json()["code"] == "invalid_request"


@pytest.mark.parametrize("kind", [None, "text/plain"])
def test_txt2img_wrong_content_type_is_named(client, kind):
    headers = {"content-type": kind} if kind else {}
    answer = client.post("/alpha/v1/txt2img", content=b'{"prompt": "x"}', headers=headers)
    assert (answer.status_code, answer.json()["field"]) == (422, "Content-Type")
    assert "application/json" in answer.json()["detail"] + answer.json()["hint"]


def test_txt2img_json_encoded_twice_is_explained(client):
    answer = client.post("/alpha/v1/txt2img", json=json.dumps({"prompt": "x"}))
    assert answer.status_code == 422
    assert answer.json()["detail"] == "the body is a JSON text, not an object."


def test_file_head_has_the_headers_of_get(client):
    url = render(client, width=64, height=64).json()["url"]
    head, get = client.head(url), client.get(url)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-type", "content-length", "cache-control"):
        assert head.headers[name] == get.headers[name]
    assert client.head("/alpha/v1/file/alpha_1_000000.png").status_code == 404


def test_txt2img_too_large_body_is_413(client):
    answer = client.post(
        "/alpha/v1/txt2img", content=b" " * 16_100_000, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 413
    chunked = client.post(
        "/alpha/v1/txt2img",
        content=iter([b" " * 8_100_000] * 2),
        headers={"content-type": "application/json"},
    )
    assert chunked.status_code == 413


def test_file_serves_images_and_previews_only(tmp_path):
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    upload = f"input_{'a' * 64}.png"
    names = ["alphalayer.toml", "notes.txt", "jobs.sqlite", "00001.png", "alpha_1.png", upload]
    for name in names:
        (outputs / name).write_bytes(b"secret")
    link = "alpha_1_aaaaaaaaaa00.png"
    (outputs / link).symlink_to(outputs / "notes.txt")
    with served(tmp_path, engine=None) as client:
        for name in (*names, link):
            for route in ("file", "convert"):
                answer = client.get(f"/alpha/v1/{route}/{name}")
                assert (answer.status_code, answer.json()["code"]) == (404, "file_not_found")


@pytest.mark.parametrize(
    "name",
    [
        "alpha_1_abcdef.png",
        "..%2f..%2fetc%2fpasswd",
        "%2e%2e",
        ".hidden",
        "a%00b.png",
        "x" * 300,
        "..%5cx.png",
    ],
)
def test_file_unknown_name_is_404(client, name):
    answer = client.get(f"/alpha/v1/file/{name}")
    assert answer.status_code == 404
    assert "root:" not in answer.text


def test_playground_files_are_revalidated(client):
    script = client.get("/playground/main.js")
    assert script.headers["cache-control"] == client.get("/").headers["cache-control"] == "no-cache"
    again = client.get("/playground/main.js", headers={"If-None-Match": script.headers["etag"]})
    assert (again.status_code, again.headers["cache-control"]) == (304, "no-cache")


def test_playground_content_types_ignore_those_of_the_system(client, monkeypatch):
    monkeypatch.setattr("starlette.responses.guess_type", lambda _path: ("text/plain", None))
    assert (
        client.get("/playground/main.js").headers["content-type"]
        == "text/javascript; charset=utf-8"
    )
    assert client.get("/playground/style.css").headers["content-type"] == "text/css; charset=utf-8"
    assert client.get("/playground/icon.svg").headers["content-type"] == "image/svg+xml"


def test_docs_and_probes_answer_without_other_hosts(client):
    assert client.get("/sdapi/v1/sd-models").status_code == 200
    page = client.get("/docs").text
    assets = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(assets) == 4
    for asset in assets:
        assert asset.startswith("docs/assets/"), "the page loads nothing from other hosts"
        assert client.get(f"/{asset}").status_code == 200
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/alpha/v1/txt2img", "/alpha/v1/file/{filename}", "/sdapi/v1/sd-models"} <= set(paths)
    assert client.get("/livez").json() == {"status": "alive"}
    assert client.get("/ping").status_code == 200


def test_metrics_count_jobs_and_images(tmp_path):
    with served(tmp_path) as client:
        render(client, width=64, height=64, batch_size=2)
        text = client.get("/metrics").text
        for line in (
            'alphalayer_jobs_total{outcome="done"} 1.0',
            "alphalayer_pictures_total 2.0",
            'alphalayer_stage_seconds_count{stage="sample"} 1.0',
            'alphalayer_engine_ready{engine="cpu"} 1.0',
            "alphalayer_queue_length 0.0",
        ):
            assert line in text


def test_full_queue_returns_429_with_retry_after(tmp_path):
    with served(tmp_path, engine_options={"step_s": 0.2}, queue_limit=2) as client:
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            answers = list(
                pool.map(lambda seed: render(client, seed=seed, width=64, height=64), range(12))
            )
        full = [answer for answer in answers if answer.status_code == 429]
        successful = [answer for answer in answers if answer.status_code == 200]
        assert len(full) + len(successful) == 12
        assert len(successful) >= 2
        assert full
        for answer in full:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["code"] == "queue_full"
        assert (
            f'alphalayer_refused_total{{reason="queue_full"}} {len(full)}.0'
            in client.get("/metrics").text
        )


def test_txt2img_disconnected_client_stops_its_job(tmp_path):
    with served(tmp_path, engine_options={"step_s": 0.2}) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/alpha/v1/txt2img", json={"prompt": "slow", "steps": 150}, timeout=0.7)
        # 150 steps would take 30 s; the next image starts once the abandoned one has stopped
        assert render(client, width=64, height=64, steps=1).elapsed.total_seconds() < 5


def test_request_of_too_many_pixels_is_refused_in_each_dialect(tmp_path):
    with served(tmp_path, max_request_pixels=128 * 64, wait_ready=False) as client:
        small, more = (
            {"prompt": "x", "width": 64, "height": 64, "steps": 1},
            {"prompt": "x", "n": 2, "size": "128x64"},
        )
        assert render(client, **{**small, "batch_size": 2}).status_code == 200
        for changes, field in (
            ({"n_iter": 3}, "n_iter"),
            ({"batch_size": 3}, "batch_size"),
            ({"width": 192}, "width"),
        ):
            answer = render(client, **{**small, **changes})
            assert (answer.status_code, answer.json()["field"]) == (422, field)
            assert "8,192" in answer.json()["detail"]
        assert (
            "n_iter: "
            in client.post("/sdapi/v1/txt2img", json={**small, "n_iter": 3}).json()["detail"]
        )
        assert client.post("/v1/images/generations", json=more).json()["error"]["param"] == "n"
        assert render(client).status_code == 422, "a side left out counts, too"


def test_cost_and_bytes_are_limited_in_every_dialect(tmp_path):
    with served(tmp_path, max_request_cost=100, engine=None) as client:
        for path, fields, count in (
            ("/alpha/v1/txt2img", {"n_iter": 4}, "n_iter"),
            ("/alpha/v1/jobs", {"n_iter": 4}, "n_iter"),
            ("/sdapi/v1/txt2img", {"width": 1024, "height": 1024, "n_iter": 4}, "n_iter"),
            ("/v1/images/generations", {"n": 4, "size": "1024x1024"}, "n"),
        ):
            answer = client.post(path, json={"prompt": "x", **fields})
            assert answer.status_code in (400, 422), path
            assert "megapixel-steps; at most 100" in answer.text, path
            assert count in answer.text, path
            answer = client.post(path, json={"prompt": "\U0001f600" * 2501})
            assert answer.status_code in (400, 422), path
            assert "got 10,004 bytes of UTF-8; at most 10,000" in answer.text, path


def test_basic_auth_is_required_except_for_images(tmp_path):
    with served(tmp_path, api_auth="ann:secret,bob:other") as client:
        refused = render(client)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith("Basic")
        assert client.get("/sdapi/v1/sd-models", auth=("ann", "wrong")).status_code == 401
        assert client.get("/livez").status_code == 200
        client.auth = ("bob", "other")
        body = render(client, width=64, height=64).json()
        assert httpx.get(body["url"], trust_env=False).status_code == 200


def test_convert_returns_an_image_in_another_format(client):
    body = render(client, width=64, height=64).json()
    stored = client.get(body["url"]).content
    answer = client.get(
        f"/alpha/v1/convert/{body['filename']}",
        params={"format": "webp", "trim": True, "trim_padding": 3},
    )
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/webp"
    assert body["filename"].replace(".png", ".webp") in answer.headers["content-disposition"]
    rgba, parameters = codecs.decode(answer.content)
    np.testing.assert_array_equal(rgba, postprocess.trim(codecs.decode(stored)[0], 0, 3))
    assert "Seed: 12345" in (parameters or "")
    assert client.get(body["url"]).content == stored
    assert client.get("/alpha/v1/convert/alpha_1_000000.png").status_code == 404
    assert (
        client.get(f"/alpha/v1/convert/{body['filename']}", params={"format": "bmp"}).status_code
        == 422
    )
    idle = client.get(f"/alpha/v1/convert/{body['filename']}", params={"trim_padding": 3})
    assert (idle.status_code, idle.json()["field"]) == (422, "trim_padding")


def test_models_are_listed_with_defaults_and_errors(tmp_path):
    folder = tmp_path / "models" / "Stable-diffusion"
    own = make_diffusers_folder(folder / "own") / "layerdiffuse" / "config.json"
    own.write_text(
        json.dumps({**json.loads(own.read_text()), "defaults": {"steps": 9, "width": 256}})
    )
    make_single_file(folder / "sdxl.safetensors")
    (folder / "broken.safetensors").write_bytes(b"no weights")
    with served(tmp_path, engine=None) as client:
        listed = {model["name"]: model for model in client.get("/alpha/v1/models").json()["models"]}
    assert [model["name"] for model in listed.values() if model["is_default"]] == ["own"]
    assert (listed["own"]["defaults"]["steps"], listed["own"]["defaults"]["width"]) == (9, 256)
    assert (listed["sdxl"]["defaults"]["steps"], listed["sdxl"]["defaults"]["width"]) == (20, 1024)
    assert listed["sdxl"]["problem"] is None
    assert (
        "damaged" in listed["broken"]["problem"]
        or "not a safetensors" in listed["broken"]["problem"]
    )


def test_models_are_listed_with_modes_and_layers(tmp_path):
    make_diffusers_folder(tmp_path / "models" / "Stable-diffusion" / "own")
    make_single_file(tmp_path / "models" / "Stable-diffusion" / "sdxl.safetensors")
    layers = tmp_path / "models" / "layer_model"
    layers.mkdir()
    for mode in ("attention", "fg2ble"):
        (layers / MODES[mode].files[0]).touch()
    with served(tmp_path, engine=None) as client:
        listed = {model["name"]: model for model in client.get("/alpha/v1/models").json()["models"]}
    assert listed["sdxl"]["modes"] == ["fg2ble"]  # there is no decoder for attention
    pulls = {
        (*choice["given"], choice["want"]): choice["pull"] for choice in listed["sdxl"]["layers"]
    }
    assert pulls["foreground", "blended"] == []
    assert pulls["foreground", "layers"] == ["layerdiffuse-fgble2bg"]
    assert pulls[("layers",)] == ["layerdiffuse", "layerdiffuse-fgble2bg"]
    # its own patch is of one mode
    assert listed["own"]["modes"] == ["attention"]
    assert listed["own"]["layers"] == [{"given": [], "want": "foreground", "pull": []}]


def test_cors_is_off_unless_configured(tmp_path, client):
    preflight = {"Origin": "https://example.com", "Access-Control-Request-Method": "POST"}
    assert (
        "access-control-allow-origin"
        not in client.options("/alpha/v1/txt2img", headers=preflight).headers
    )
    with served(tmp_path, cors_allow_origins="*", engine=None) as open_to_all:
        headers = open_to_all.options("/alpha/v1/txt2img", headers=preflight).headers
        assert headers["access-control-allow-origin"] == "*"
        answer = open_to_all.get("/livez", headers={"Origin": "https://example.com"})
        assert (
            answer.headers["access-control-expose-headers"] == "Location, Retry-After, X-Request-ID"
        )


def test_image_urls_follow_the_proxy_and_the_public_url(tmp_path, client):
    forwarded = {
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "pics.example.com",
        "X-Forwarded-Prefix": "/draw",
    }
    body = {"prompt": "x", "steps": 1, "width": 64, "height": 64}
    url = client.post("/alpha/v1/txt2img", json=body, headers=forwarded).json()["url"]
    assert url.startswith("https://pics.example.com/draw/alpha/v1/file/")
    (tmp_path / "a").mkdir()
    with served(tmp_path / "a", trusted_proxies="10.0.0.0/8") as other:
        url = other.post("/alpha/v1/txt2img", json=body, headers=forwarded).json()["url"]
        assert url.startswith(str(other.base_url))
    (tmp_path / "b").mkdir()
    with served(tmp_path / "b", public_url="https://alpha.example.com/") as other:
        url = other.post("/alpha/v1/txt2img", json=body).json()["url"]
        assert url.startswith("https://alpha.example.com/alpha/v1/file/alpha_")


@pytest.mark.parametrize("prefix", ["/alpha", "/v1", "/docs", "/mcp", "/draw/"])
def test_routes_are_reachable_below_any_prefix(client, prefix):
    forwarded = {"X-Forwarded-Prefix": prefix, "X-Forwarded-Host": "pics.example.com"}
    for path in (
        "/",
        "/playground/main.js",
        "/docs/assets/swagger-ui.css",
        "/alpha/v1/jobs",
        "/sdapi/v1/options",
    ):
        assert client.get(path, headers=forwarded).status_code == 200, path
    assert client.post("/mcp/", headers=forwarded).status_code == 400, "the tool's own answer"
    wrong = client.get("/v1/nothing", headers=forwarded).json()["error"]
    assert wrong["code"] == "not_found"
    large = client.post("/v1/images/generations", content=b" " * 16_100_000, headers=forwarded)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "too_large")
    image = client.post(
        "/alpha/v1/txt2img", json={"prompt": "x", "width": 64, "height": 64}, headers=forwarded
    ).json()
    start = f"http://pics.example.com{prefix.rstrip('/')}"
    assert image["url"].startswith(f"{start}/alpha/v1/file/")
    assert client.get(image["url"].removeprefix(start), headers=forwarded).status_code == 200


def test_images_remain_after_a_service_restart(tmp_path):
    with served(tmp_path) as client:
        name = render(client, width=64, height=64).json()["filename"]
    with served(tmp_path, engine=None) as client:
        assert client.get(f"/alpha/v1/file/{name}").status_code == 200


def test_readyz_with_a_failing_engine_is_503(tmp_path):
    with served(
        tmp_path, engine="alphalayer.engine.fake:no_such_engine", wait_ready=False
    ) as client:
        assert client.get("/livez").status_code == 200
        assert client.get("/readyz").status_code == 503
        assert client.get("/ping").status_code == 204
        wait_until(lambda: "no_such_engine" in client.get("/readyz").json()["engines"]["cpu"])
        wait_until(lambda: client.get("/sdapi/v1/sd-models").status_code == 200)


def test_readyz_without_the_default_model_is_503(tmp_path):
    with served(tmp_path, default_model="nope", wait_ready=False) as client:
        wait_until(lambda: client.get("/readyz").json()["engines"] == {"cpu": "ready"})
        assert client.get("/readyz").status_code == client.get("/ping").status_code == 503
        assert client.get("/ping").text == client.get("/readyz").json()["problem"]


def test_slow_models_folder_delays_no_other_request(tmp_path, monkeypatch):
    find_models, is_reading = catalog.find_models, threading.Event()

    def slow(models_dir):
        is_reading.set()
        time.sleep(0.5)
        return find_models(models_dir)

    with served(tmp_path) as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(catalog, "find_models", slow)
        readiness = pool.submit(client.get, "/readyz")
        assert is_reading.wait(5)
        assert client.get("/livez").elapsed.total_seconds() < 0.4
        assert readiness.result().status_code == 200
