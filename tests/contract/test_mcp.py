"""The tool for assistants, with a real MCP client: mounted in a service, and over stdio."""

from __future__ import annotations

import asyncio
import base64
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from fastmcp import Client
from fastmcp.client.transports import StdioTransport, StreamableHttpTransport
from fastmcp.exceptions import ToolError
from structlog.testing import capture_logs
from tests.support.serving import put_model, served

from alphalayer.auth.api_keys import add_key
from alphalayer.config import Settings
from alphalayer.images import codecs
from alphalayer.service.app import create_app

# the client of fastmcp leaves the connection of a failed call to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
TOOL = "draw_transparent_picture"
SMALL = {"prompt": "an apple", "width": 64, "height": 64, "steps": 4}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with served(tmp_path_factory.mktemp("service"), engine_options={"step_s": 0.05}) as service:
        yield service


@pytest.fixture(params=["mounted", "stdio"])
def transport(request: pytest.FixtureRequest, service: httpx.Client) -> object:
    if request.param == "mounted":
        return StreamableHttpTransport(f"{service.base_url}/mcp/")
    return StdioTransport(
        sys.executable, ["-m", "alphalayer", "mcp", "--url", str(service.base_url)]
    )


async def test_tool_returns_the_image_and_reports_progress(transport: object):
    reported: list[tuple[float, float | None]] = []

    async def progress(done: float, total: float | None, _message: str | None) -> None:
        reported.append((done, total))

    async with Client(transport) as client:
        tool, *others = await client.list_tools()
        assert tool.name == TOOL
        assert [other.name for other in others] == ["change_image", "generate_layers"]
        assert "prompt" in tool.input_schema["required"]
        answer = await client.call_tool(
            TOOL, {**SMALL, "seed": 7, "steps": 20}, progress_handler=progress
        )
    image, words = answer.content
    rgba, parameters = codecs.decode(base64.b64decode(image.data))
    assert rgba.shape == (64, 64, 4)
    assert "Seed: 7" in (parameters or "")
    assert "/alpha/v1/file/alpha_" in words.text
    assert "seed 7" in words.text
    done = [step for step, _ in reported]
    assert done == sorted(done)
    assert len({*done} - {0, 20}) >= 2
    assert reported[-1][1] == 20


async def test_tools_change_an_image_and_generate_layers(tmp_path: Path):
    with served(put_model(tmp_path), public_url="https://art.example") as service:
        transport = StreamableHttpTransport(f"{service.base_url}/mcp/")
        async with Client(transport) as client:
            small = {**SMALL, "steps": 1}
            answer = await client.call_tool("generate_layers", small)
            *images, words = answer.content
            lines = words.text.splitlines()
            assert len(images) == 4
            assert "background, 64x64, seed" in lines[0]
            assert lines[4].startswith("https://art.example/alpha/v1/jobs/")
            assert lines[4].endswith("/layers.psd")
            name = lines[1].partition(" ")[0].rpartition("/")[2]
            answer = await client.call_tool("change_image", {**small, "image": name})
            assert len(answer.content) == 2
            with pytest.raises(ToolError, match="image: not base64"):
                await client.call_tool("change_image", {**small, "image": "!"})


async def test_tool_errors_name_the_argument(transport: object):
    async with Client(transport) as client:
        with pytest.raises(ToolError, match="prompt: empty"):
            await client.call_tool(TOOL, {**SMALL, "prompt": "   "})
        for steps, words in ((0, "got 0; at least 1."), ("many", 'got "many"; a whole number.')):
            with pytest.raises(ToolError) as wrong:
                await client.call_tool(TOOL, {**SMALL, "steps": steps})
            assert str(wrong.value) == f"steps: {words} The fields are described at /docs."


async def test_tool_call_cancelled_cancels_its_job(service: httpx.Client):
    async with Client(StreamableHttpTransport(f"{service.base_url}/mcp/")) as client:
        call = asyncio.create_task(client.call_tool(TOOL, {**SMALL, "steps": 150}))
        while not service.get("/alpha/v1/jobs", params={"state": "running"}).json()["jobs"]:
            await asyncio.sleep(0.05)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    for _ in range(100):
        if not service.get("/alpha/v1/jobs", params={"state": "running"}).json()["jobs"]:
            break
        await asyncio.sleep(0.05)
    (last, *_) = service.get("/alpha/v1/jobs").json()["jobs"]
    assert last["state"] == "cancelled"


