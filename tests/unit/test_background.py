"""Background tasks continue after any error."""

from __future__ import annotations

import asyncio

import pytest
import structlog.testing

from alphalayer.observability import background


async def test_background_task_failure_is_logged_and_restarted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(background, "PAUSE_S", 0.0)
    left = [ValueError("one"), KeyError("two")]

    async def work() -> None:
        if left:
            raise left.pop(0)

    with structlog.testing.capture_logs() as logs:
        await background.keep_running("thing", work)
    assert [(line["event"], line["task"]) for line in logs] == [("task.failed", "thing")] * 2


async def test_background_task_cancel_stops_it():
    running = asyncio.create_task(background.keep_running("thing", lambda: asyncio.sleep(60)))
    await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


@pytest.mark.parametrize(
    ("max_pause_s", "bounds"),
    [(None, [(2, 4)] * 4), (10, [(2, 4), (4, 6), (8, 10), (10, 10)])],
)
async def test_retry_pauses_are_constant_or_grow_to_a_bound(
    monkeypatch: pytest.MonkeyPatch, max_pause_s: float | None, bounds: list[tuple[float, float]]
):
    pauses: list[float] = []

    async def record(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", record)
    errors = [OSError(str(i)) for i in range(len(bounds))]
    reported: list[Exception] = []
    remaining = list(errors)
    with structlog.testing.capture_logs() as logs:
        async for attempt in background.retry_until_success(
            OSError, reported.append, 2, max_pause_s
        ):
            with attempt:
                if remaining:
                    raise remaining.pop(0)
    assert reported == errors
    assert logs == [], "only the caller logs"
    for pause, (low, high) in zip(pauses, bounds, strict=True):
        assert low <= pause <= high


async def test_retry_raises_another_error_at_once():
    reported: list[Exception] = []

    async def fail() -> None:
        async for attempt in background.retry_until_success(OSError, reported.append, 60):
            with attempt:
                raise KeyError("another")

    with pytest.raises(KeyError):
        await fail()
    assert reported == []
