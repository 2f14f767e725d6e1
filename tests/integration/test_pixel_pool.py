"""Routes with work on pixels: refusals, dropped work, files in JSON answers, hostile uploads."""

from __future__ import annotations

import asyncio
import base64
import threading
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import httpx
import numpy as np
import pytest
import pytest_asyncio
from fastapi import FastAPI
from pydantic import BaseModel

from alphalayer.api import errors, ops
from alphalayer.api.a1111 import routes as a1111
from alphalayer.api.auth import Authenticator
from alphalayer.api.deps import convert_preview, while_connected
from alphalayer.api.embedded_files import EmbeddedFiles
from alphalayer.api.native import routes as native
from alphalayer.api.pixel_pool import PixelPool
from alphalayer.api.uploads import store_upload
from alphalayer.core.errors import Busy, Cancelled, InvalidRequest
from alphalayer.images import codecs, postprocess
from alphalayer.observability.metrics import Metrics
from alphalayer.storage.objects import open_storage

PNG = codecs.encode(np.full((8, 8, 4), 200, np.uint8), parameters="Steps: 1")
NAME = "alpha_1700000000_000000000000.png"
CONVERT = f"/alpha/v1/convert/{NAME}"


class Blocked:
    """Work that waits in its thread until the test releases it."""

    def __init__(self):
        self.calls = 0
        self.started, self.released = threading.Event(), threading.Event()

    def __call__(self, *_arguments: Any) -> bytes:
        self.calls += 1
        self.started.set()
        assert self.released.wait(10)
        return b"done"

    async def wait_started(self) -> None:
        assert await asyncio.to_thread(self.started.wait, 10)


async def until(condition: Any) -> None:
    """Let other tasks run until a condition holds."""
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never held")


@pytest.fixture
def service(tmp_path: Path) -> SimpleNamespace:
    storage = open_storage(str(tmp_path))
    storage.put(NAME, PNG)
    return SimpleNamespace(
        url_signer=None,
        storage=storage,
        metrics=Metrics(),
        pixels=PixelPool(1000, threads=1, queue_limit=1),
        authenticator=Authenticator(lambda: None),
        readiness=lambda: {"ready": True},
        probes=anyio.CapacityLimiter(1),
    )


@pytest_asyncio.fixture
async def client(service: SimpleNamespace) -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()
    app.state.service = service
    for router in (native.router, a1111.router, ops.router):
        app.include_router(router)
    errors.install(app, {})
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch) -> Blocked:
    """Make conversions wait."""
    blocked = Blocked()
    monkeypatch.setattr(postprocess, "convert", blocked)
    return blocked


async def test_convert_beyond_the_queue_is_refused(
    client: httpx.AsyncClient, service: SimpleNamespace, convert: Blocked
):
    """Probes are answered meanwhile, and later requests are served."""
    running = asyncio.create_task(client.get(CONVERT))
    await convert.wait_started()
    waiting = asyncio.create_task(client.get(CONVERT))
    await until(lambda: service.pixels.waiting == 1)
    refused = await client.get(CONVERT)
    assert (refused.status_code, refused.json()["code"]) == (429, "busy")
    assert int(refused.headers["Retry-After"]) >= 1
    info = {"image": base64.b64encode(PNG).decode()}
    assert (await client.post("/sdapi/v1/png-info", json=info)).status_code == 429
    for path in ("/livez", "/ping", "/readyz"):
        assert (await client.get(path)).status_code == 200
    samples = (await client.get("/metrics")).text.splitlines()
    assert 'alphalayer_refused_total{reason="busy"} 2.0' in samples
    convert.released.set()
    assert [(await task).content for task in (running, waiting)] == [b"done"] * 2
    assert (service.pixels.waiting, service.pixels.used_bytes) == (0, 0)


async def test_waiting_work_of_a_disconnected_client_is_dropped(service: SimpleNamespace):
    pool, blocked, dropped = service.pixels, Blocked(), Blocked()
    disconnected = asyncio.Event()

    async def receive() -> dict[str, str]:
        await disconnected.wait()
        return {"type": "http.disconnect"}

    async def work(function: Blocked) -> bytes:
        async with pool.turn():
            return await pool.run(1, function)

    running = asyncio.create_task(work(blocked))
    await blocked.wait_started()
    request: Any = SimpleNamespace(receive=receive)
    waiting = asyncio.create_task(while_connected(request, work(dropped)))
    await until(lambda: pool.waiting == 1)
    disconnected.set()
    with pytest.raises(Cancelled):
        await waiting
    await until(lambda: pool.waiting == 0)
    blocked.released.set()
    assert await running == b"done"
    assert dropped.calls == 0


async def test_cancelled_work_keeps_its_memory_until_its_end():
    """A thread cannot be stopped, so that its image stays in memory."""
    pool, blocked = PixelPool(1000, threads=1, queue_limit=1), Blocked()

    async def work() -> None:
        async with pool.turn():
            await pool.run(600, blocked)

    task = asyncio.create_task(work())
    await blocked.wait_started()
    task.cancel()
    await asyncio.sleep(0)
    assert pool.used_bytes == 600
    assert not task.done()
    blocked.released.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert pool.used_bytes == 0


async def test_work_cancelled_twice_returns_its_memory():
    pool, blocked = PixelPool(1000), Blocked()
    task = asyncio.create_task(pool.run(600, blocked))
    await blocked.wait_started()
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert pool.used_bytes == 600
    following = asyncio.create_task(pool.run(600, bytes))
    blocked.released.set()
    assert await asyncio.wait_for(following, 5) == b""
    await until(lambda: pool.used_bytes == 0)


