"""With `sign_file_urls`, only signed URLs open images: in every response that has one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from fastmcp import Client
from fastmcp.client.transports import StreamableHttpTransport
from tests.integration.test_webhooks import Receiver
from tests.support.serving import served, wait_until

BODY = {"prompt": "x", "steps": 1, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with served(
        tmp_path_factory.mktemp("signed"),
        sign_file_urls="a secret of 16 characters",
        webhook_secret="of the receiver",
        webhook_allow_private=True,
        allowed_hosts="pics.example.com",
    ) as client:
        yield client


def test_signed_url_of_each_dialect_opens_the_image(service: httpx.Client):
    native = service.post("/alpha/v1/txt2img", json=BODY).json()
    openai = service.post(
        "/v1/images/generations",
        json={"prompt": "x", "size": "64x64", "response_format": "url", "output_format": "jpeg"},
    ).json()
    job = service.get("/alpha/v1/jobs").json()["jobs"][-1]
    for url in (native["url"], openai["data"][0]["url"], job["images"][0]["url"]):
        answer, head = service.get(url), service.head(url)
        assert (answer.status_code, head.status_code) == (200, 200)
        caching, age_s = answer.headers["cache-control"].split(", ")[:2]
        assert caching == "private"
        assert 86_000 < int(age_s.partition("=")[2]) <= 172_800
        bare = url.partition("?")[0]
        for wrong in (bare, f"{url}0", url.replace("expires=1", "expires=2")):
            refused = service.get(wrong)
            assert refused.status_code == service.head(wrong).status_code == 403
            assert refused.json()["code"] == "forbidden"
    convert = f"/alpha/v1/convert/{native['filename']}"
    query = urlsplit(native["url"]).query
    assert service.get(f"{convert}?format=webp").status_code == 403
    assert service.get(f"{convert}?format=webp&{query}").status_code == 200


def test_signed_urls_of_previews_and_webhooks_open(service: httpx.Client):
    with Receiver() as receiver:
        body = {**BODY, "steps": 20, "previews": True, "webhook_url": receiver.url}
        job = service.post("/alpha/v1/jobs", json=body).json()
        with service.stream("GET", job["events_url"]) as stream:
            lines = [line[6:] for line in stream.iter_lines() if line.startswith("data: ")]
        previews = [view["preview_url"] for view in map(json.loads, lines) if view["preview_url"]]
        wait_until(lambda: receiver.requests)
    assert previews
    assert all("signature=" in url for url in previews)
    # the preview itself is removed with the end of its job
    assert service.get(previews[-1]).status_code in (200, 404)
    sent = json.loads(receiver.requests[0][2])
    assert service.get(sent["images"][0]["url"]).status_code == 200


async def test_signed_url_of_the_tool_opens_the_image(service: httpx.Client):
    own = {"X-Forwarded-Host": "pics.example.com", "X-Forwarded-Proto": "https"}
    transport = StreamableHttpTransport(f"{service.base_url}/mcp/", headers=own)
    async with Client(transport) as client:
        answer = await client.call_tool("draw_transparent_picture", BODY)
    url = answer.content[1].text.split()[0]
    assert url.startswith("https://pics.example.com/alpha/v1/file/")
    path = url.removeprefix("https://pics.example.com")
    assert service.get(path).status_code == 200
