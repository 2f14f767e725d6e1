"""Warnings of a job, in the answers of all dialects and of the clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tests.support.serving import served

from alphalayer.client import Client

SMALL: dict[str, Any] = {"prompt": "an apple", "width": 64, "height": 64, "steps": 1}
WARNING = "The norms of style.safetensors are ignored."
STYLE = 'There is no style "cinematic".'


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("service")
    with served(folder, engine_options={"warnings": [WARNING]}) as client:
        yield client


def test_native_answers_have_the_warnings(service: httpx.Client):
    answer = service.post("/alpha/v1/txt2img", json=SMALL).json()
    assert answer["warnings"] == json.loads(answer["info"])["warnings"] == [WARNING]
    assert service.get("/alpha/v1/jobs").json()["jobs"][0]["warnings"] == [WARNING]


def test_client_has_the_warnings(service: httpx.Client):
    with Client(str(service.base_url)) as client:
        status = client.submit(**SMALL)
        for change in client.events(status.id):
            status = change
    assert status.warnings == (WARNING,)


def test_automatic1111_info_has_the_warnings(service: httpx.Client):
    answer = service.post("/sdapi/v1/txt2img", json={**SMALL, "styles": ["cinematic"]}).json()
    assert json.loads(answer["info"])["warnings"] == [STYLE, WARNING]


def test_openai_answers_have_the_warnings(service: httpx.Client):
    body = {"prompt": "an apple", "size": "64x64"}
    answer = service.post("/v1/images/generations", json=body).json()
    assert answer["warnings"] == [WARNING]
    events = service.post("/v1/images/generations", json={**body, "stream": True}).text
    assert json.loads(events.strip().rpartition("data: ")[2])["warnings"] == [WARNING]


async def test_tool_has_the_warnings(service: httpx.Client):
    fastmcp = pytest.importorskip("fastmcp")
    async with fastmcp.Client(f"{service.base_url}/mcp/") as client:
        answer = await client.call_tool("draw_transparent_picture", SMALL)
    assert answer.content[-1].text.endswith(f"\n{WARNING}")
