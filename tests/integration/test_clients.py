"""A service with the embedded model: unchanged clients get one image, and the engine's errors.

The tests share one service, because the start of an engine with torch takes long.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import webuiapi
from fastmcp import Client
from fastmcp.client.transports import StreamableHttpTransport
from fastmcp.exceptions import ToolError
from PIL import Image
from tests.support.serving import served, wait_until

from alphalayer import client as own_client
from alphalayer.images import codecs

PROMPT, SEED, STEPS = "a red apple", 12345, 8
SETTINGS = {"steps": STEPS, "cfg_scale": 3, "width": 256, "height": 256, "seed": SEED}
NEGATIVE = "bad, ugly"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with served(
        tmp_path_factory.mktemp("service"),
        engine="alphalayer.engine.pipeline:create_engine",
        wait_ready=False,
    ) as service:
        service.timeout = httpx.Timeout(120)
        yield service


@pytest.fixture(scope="module")
def apple(service: httpx.Client) -> np.ndarray:
    """Return the image of the native API."""
    body = {"prompt": PROMPT, "negative_prompt": NEGATIVE, **SETTINGS}
    answer = service.post("/alpha/v1/txt2img", json=body).json()
    rgba, parameters = codecs.decode(service.get(answer["url"]).content)
    assert "Model: alphalayer-mini" in (parameters or "")
    assert rgba[128, 128, 3] == 255
    assert (rgba[..., 3] == 0).mean() > 0.2
    return rgba


def put_on_white(rgba: np.ndarray) -> Image.Image:
    image = Image.new("RGB", rgba.shape[1::-1], "white")
    image.paste(Image.fromarray(rgba), mask=Image.fromarray(rgba[..., 3]))
    return image


def save_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("use_async", [False, True])
async def test_webuiapi_client_gets_the_native_image(
    service: httpx.Client, apple: np.ndarray, use_async: bool
):
    api = webuiapi.WebUIApi(baseurl=f"{str(service.base_url).rstrip('/')}/sdapi/v1")
    assert "alphalayer-mini" in api.util_get_model_names()[0]
    fields = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "sampler_name": "DPM++ 2M SDE",
        "scheduler": "Karras",
    }
    response = api.txt2img(**fields, **SETTINGS, use_async=use_async)
    result = await response if use_async else response
    np.testing.assert_array_equal(np.asarray(result.image), apple)
    assert result.info["all_seeds"] == [SEED]


@pytest.mark.parametrize(("mode", "only_masked"), [("RGB", False), ("RGBA", True)])
def test_webuiapi_client_changes_only_the_masked_part(
    service: httpx.Client, apple: np.ndarray, mode: str, only_masked: bool
):
    """Send an image without the script, as ordinary clients do."""
    api = webuiapi.WebUIApi(baseurl=f"{str(service.base_url).rstrip('/')}/sdapi/v1")
    image = put_on_white(apple) if mode == "RGB" else Image.fromarray(apple)
    mask = Image.new("L", (256, 256), 0)
    mask.paste(255, (0, 0, 128, 256))
    result = api.img2img(
        images=[image],
        mask_image=mask,
        prompt="a green apple",
        denoising_strength=0.8,
        inpaint_full_res=only_masked,
        **SETTINGS,
    )
    changed, original = np.asarray(result.image), np.asarray(image.convert("RGBA"))
    np.testing.assert_array_equal(changed[:, 150:], original[:, 150:])
    assert (changed[:, :100] != original[:, :100]).mean() > 0.4
    assert (changed[..., 3].min() == 255) == (mode == "RGB")
    assert result.info["denoising_strength"] == 0.8


def test_webuiapi_client_changes_an_image_by_the_strength(service: httpx.Client, apple: np.ndarray):
    api = webuiapi.WebUIApi(baseurl=f"{str(service.base_url).rstrip('/')}/sdapi/v1")
    fields = {
        "prompt": "a green apple",
        "override_settings": {"img2img_background_color": "#808080"},
    }
    alpha = apple[..., 3:] / 255
    original = apple[..., :3] * alpha + 128 * (1 - alpha)
    little, much = (
        np.asarray(
            api.img2img(
                images=[Image.fromarray(apple)],
                alwayson_scripts={"LayerDiffuse": {"args": [False]}},
                denoising_strength=strength,
                **fields,
                **SETTINGS,
            ).image
        )
        for strength in (0.1, 0.9)
    )
    differences = [np.abs(image[..., :3] - original).mean() for image in (little, much)]
    assert differences[0] < differences[1] / 3


SMALL = {"steps": 12, "width": 192, "height": 192, "seed": SEED}
"""Fields of the native API that are those of `OPENAI_REQUEST`: quality "low" is 12 steps."""


@pytest.fixture(scope="module")
def small_apple_name(service: httpx.Client) -> str:
    """Return the name of the stored native image of `OPENAI_REQUEST`."""
    answer = service.post("/alpha/v1/txt2img", json={"prompt": PROMPT, **SMALL}).json()
    return answer["filename"]


@pytest.fixture(scope="module")
def small_apple(service: httpx.Client, small_apple_name: str) -> np.ndarray:
    return codecs.decode(service.get(f"/alpha/v1/file/{small_apple_name}").content)[0]


OPENAI_REQUEST = {"model": "alphalayer-mini", "prompt": PROMPT, "size": "192x192", "quality": "low"}
OPENAI_REQUEST["extra_body"] = {"seed": SEED}


def decode_base64(b64_json: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json))))


def test_openai_client_gets_the_native_image(service: httpx.Client, small_apple: np.ndarray):
    with openai.OpenAI(
        base_url=f"{str(service.base_url).rstrip('/')}/v1", api_key="x", timeout=120
    ) as api:
        assert [model.id for model in api.models.list()] == ["alphalayer-mini"]
        np.testing.assert_array_equal(
            decode_base64(api.images.generate(**OPENAI_REQUEST).data[0].b64_json), small_apple
        )
        *partial, last = api.images.generate(**OPENAI_REQUEST, stream=True, partial_images=2)
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 2
    np.testing.assert_array_equal(decode_base64(last.b64_json), small_apple)


async def test_async_openai_client_gets_the_native_image(
    service: httpx.Client, small_apple: np.ndarray
):
    async with openai.AsyncOpenAI(
        base_url=f"{str(service.base_url).rstrip('/')}/v1", api_key="x", timeout=120
    ) as api:
        answer = await api.images.generate(**OPENAI_REQUEST)
        np.testing.assert_array_equal(decode_base64(answer.data[0].b64_json), small_apple)
        events = [event async for event in await api.images.generate(**OPENAI_REQUEST, stream=True)]
    assert [event.type for event in events] == ["image_generation.completed"]
    np.testing.assert_array_equal(decode_base64(events[0].b64_json), small_apple)


OPENAI_EDIT = {"model": "alphalayer-mini", "prompt": "a green apple", "quality": "low"}
OPENAI_EDIT["extra_body"] = {"seed": SEED}
NATIVE_EDIT = {"prompt": "a green apple", "strength": 0.75, **SMALL}


@pytest.fixture(scope="module")
def edit_files(small_apple: np.ndarray) -> dict[str, bytes]:
    """Return an opaque and a transparent image, and a mask for their left half."""
    mask = Image.new("RGBA", (192, 192), "white")
    mask.paste((0, 0, 0, 0), (0, 0, 96, 192))
    return {
        "opaque.png": save_png(put_on_white(small_apple)),
        "apple.png": save_png(Image.fromarray(small_apple)),
        "mask.png": save_png(mask),
    }


@pytest.fixture(scope="module")
def green_apple(service: httpx.Client, edit_files: dict[str, bytes]) -> np.ndarray:
    """Return the opaque image, changed by the native API as `OPENAI_EDIT` changes it."""
    with own_client.Client(str(service.base_url)) as client:
        (image,) = client.img2img(
            image=edit_files["opaque.png"], layerdiffuse_enabled=False, **NATIVE_EDIT
        )
    rgba, _ = codecs.decode(image)
    original = np.asarray(Image.open(io.BytesIO(edit_files["opaque.png"])))
    assert (np.abs(rgba[..., :3].astype(int) - original).max(2) > 16).mean() > 0.1
    return rgba


@pytest.fixture(scope="module")
def green_cutout(service: httpx.Client, small_apple_name: str) -> np.ndarray:
    """Return the stored transparent image, changed by the native API."""
    with own_client.Client(str(service.base_url)) as client:
        (image,) = client.img2img(image=small_apple_name, **NATIVE_EDIT)
    rgba, _ = codecs.decode(image)
    assert rgba[96, 96, 3] == 255
    assert (rgba[..., 3] == 0).mean() > 0.2
    return rgba


def check_masked(changed: np.ndarray, original: np.ndarray) -> None:
    """Check that all but the left half and a blurred line beside it is unchanged."""
    np.testing.assert_array_equal(changed[:, 110:], original[:, 110:])
    assert (changed[:, :90] != original[:, :90]).mean() > 0.2


def test_openai_client_edits_as_the_native_api(
    service: httpx.Client, edit_files: dict[str, bytes], green_apple: np.ndarray
):
    opaque, apple, mask = edit_files.values()
    with openai.OpenAI(
        base_url=f"{str(service.base_url).rstrip('/')}/v1", api_key="x", timeout=120
    ) as api:
        several = api.images.edit(image=[opaque, apple], **OPENAI_EDIT)
        *partial, last = api.images.edit(image=opaque, **OPENAI_EDIT, stream=True, partial_images=1)
        masked = api.images.edit(image=opaque, mask=mask, **OPENAI_EDIT)
    assert [event.type for event in partial] == ["image_edit.partial_image"]
    for b64_json in (several.data[0].b64_json, last.b64_json):
        np.testing.assert_array_equal(decode_base64(b64_json), green_apple)
    assert several.to_dict()["warnings"]
    original = np.asarray(Image.open(io.BytesIO(opaque)).convert("RGBA"))
    check_masked(decode_base64(masked.data[0].b64_json), original)


def test_openai_client_edits_a_transparent_image(
    service: httpx.Client,
    edit_files: dict[str, bytes],
    small_apple: np.ndarray,
    green_cutout: np.ndarray,
):
    _, apple, mask = edit_files.values()
    with openai.OpenAI(
        base_url=f"{str(service.base_url).rstrip('/')}/v1", api_key="x", timeout=120
    ) as api:
        answer = api.images.edit(image=apple, **OPENAI_EDIT)
        masked = api.images.edit(image=apple, mask=mask, **OPENAI_EDIT)
    assert answer.background == "transparent"
    np.testing.assert_array_equal(decode_base64(answer.data[0].b64_json), green_cutout)
    check_masked(decode_base64(masked.data[0].b64_json), small_apple)


def test_npm_openai_client_edits_as_the_native_api(
    service: httpx.Client,
    edit_files: dict[str, bytes],
    green_apple: np.ndarray,
    green_cutout: np.ndarray,
    tmp_path: Path,
):
    node = shutil.which("node")
    check = [node or "", "-e", 'require.resolve("openai")']
    if not node or subprocess.run(check, capture_output=True, check=False).returncode:
        pytest.skip("npm's openai is not in NODE_PATH")
    for name, data in edit_files.items():
        (tmp_path / name).write_bytes(data)
    program = Path(__file__).parents[1] / "support" / "edit_images.js"
    done = subprocess.run(
        [node, program, f"{str(service.base_url).rstrip('/')}/v1", str(SEED)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout)
    for name in ("one", "several", "stream"):
        np.testing.assert_array_equal(decode_base64(answers[name]), green_apple)
    assert answers["events"] == ["image_edit.partial_image", "image_edit.completed"]
    original = np.asarray(Image.open(tmp_path / "opaque.png").convert("RGBA"))
    check_masked(decode_base64(answers["masked"]), original)
    np.testing.assert_array_equal(decode_base64(answers["transparent"]), green_cutout)


async def test_mcp_client_changes_a_stored_image(
    service: httpx.Client, small_apple_name: str, green_cutout: np.ndarray
):
    async with Client(
        StreamableHttpTransport(f"{str(service.base_url).rstrip('/')}/mcp/")
    ) as client:
        answer = await client.call_tool("change_image", {"image": small_apple_name, **NATIVE_EDIT})
        image, text = answer.content
        np.testing.assert_array_equal(codecs.decode(base64.b64decode(image.data))[0], green_cutout)
        assert f"192x192, seed {SEED}" in text.text
        small = {"prompt": "a table", "width": 192, "height": 192, "steps": 2}
        answer = await client.call_tool("generate_layers", {**small, "want": "foreground"})
        assert [content.type for content in answer.content] == ["image", "text"]
        assert "(foreground, 192x192" in answer.content[1].text
        assert answer.content[1].text.endswith("/layers.psd")
        with pytest.raises(ToolError, match="alphalayer-mini brings its own"):
            await client.call_tool("generate_layers", {**small, "foreground": small_apple_name})


async def test_mcp_client_gets_the_native_image(service: httpx.Client, apple: np.ndarray):
    steps: list[float] = []

    async def progress(step: float, _total: float | None, _message: str | None) -> None:
        steps.append(step)

    async with Client(
        StreamableHttpTransport(f"{str(service.base_url).rstrip('/')}/mcp/")
    ) as client:
        fields = {
            name: value for name, value in SETTINGS.items() if name != "cfg_scale"
        }  # the model's own is 3
        answer = await client.call_tool(
            "draw_transparent_picture", {"prompt": PROMPT, **fields}, progress_handler=progress
        )
    np.testing.assert_array_equal(codecs.decode(base64.b64decode(answer.content[0].data))[0], apple)
    assert len(set(steps)) >= 3
    assert max(steps) <= STEPS


def test_own_client_gets_the_native_image(service: httpx.Client, apple: np.ndarray):
    with own_client.Client(str(service.base_url)) as client:
        (image,) = client.generate(PROMPT, negative_prompt=NEGATIVE, **SETTINGS)
        np.testing.assert_array_equal(codecs.decode(image)[0], apple)


def test_engine_error_is_reported_in_the_job(
    service: httpx.Client, monkeypatch: pytest.MonkeyPatch
):
    def error_of(**fields: object) -> dict:
        body = {"prompt": "an apple", "width": 64, "height": 64, **fields}
        job = service.post("/alpha/v1/jobs", json=body).raise_for_status().json()
        wait_until(lambda: service.get(job["url"]).json()["state"] == "failed", 60)
        return service.get(job["url"]).json()["error"]

    # like a pod without a models folder
    state = service.app.state  # type: ignore[attr-defined]
    monkeypatch.setattr(state, "service", dataclasses.replace(state.service, knows_models=False))
    error = error_of(checkpoint="juggernaut")
    assert (error["code"], error["field"]) == ("model_not_found", "checkpoint")
    assert "juggernaut" in error["detail"]
    error = error_of(layerdiffuse_method="conv")
    assert (error["code"], error["field"]) == ("invalid_request", "layerdiffuse_method")