def test_mcp_package_missing_is_logged(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "alphalayer.integrations.mcp", None)
    monkeypatch.delattr("alphalayer.integrations.mcp", raising=False)
    with capture_logs() as lines:
        app = create_app(Settings())
    assert not [route for route in app.routes if getattr(route, "path", "") == "/mcp"]
    [line] = [line for line in lines if line["event"] == "mcp.disabled"]
    assert " install " in line["hint"]
    assert "[mcp]" in line["hint"]


async def test_tool_uses_the_key_of_its_caller(tmp_path: Path):
    (tmp_path / "data").mkdir()
    key = add_key(tmp_path / "data" / "keys.json", "me")
    with served(
        tmp_path, keys_file=tmp_path / "data" / "keys.json", allowed_hosts="pics.example.com"
    ) as service:
        refused = [
            service.request(method, "/mcp/", content=content)
            for method in ("GET", "POST", "DELETE")
            for content in (b"{", b"[" * 900_000, b"x" * 2_000_000)
        ]
        assert {answer.status_code for answer in refused} == {401}
        assert {answer.json()["code"] for answer in refused} == {"unauthorized"}
        assert "a key is needed" in refused[0].json()["detail"]
        own = {
            "Authorization": f"Bearer {key}",
            "X-Forwarded-Host": "pics.example.com",
            "X-Forwarded-Proto": "https",
        }
        async with Client(
            StreamableHttpTransport(f"{service.base_url}/mcp/", headers=own)
        ) as client:
            answer = await client.call_tool(TOOL, SMALL)
        assert answer.content[1].text.startswith("https://pics.example.com/alpha/v1/file/")
        own_jobs = service.get("/alpha/v1/jobs", headers={"X-API-Key": key}).json()["jobs"]
        assert len(own_jobs) == 1


async def test_tool_call_repeated_by_a_proxy_generates_once(service: httpx.Client):
    assert send(service, 7) == send(service, 7) != send(service, 8)


async def test_tool_call_repeated_after_a_timeout_is_answered(service: httpx.Client):
    with ThreadPoolExecutor(1) as pool:
        abandoned = pool.submit(send, service, 9, steps=30, timeout_s=0.7)
        while not service.get("/alpha/v1/jobs", params={"state": "running"}).json()["jobs"]:
            await asyncio.sleep(0.05)
        assert send(service, 9, steps=30)
        with pytest.raises(httpx.ReadTimeout):
            abandoned.result()


def send(service: httpx.Client, number: int, *, steps: int = 4, timeout_s: float = 30) -> str:
    """Call the tool as a proxy does; return the line with the image's address."""
    headers = {
        "Accept": "application/json, text/event-stream",
        "Idempotency-Key": "a request of Nginx",
    }
    call = {"name": TOOL, "arguments": {**SMALL, "prompt": "an apple once", "steps": steps}}
    message = {"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": call}
    answer = service.post("/mcp/", json=message, headers=headers, timeout=timeout_s)
    assert answer.status_code == 200, answer.text
    return next(line for line in answer.text.splitlines() if "/alpha/v1/file/" in line)


@pytest.mark.parametrize(
    ("trusted", "start"),
    [("127.0.0.2", "https://pics.example.com/draw"), ("127.0.0.1", "http://127.0.0.1")],
)
def test_tool_image_address_follows_a_trusted_proxy(tmp_path: Path, trusted: str, start: str):
    """Call from 127.0.0.2, while the tool's own request comes from 127.0.0.1."""
    forwarded = {"Host": "pics.example.com", "Proto": "https", "Prefix": "/draw"}
    headers = {f"X-Forwarded-{name}": value for name, value in forwarded.items()}
    with served(tmp_path, trusted_proxies=trusted, allowed_hosts="*.example.com") as service:
        other = httpx.HTTPTransport(local_address="127.0.0.2")
        with httpx.Client(base_url=service.base_url, transport=other, headers=headers) as proxy:
            assert start in send(proxy, 1)


def test_tool_image_address_begins_with_the_public_url(tmp_path: Path):
    with served(tmp_path, public_url="https://alpha.example.com/") as service:
        assert "https://alpha.example.com/alpha/v1/file/" in send(service, 2)


def test_address_of_the_service_can_be_ipv6():
    from alphalayer.api.addresses import address

    assert address("::1", 7861) == "http://[::1]:7861"
    assert address("127.0.0.1", 7861) == "http://127.0.0.1:7861"
