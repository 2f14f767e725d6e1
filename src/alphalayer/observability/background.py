"""Work that goes on beside the requests: a task that fails is written down and started again, so that none ends in silence."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from alphalayer.observability.logging import log

PAUSE_S = 5.0


async def keep_running(name: str, work: Callable[[], Awaitable[None]]) -> None:
    """Run `work` until it returns or is cancelled; after anything that it raises, once more."""
    while True:
        try:
            return await work()
        except Exception as error:
            log.error("task.failed", task=name, again_in_s=PAUSE_S, exc_info=error)
        await asyncio.sleep(PAUSE_S)
