"""Notifications between pods by PostgreSQL's NOTIFY: new jobs, cancels, changes, progress.

A notification can be lost while a connection is restored. Receivers also poll regularly.
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
from alphalayer.observability.background import retry_until_success
from alphalayer.observability.logging import describe_error, log

TO_WORKERS, TO_PODS = "alphalayer_work", "alphalayer_news"
"""Channels. A listener gets all of its channel, and workers do not need progress, which is
most of the traffic."""
CHANNELS = {"all": (TO_WORKERS, TO_PODS), "api": (TO_PODS,), "worker": (TO_WORKERS,)}
CHECK_EVERY_S = 10.0
"""Seconds between two checks of the connection."""
RECONNECT_S = 1.0
MAX_PROGRESS = 10_000
"""Number of jobs whose last progress is kept."""
_ERRORS = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncio.TimeoutError)


class Notifications:
    """Listener of one role ("api", "worker" or "all") on a connection of its own.

    `run` is one task of the event loop.
    """

    def __init__(self, url: str, role: str, on_cancel: Callable[[str], None]):
        self._url = url
        self._channels = CHANNELS[role]
        self._on_cancel = on_cancel
        self._subscribers: dict[str, set[asyncio.Event]] = {}
        self._progress: dict[str, JobProgress] = {}
        self.queued = asyncio.Event()
        """Set at a new job. The worker clears it."""
        self.is_first = False
        """Whether this listener does the work that one of all listeners does."""

    async def run(self) -> None:
        """Listen until cancelled. Reconnect when the connection is lost."""

        def report(error: Exception) -> None:
            log.warning("database.unreachable", error=describe_error(error))

        async for attempt in retry_until_success(_ERRORS, report, RECONNECT_S):
            with attempt:
                await self._listen()

    async def wait_for_job(self, sample_rate: float, longest_s: float) -> bool:
        """Wait for the notification of a new job.

        Args:
            sample_rate: Fraction of the notifications that count.
            longest_s: Maximum time to wait in seconds.

        Returns:
            Whether there was a notification.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + longest_s
        while True:
            try:
                await asyncio.wait_for(self.queued.wait(), deadline - loop.time())
            except asyncio.TimeoutError:
                return False
            if random.random() < sample_rate:  # nosec B311 # no secret depends on it
                return True
            self.queued.clear()

    async def notify(
        self, connection: AsyncConnection, kind: str, job_id: str = "", **fields: Any
    ) -> None:
        """Notify all listeners when the transaction of the connection is committed.

        Args:
            connection: Connection in a transaction.
            kind: "queued", "cancel", "changed" or "progress".
            job_id: Id of the job.
            fields: Further values of the notification.
        """
        channel = TO_WORKERS if kind in ("queued", "cancel") else TO_PODS
        payload = json.dumps({"news": kind, "id": job_id, **fields})
        await connection.execute(select(func.pg_notify(channel, payload)))

    def progress_of(self, job_id: str) -> JobProgress:
        """Return the last known progress of a job."""
        return self._progress.get(job_id, JobProgress())

    @contextlib.contextmanager
    def subscribe(self, job_id: str) -> Generator[asyncio.Event]:
        """Yield an event that every notification of a job sets."""
        event = asyncio.Event()
        self._subscribers.setdefault(job_id, set()).add(event)
        try:
            yield event
        finally:
            self._subscribers[job_id].discard(event)
            if not self._subscribers[job_id]:
                del self._subscribers[job_id]

    async def _listen(self) -> None:
        """Listen on a new connection until it is lost. Raises one of `_ERRORS`."""
        lost = asyncio.Event()
        connection = await connections.connect(self._url)
        try:
            connection.add_termination_listener(partial(_set, lost))
            for channel in self._channels:
                await connection.add_listener(channel, self._receive)
            self._wake_all()
            await self._watch_connection(connection, lost)
        finally:
            self.is_first = False
            if not connection.is_closed():
                connection.terminate()

    def _receive(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        fields = json.loads(str(payload))
        kind, job_id = fields.pop("news"), fields.pop("id")
        if kind == "queued":
            self.queued.set()
        elif kind == "cancel":
            self._on_cancel(job_id)
        elif kind == "changed":
            self._progress.pop(job_id, None)
        elif kind == "progress":
            self._progress.pop(job_id, None)
            self._progress[job_id] = JobProgress.model_validate(fields)
            while len(self._progress) > MAX_PROGRESS:
                del self._progress[next(iter(self._progress))]
        for event in self._subscribers.get(job_id, ()):
            event.set()

    async def _watch_connection(self, connection: Any, lost: asyncio.Event) -> None:
        """Query the server regularly, and raise an error once the connection is lost.

        A connection that only listens would not notice that its server is gone.
        """
        while not lost.is_set():
            # the lock belongs to the connection, so a lost listener does not keep it
            query = (
                "SELECT TRUE"
                if self.is_first
                else "SELECT pg_try_advisory_lock(hashtext('alphalayer first'))"
            )
            self.is_first = await connection.fetchval(query, timeout=CHECK_EVERY_S)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(lost.wait(), CHECK_EVERY_S)
        raise ConnectionError("the connection was closed")

    def _wake_all(self) -> None:
        self.queued.set()
        for events in self._subscribers.values():
            for event in events:
                event.set()


def _set(event: asyncio.Event, _connection: object) -> None:
    event.set()
