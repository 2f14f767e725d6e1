"""Work on pixels: in threads of its own, with a memory budget and a bounded queue.

Health checks and plain routes use other threads, so that they never wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import math
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import anyio

from alphalayer.core.errors import Busy
from alphalayer.images.files import count_pixels

QUEUE_LIMIT = 32
"""Most waiting requests. They hold no image yet, except uploads."""
WAIT_LIMIT_S = 30.0
"""Longest wait for a turn. Most clients give up soon afterwards."""
TRIM_BYTES = 20_000_000
"""Work with more memory returns it to the system at its end."""
PACE_WEIGHT = 0.2
"""Weight of the last turn in the mean duration of turns."""
_T = TypeVar("_T")


class PixelPool:
    """Threads for work on pixels.

    A request first waits for its turn, and then reads and processes its image.
    So there are never more images in memory than threads.

    Args:
        budget_bytes: Memory of all work at one time. Work that needs more runs alone.
        threads: Number of threads.
        queue_limit: Most requests that wait for a turn.
        wait_limit_s: Seconds after which a waiting request is refused.
    """

    def __init__(
        self,
        budget_bytes: int,
        threads: int = 1,
        queue_limit: int = QUEUE_LIMIT,
        wait_limit_s: float = WAIT_LIMIT_S,
    ):
        self.waiting = 0
        self.used_bytes = 0
        self._budget_bytes = budget_bytes
        self._threads = threads
        self._queue_limit = queue_limit
        self._wait_limit_s = wait_limit_s
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="pixels")
        self._turns = asyncio.Semaphore(threads)
        self._released = asyncio.Event()
        self._mean_s = 1.0

    @property
    def retry_after_s(self) -> int:
        """Return the seconds until the requests that wait now have had their turn."""
        return max(1, math.ceil(self.waiting * self._mean_s / self._threads))

    @contextlib.asynccontextmanager
    async def turn(self, *, limited: bool = True) -> AsyncGenerator[None]:
        """Wait for a turn, in the order of the calls. A cancelled call leaves the queue.

        Args:
            limited: Whether the queue and the wait are limited. The answer of a finished job
                always waits.

        Raises:
            Busy: The queue is full, or the wait took too long.
        """
        if limited and self._turns.locked() and self.waiting >= self._queue_limit:
            raise self._busy()
        self.waiting += 1
        try:
            timeout_s = self._wait_limit_s if limited else None
            await asyncio.wait_for(self._turns.acquire(), timeout_s)
        except asyncio.TimeoutError:
            raise self._busy() from None
        finally:
            self.waiting -= 1
        start = time.monotonic()
        try:
            yield
        finally:
            self._turns.release()
            self._mean_s += PACE_WEIGHT * (time.monotonic() - start - self._mean_s)

    async def run(self, size_bytes: int, work: Callable[..., _T], *arguments: Any) -> _T:
        """Run work in a thread of the pool, within a turn.

        Args:
            size_bytes: Memory that the work needs.
            work: Function that runs in the thread. It cannot be stopped: a cancelled call waits
                for its end, and its memory stays counted until then.
            arguments: Arguments of the function.
        """
        while self.used_bytes and self.used_bytes + size_bytes > self._budget_bytes:
            self._released.clear()
            await self._released.wait()
        loop = asyncio.get_running_loop()
        call = partial(_call, work, arguments, size_bytes > TRIM_BYTES)
        result = loop.run_in_executor(self._executor, call)
        self.used_bytes += size_bytes
        # a second cancellation ends the wait below, but not the work
        result.add_done_callback(lambda _: self._release(size_bytes))
        try:
            return await asyncio.shield(result)
        finally:
            # Starlette's scope cancels its task again and again
            with anyio.CancelScope(shield=True):
                await asyncio.wait([result])

    async def process(
        self,
        data: bytes,
        bytes_a_pixel: int,
        work: Callable[..., _T],
        *arguments: Any,
    ) -> _T:
        """Run work on an image file, whose memory depends on its pixels. See `run`.

        Args:
            data: The file, the first argument of the function.
            bytes_a_pixel: Memory that the work needs for a pixel.
            work: Function that runs in the thread.
            arguments: Its other arguments.
        """
        pixels = await self.run(0, count_pixels, data)
        return await self.run(pixels * bytes_a_pixel, work, data, *arguments)

    def close(self) -> None:
        """Stop the threads after their work. It does not wait."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _release(self, size_bytes: int) -> None:
        """Return the memory of finished work to the budget."""
        self.used_bytes -= size_bytes
        self._released.set()

    def _busy(self) -> Busy:
        error = Busy(
            f"{self.waiting} requests wait for work on images.",
            hint=f"Try again in {self.retry_after_s} seconds.",
        )
        error.retry_after_s = self.retry_after_s
        return error


def _call(work: Callable[..., _T], arguments: tuple[Any, ...], is_large: bool) -> _T:
    """Call a function. After large work, return the freed memory to the system."""
    try:
        return work(*arguments)
    finally:
        if is_large:
            # glibc keeps it otherwise; other systems have no such function
            with contextlib.suppress(AttributeError, OSError, TypeError):
                ctypes.CDLL(None).malloc_trim(0)
