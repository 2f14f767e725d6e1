"""What pods tell each other through PostgreSQL's NOTIFY: new jobs, cancels, changes and progress.

Notifications may be lost while a connection is made anew; whoever waits for them looks by itself now and then.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import asyncpg
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from alphalayer.core.job import JobProgress
from alphalayer.jobs import connections
from alphalayer.observability.logging import log

TO_WORKERS, TO_PODS = "alphalayer_work", "alphalayer_news"
"""Two channels, so that progress, which is most of the news, does not go to those that only draw: every listener gets everything."""
CHANNELS = {"all": (TO_WORKERS, TO_PODS), "api": (TO_PODS,), "worker": (TO_WORKERS,)}
ASK_EVERY_S = 10.0
"""How often to make sure that there is still somebody at the other end."""
REMEMBERED = 10_000
"""Of how many jobs the last progress is kept."""


class Notifications:
    """Hears the news of one role ("api", "worker" or "all") on a connection of its own. `run` is one task of the event loop."""

    def __init__(self, url: str, role: str, on_cancel: Callable[[str], None]):
        self._url = url
        self._channels = CHANNELS[role]
        self._on_cancel = on_cancel
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self._progress: dict[str, JobProgress] = {}
        self.queued = asyncio.Event()
        """Set when a job came in; whoever takes jobs clears it."""
        self.is_first = False
        """Whether this one, of all that listen, does what one is to do."""

    async def run(self) -> None:
        """Listen until cancelled; when the connection is lost, connect again and let everybody look."""
        while True:
            lost = asyncio.Event()
            connection: Any = None
            try:
                connection = await connections.connect(self._url)
                connection.add_termination_listener(partial(_set, lost))
                for channel in self._channels:
                    await connection.add_listener(channel, self._hear)
                self._wake_all()
                await self._lose(connection, lost)
            except (
                OSError,
                asyncpg.PostgresError,
                asyncpg.InterfaceError,
                asyncio.TimeoutError,
            ) as error:
                log.warning("database.unreachable", error=str(error))
            finally:
                self.is_first = False
                if connection and not connection.is_closed():
                    connection.terminate()
            await asyncio.sleep(1.0)

    async def of_jobs(self, part: float, longest_s: float) -> bool:
        """Wait for news of a job, of which only a part is heeded, or for so long; whether there were news."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + longest_s
        while True:
            try:
                await asyncio.wait_for(self.queued.wait(), deadline - loop.time())
            except asyncio.TimeoutError:
                return False
            if random.random() < part:
                return True
            self.queued.clear()

    async def tell(
        self, connection: AsyncConnection, kind: str, job_id: str = "", **more: Any
    ) -> None:
        """Tell everybody, once the transaction of this connection is committed: "queued", "cancel", "changed" or "progress"."""
        channel = TO_WORKERS if kind in ("queued", "cancel") else TO_PODS
        await connection.execute(
            select(func.pg_notify(channel, json.dumps({"news": kind, "id": job_id, **more})))
        )

    def progress_of(self, job_id: str) -> JobProgress:
        """How far a job was when it was last heard of."""
        return self._progress.get(job_id, JobProgress())

    @contextlib.contextmanager
    def about(self, job_id: str) -> Generator[asyncio.Event]:
        """An event that is set at every news of a job."""
        event = asyncio.Event()
        self._watchers.setdefault(job_id, set()).add(event)
        try:
            yield event
        finally:
            self._watchers[job_id].discard(event)
            if not self._watchers[job_id]:
                del self._watchers[job_id]

    def _hear(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        news = json.loads(str(payload))
        kind, job_id = news.pop("news"), news.pop("id")
        if kind == "queued":
            self.queued.set()
        elif kind == "cancel":
            self._on_cancel(job_id)
        elif kind == "changed":
            self._progress.pop(job_id, None)
        elif kind == "progress":
            self._progress.pop(job_id, None)
            self._progress[job_id] = JobProgress.model_validate(news)
            while len(self._progress) > REMEMBERED:
                del self._progress[next(iter(self._progress))]
        for watcher in self._watchers.get(job_id, ()):
            watcher.set()

    async def _lose(self, connection: Any, lost: asyncio.Event) -> None:
        """Return or raise when the connection is gone: who only listens would not notice that nobody speaks any more."""
        while not lost.is_set():
            # the lock is the connection's: whoever is gone has it no more
            ask = (
                "SELECT TRUE"
                if self.is_first
                else "SELECT pg_try_advisory_lock(hashtext('alphalayer first'))"
            )
            self.is_first = await connection.fetchval(ask, timeout=ASK_EVERY_S)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(lost.wait(), ASK_EVERY_S)

    def _wake_all(self) -> None:
        self.queued.set()
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.set()


def _set(event: asyncio.Event, _connection: object) -> None:
    event.set()