async def test_work_in_a_cancelled_scope_keeps_its_turn():
    """Starlette streams an answer in a scope, which cancels until its task has ended."""
    pool, blocked = PixelPool(1000), Blocked()
    scope = anyio.CancelScope()

    async def work() -> None:
        with scope:
            async with pool.turn():
                await pool.run(600, blocked)

    task = asyncio.create_task(work())
    await blocked.wait_started()
    scope.cancel()
    for _ in range(9):
        await asyncio.sleep(0)
    assert not task.done()
    blocked.released.set()
    await task
    assert pool.used_bytes == 0


async def test_work_after_close_takes_no_memory():
    pool = PixelPool(1000)
    pool.close()
    with pytest.raises(RuntimeError):
        await pool.run(600, bytes)
    assert pool.used_bytes == 0


async def test_work_beyond_the_memory_waits_and_large_work_runs_alone():
    pool = PixelPool(1000, threads=2, queue_limit=9)
    first, second = Blocked(), Blocked()

    async def work(size_bytes: int, function: Blocked) -> None:
        async with pool.turn():
            await pool.run(size_bytes, function)

    # more than the pool has: it runs alone
    tasks = [asyncio.create_task(work(5000, first))]
    await first.wait_started()
    tasks.append(asyncio.create_task(work(10, second)))
    for _ in range(5):
        await asyncio.sleep(0)
    assert (pool.used_bytes, second.calls) == (5000, 0)
    second.released.set()
    first.released.set()
    await asyncio.gather(*tasks)
    assert (pool.used_bytes, second.calls) == (0, 1)


async def test_work_that_waits_too_long_is_refused():
    pool, blocked = PixelPool(1000, threads=1, wait_limit_s=0.01), Blocked()

    async def work() -> bytes:
        async with pool.turn():
            return await pool.run(1, blocked)

    running = asyncio.create_task(work())
    await blocked.wait_started()
    with pytest.raises(Busy):
        await work()
    blocked.released.set()
    assert await running == b"done"
    assert await work() == b"done"


async def test_answers_of_finished_jobs_wait_in_a_full_queue():
    pool, blocked = PixelPool(1000, threads=1, queue_limit=0), Blocked()

    async def work(limited: bool) -> bytes:
        async with pool.turn(limited=limited):
            return await pool.run(1, blocked)

    running = asyncio.create_task(work(True))
    await blocked.wait_started()
    with pytest.raises(Busy, match="0 requests wait"):
        await work(True)
    finished = asyncio.create_task(work(False))
    await until(lambda: pool.waiting == 1)
    blocked.released.set()
    assert await asyncio.gather(running, finished) == [b"done"] * 2


async def test_retry_after_follows_the_measured_pace(monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(0, 10_000, 50))
    monkeypatch.setattr(
        "alphalayer.api.pixel_pool.time", SimpleNamespace(monotonic=lambda: next(clock))
    )
    pool = PixelPool(1000, threads=1)
    for _ in range(30):
        async with pool.turn():
            pass
    pool.waiting = 2
    assert pool.retry_after_s == 100


async def test_convert_of_a_file_that_is_no_image_names_the_field(
    client: httpx.AsyncClient, service: SimpleNamespace
):
    service.storage.put("alpha_1700000000_000000000001.png", b"no image")
    answer = await client.get("/alpha/v1/convert/alpha_1700000000_000000000001.png")
    assert (answer.status_code, answer.json()["field"]) == (422, "filename")


async def test_file_larger_than_any_image_is_not_read(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("alphalayer.storage.MAX_FILE_BYTES", len(PNG) - 1)
    assert (await client.get(CONVERT)).status_code == 404


async def test_preview_is_left_out_while_busy_or_missing(service: SimpleNamespace):
    assert await convert_preview(service, NAME, len) == len(PNG)
    assert await convert_preview(service, NAME.replace("000.", "001."), len) is None
    service.pixels = PixelPool(1000, queue_limit=0)
    async with service.pixels.turn():
        assert await convert_preview(service, NAME, len) is None


async def test_hostile_upload_names_its_field(service: SimpleNamespace):
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + PNG[24:29]
    huge = PNG[:12] + header + zlib.crc32(header).to_bytes(4, "big") + PNG[33:]
    for data, message in ((huge, "too large"), (b"x", "not an image")):
        with pytest.raises(InvalidRequest, match=message) as error:
            await store_upload(service, base64.b64encode(data).decode(), "init_images")  # type: ignore[arg-type]
        assert error.value.field == "init_images"
    with pytest.raises(InvalidRequest, match="not base64") as error:
        await store_upload(service, "data:image/png;base64,%", "init_images")  # type: ignore[arg-type]
    assert error.value.field == "init_images"


class Answer(BaseModel):
    images: list[str]
    prompt: str


async def test_embedded_files_arrive_as_base64_in_pieces():
    contents = [bytes(range(256)) * 3, b"", b"ab"]
    files = EmbeddedFiles()

    def chunks(data: bytes, size: int) -> Any:
        async def read() -> AsyncIterator[bytes]:
            for start in range(0, len(data), size):
                yield data[start : start + size]

        return read

    placeholders = [files.add(chunks(data, 7)) for data in contents]
    response = files.respond(Answer(images=[*placeholders, placeholders[0]], prompt="Äpfel, 0f"))
    pieces = [bytes(piece) async for piece in response.body_iterator]
    answer = Answer.model_validate_json(b"".join(pieces))
    assert [base64.b64decode(image) for image in answer.images] == [*contents, contents[0]]
    assert answer.prompt == "Äpfel, 0f"
    assert max(map(len, pieces)) < 100


async def test_answer_without_files_is_plain_json():
    response = EmbeddedFiles().respond(Answer(images=[], prompt="x"))
    pieces = [bytes(piece) async for piece in response.body_iterator]
    assert b"".join(pieces) == b'{"images":[],"prompt":"x"}'
