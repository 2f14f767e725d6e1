"""Probes while all threads of plain routes wait."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

import httpx
from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI

from alphalayer.api import ops


async def test_probes_answer_while_all_other_threads_wait():
    """Lists of models on a slow disk are such routes."""
    started, released = threading.Event(), threading.Event()
    app = FastAPI()
    app.include_router(ops.router)
    app.state.service = SimpleNamespace(
        readiness=lambda: {"ready": True}, probes=CapacityLimiter(1)
    )

    @app.get("/list")
    def list_models() -> None:  # pyright: ignore[reportUnusedFunction]
        started.set()
        assert released.wait(10)

    to_thread.current_default_thread_limiter().total_tokens = 1
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        waiting = asyncio.create_task(client.get("/list"))
        assert await asyncio.to_thread(started.wait, 10)
        try:
            for path in ("/livez", "/readyz", "/ping"):
                answer = await asyncio.wait_for(client.get(path), 2)
                assert answer.status_code == 200
        finally:
            released.set()
        assert (await waiting).status_code == 200
