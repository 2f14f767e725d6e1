"""Scopes, rates, wrong keys and streams of removed keys, without a service."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from datetime import datetime, timezone
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import StreamingResponse
from structlog.testing import capture_logs

from alphalayer.api import auth
from alphalayer.api.auth import Authenticator
from alphalayer.api.guard import EVENT_STREAM, GuardedRoute, Reader
from alphalayer.auth.api_keys import Key, digest
from alphalayer.auth.store import basic_keys
from alphalayer.auth.wrong_keys import PER_MINUTE
from alphalayer.core.errors import Forbidden, RateLimited, Unauthorized


def key_of(secret: str, **fields: Any) -> Key:
    return Key(name=fields.pop("name", "shop"), sha256=digest(secret), **fields)


def request(secret: str | None = None, host: str = "10.0.0.1", basic: str | None = None) -> Request:
    headers = [(b"x-api-key", secret.encode())] if secret else []
    if basic:
        headers.append((b"authorization", b"Basic " + base64.b64encode(basic.encode())))
    scope = {"type": "http", "method": "GET", "path": "/x", "query_string": b"", "root_path": ""}
    return Request({**scope, "headers": headers, "client": (host, 1), "server": ("s", 1)})


def test_admit_key_without_the_scope_is_forbidden():
    authenticator = Authenticator(lambda: [key_of("s", scopes=("read",))])
    assert authenticator.admit(request("s"), "read")
    with capture_logs() as logs, pytest.raises(Forbidden, match='scope "generate"'):
        authenticator.admit(request("s"), "generate")
    assert [(line["event"], line["key"], line["scope"]) for line in logs] == [
        ("audit.forbidden", "shop", "generate")
    ]


def test_admit_expired_key_is_refused_and_not_counted_as_wrong():
    expired = key_of("s", expires=datetime(2020, 1, 1, tzinfo=timezone.utc))
    authenticator = Authenticator(lambda: [expired])
    for _ in range(PER_MINUTE + 1):
        with pytest.raises(Unauthorized, match="expired"):
            authenticator.admit(request("s"), "read")


def test_admit_counts_work_and_all_requests_apart():
    key = key_of("s", per_minute=1, requests_per_minute=3)
    authenticator = Authenticator(lambda: [key])
    authenticator.admit(request("s"), "generate", is_work=True)
    with pytest.raises(RateLimited, match="1 submissions and conversions a minute"):
        authenticator.admit(request("s"), "read", is_work=True)
    authenticator.admit(request("s"), "read")
    with pytest.raises(RateLimited, match="3 requests a minute") as caught:
        authenticator.admit(request("s"), "read")
    assert 1 <= caught.value.retry_after_s <= 60


def test_admit_wrong_keys_are_limited_by_address():
    authenticator = Authenticator(lambda: [key_of("s"), *basic_keys("ann:secret")])
    with capture_logs() as logs:
        for i in range(PER_MINUTE):
            with pytest.raises(Unauthorized):
                authenticator.admit(request(f"guess {i}"), "read")
        for _ in range(3):
            with pytest.raises(RateLimited, match="too many wrong keys"):
                authenticator.admit(request("guess"), "read")
    events = [line["event"] for line in logs]
    assert events == ["audit.wrong_key", "audit.wrong_keys_limited"]
    assert "guess" not in str(logs)
    # a random key is still accepted, a password is not even compared
    assert authenticator.admit(request("s"), "read")
    with pytest.raises(RateLimited):
        authenticator.admit(request(basic="ann:secret"), "read")
    assert authenticator.admit(request(basic="any:s"), "read")
    # other addresses and requests without a key are not affected
    assert authenticator.admit(request(basic="ann:secret", host="10.0.0.2"), "read")
    with pytest.raises(Unauthorized, match="a key is needed"):
        authenticator.admit(request(), "read")


def test_admit_guesses_of_passwords_are_limited():
    authenticator = Authenticator(lambda: basic_keys("ann:secret"))
    for i in range(PER_MINUTE):
        with pytest.raises(Unauthorized):
            authenticator.admit(request(basic=f"ann:{i}"), "read")
    with pytest.raises(RateLimited):
        authenticator.admit(request(basic="ann:secret"), "read")


async def test_while_accepted_ends_the_stream_of_a_removed_key(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(auth, "RECHECK_S", 0.01)
    keys = [key_of("s")]
    is_closed = asyncio.Event()

    async def chunks() -> AsyncIterator[str]:
        try:
            yield "first"
            await asyncio.Event().wait()
        finally:
            is_closed.set()

    stream = Authenticator(lambda: keys).while_accepted(keys[0], "read", chunks())
    assert await anext(stream) == "first"
    following = asyncio.ensure_future(anext(stream, None))
    await asyncio.sleep(0.05)
    assert not following.done()
    # the same name with another secret is another key
    keys[0] = key_of("other")
    assert await asyncio.wait_for(following, 5) is None
    await asyncio.wait_for(is_closed.wait(), 5)


async def test_while_accepted_passes_all_chunks_and_errors():
    key = key_of("s")

    async def chunks() -> AsyncIterator[str]:
        yield "a"
        yield "b"
        raise ValueError("broken")

    stream = Authenticator(lambda: [key]).while_accepted(key, "read", chunks())
    assert [await anext(stream), await anext(stream)] == ["a", "b"]
    with pytest.raises(ValueError, match="broken"):
        await anext(stream)


@pytest.mark.parametrize(
    ("media_type", "received"), [("application/json", '["1","2"]'), (EVENT_STREAM, '["1",')]
)
async def test_expired_key_ends_event_streams_only(media_type: str, received: str):
    """Half a JSON document with status 200 would look like a complete answer."""
    keys = [key_of("s")]
    router = APIRouter(route_class=GuardedRoute)

    @router.get("/x")
    async def answer(_client: Reader) -> StreamingResponse:  # pyright: ignore[reportUnusedFunction]
        async def chunks() -> AsyncIterator[str]:
            yield '["1",'
            keys.clear()
            yield '"2"]'

        return StreamingResponse(chunks(), media_type=media_type)

    app = FastAPI()
    app.state.service = SimpleNamespace(authenticator=Authenticator(lambda: keys))
    app.include_router(router)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.get("/x", headers={"X-API-Key": "s"})
    assert (response.status_code, response.text) == (200, received)
