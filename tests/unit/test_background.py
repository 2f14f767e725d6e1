"""Work beside the requests goes on whatever it raises."""

from __future__ import annotations

import asyncio

import pytest
import structlog.testing

from alphalayer.observability import background


async def test_what_fails_is_logged_and_started_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(background, "PAUSE_S", 0.0)
    left = [ValueError("one"), KeyError("two")]

    async def work() -> None:
        if left:
            raise left.pop(0)

    with structlog.testing.capture_logs() as logs:
        await background.keep_running("thing", work)
    assert [(line["event"], line["task"]) for line in logs] == [("task.failed", "thing")] * 2


async def test_a_cancelled_one_ends():
    running = asyncio.create_task(background.keep_running("thing", lambda: asyncio.sleep(60)))
    await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
