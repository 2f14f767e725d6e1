"""Other people's clients, unchanged, against a running service that draws with the embedded model: the same picture in all."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import httpx
import numpy as np
import openai
import pytest
import webuiapi
from fastmcp import Client
from fastmcp.client.transports import StreamableHttpTransport
from PIL import Image
from tests.serving import served

from alphalayer import client as own_client
from alphalayer import images

PROMPT, SEED, STEPS = "a red apple", 12345, 8
SETTINGS = {"steps": STEPS, "cfg_scale": 3, "width": 256, "height": 256, "seed": SEED}
NEGATIVE = "bad, ugly"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with served(
        tmp_path_factory.mktemp("service"), engine="alphalayer.engine.pipeline:create_engine", wait_ready=False
    ) as service:
        service.timeout = httpx.Timeout(120)
        yield service


@pytest.fixture(scope="module")
def apple(service: httpx.Client) -> np.ndarray:
    """As the native API draws it."""
    body = {"prompt": PROMPT, "negative_prompt": NEGATIVE, **SETTINGS}
    answer = service.post("/alpha/v1/txt2img", json=body).json()
    rgba, parameters = images.decode(service.get(answer["url"]).content)
    assert "Model: alphalayer-mini" in (parameters or "")
    assert rgba[128, 128, 3] == 255
    assert (rgba[..., 3] == 0).mean() > 0.2
    return rgba


def test_webuiapi(service: httpx.Client, apple: np.ndarray):
    api = webuiapi.WebUIApi(baseurl=f"{str(service.base_url).rstrip('/')}/sdapi/v1")
    assert "alphalayer-mini" in api.util_get_model_names()[0]
    drawn = api.txt2img(
        prompt=PROMPT, negative_prompt=NEGATIVE, sampler_name="DPM++ 2M SDE", scheduler="Karras", **SETTINGS
    )
    np.testing.assert_array_equal(np.asarray(drawn.image), apple)
    assert drawn.info["all_seeds"] == [SEED]


def test_openai_with_partial_images(service: httpx.Client):
    with openai.OpenAI(base_url=f"{str(service.base_url).rstrip('/')}/v1", api_key="x", timeout=120) as api:
        assert [model.id for model in api.models.list()] == ["alphalayer-mini"]
        events = list(
            api.images.generate(
                model="alphalayer-mini", prompt=PROMPT, size="256x256", quality="low", stream=True, partial_images=1
            )
        )
    *partial, last = events
    assert [event.type for event in partial] == ["image_generation.partial_image"]
    picture = Image.open(io.BytesIO(base64.b64decode(last.b64_json)))
    assert (picture.mode, picture.size) == ("RGBA", (256, 256))
    assert picture.getpixel((128, 128))[3] == 255


async def test_mcp(service: httpx.Client, apple: np.ndarray):
    told: list[float] = []

    async def progress(done: float, _total: float | None, _message: str | None) -> None:
        told.append(done)

    async with Client(StreamableHttpTransport(f"{str(service.base_url).rstrip('/')}/mcp/")) as client:
        (tool,) = await client.list_tools()
        fields = {name: value for name, value in SETTINGS.items() if name != "cfg_scale"}  # the model's own is 3
        answer = await client.call_tool(tool.name, {"prompt": PROMPT, **fields}, progress_handler=progress)
    np.testing.assert_array_equal(images.decode(base64.b64decode(answer.content[0].data))[0], apple)
    assert len(set(told)) >= 3
    assert max(told) <= STEPS


def test_our_own_client(service: httpx.Client, apple: np.ndarray):
    with own_client.Client(str(service.base_url)) as client:
        (picture,) = client.generate(PROMPT, negative_prompt=NEGATIVE, **SETTINGS)
        np.testing.assert_array_equal(images.decode(picture)[0], apple)
