"""Answers as server-sent events."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi.responses import StreamingResponse

from alphalayer.api.deps import PendingJob, Service, convert_preview, follow, raise_if_failed
from alphalayer.api.errors import Problem
from alphalayer.api.guard import EVENT_STREAM
from alphalayer.api.openai.errors import error_body
from alphalayer.api.openai.files import convert, finished_file
from alphalayer.api.openai.schemas import BEST, USAGE, ImageFields, settings_of
from alphalayer.core.errors import AlphalayerError
from alphalayer.core.job import Job
from alphalayer.jobs.base import JobView

SILENT_S = 15.0
"""Pause after which a comment is sent. Proxies close idle connections."""
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
EVENT_COPIES = 6
"""Memory for an event, in bytes a byte of its file."""


def stream_events(body: ImageFields, service: Service, pending: PendingJob) -> StreamingResponse:
    """Return the response with the events of a job."""
    events = _with_keepalive(_events(body, service, pending))
    return StreamingResponse(events, media_type=EVENT_STREAM, headers=STREAM_HEADERS)


async def _with_keepalive(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """Yield the events, and comments while there are none."""
    upcoming = asyncio.ensure_future(anext(events, ""))
    try:
        while True:
            done, _ = await asyncio.wait({upcoming}, timeout=SILENT_S)
            if done:
                if not (event := upcoming.result()):
                    return
                yield event
                upcoming = asyncio.ensure_future(anext(events, ""))
            else:
                yield ": keep-alive\n\n"
    finally:
        upcoming.cancel()


async def _events(body: ImageFields, service: Service, pending: PendingJob) -> AsyncIterator[str]:
    """Yield the events of a job. A client that disconnects withdraws its job."""
    sent, job = 0, None
    try:
        async for view in follow(service, pending.job_id, elsewhere=True):
            job = view.job
            preview = view.progress.preview
            if preview and not job.state.is_final and _is_due(view, sent, body.partial_images):
                image = await convert_preview(service, preview, convert, body.output_format, BEST)
                if image:
                    yield _event(
                        body, "partial_image", image, partial_image_index=sent, **_echo(body)
                    )
                    sent += 1
        async for event in _last_events(body, service, job):
            yield event
    except AlphalayerError as error:
        yield f"event: error\ndata: {json.dumps(error_body(Problem.of(error)))}\n\n"
    except (asyncio.CancelledError, GeneratorExit):
        await pending.withdraw()
        raise


async def _last_events(body: ImageFields, service: Service, job: Job | None) -> AsyncIterator[str]:
    if not job or not (result := raise_if_failed(job).result):
        return
    warnings = {"warnings": result.warnings} if result.warnings else {}
    for image in result.images:
        fields = {**settings_of(body, job, image), "usage": USAGE, **warnings}
        async with service.pixels.turn(limited=False):
            data = await finished_file(body, service, image.key)
            event = await service.pixels.run(
                EVENT_COPIES * len(data), partial(_event, body, "completed", data, **fields)
            )
        yield event


def _is_due(view: JobView, sent: int, requested: int) -> bool:
    """Return whether the next preview is due; they are spread over the steps."""
    step, steps = view.progress.step, view.progress.steps
    return sent < requested and step * (requested + 1) >= steps * (sent + 1)


def _echo(body: ImageFields) -> dict[str, Any]:
    return {
        name: getattr(body, name) for name in ("background", "output_format", "quality", "size")
    }


def _event(body: ImageFields, name: str, file: bytes, **fields: Any) -> str:
    kind = f"{body.event}.{name}"
    image = base64.b64encode(file).decode()
    data = {"type": kind, "b64_json": image, "created_at": int(time.time()), **fields}
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"
