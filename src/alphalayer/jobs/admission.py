"""How full the shared queue is: how many jobs wait and for how long, what one takes lately, and whether there is room for one more."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from alphalayer.core.job import JobState
from alphalayer.jobs.base import USUAL_SECONDS, check_capacity
from alphalayer.jobs.table import jobs

_WAITING = jobs.c.state == JobState.QUEUED.value
_COUNT = select(func.count()).select_from(jobs).where(_WAITING)
_RUNNING = (
    select(jobs.c.id, jobs.c.started_at, func.count().over())
    .where(jobs.c.state == JobState.RUNNING.value)
    .limit(20)
)
"""Some of those that run, each with the number of all."""
_LATELY = (
    select((jobs.c.finished_at - jobs.c.started_at).label("seconds"))
    .where(jobs.c.state == JobState.DONE.value)
    .order_by(jobs.c.created_at.desc())
    .limit(20)
    .subquery()
)


class QueueStats:
    """The figures of the whole queue, as they were when somebody looked last, and its limits."""

    def __init__(self, limit: int, shares: Mapping[str, float]):
        self._limit = limit
        self._shares = shares
        self.queue_length = 0
        self.oldest_waiting_s = 0.0
        self.usual_s = USUAL_SECONDS
        """What a job took lately."""
        self.running = 0
        self.some_running: dict[str, float] = {}
        """When some of those that run were started, by id."""

    @property
    def retry_after_s(self) -> int:
        """When a client that found no room may try again, in seconds."""
        return max(1, round(self.usual_s))

    async def look(self, connection: AsyncConnection) -> None:
        """Bring the figures up to date."""
        oldest = select(func.count(), func.min(jobs.c.created_at)).where(_WAITING)
        count, since = (await connection.execute(oldest)).one()
        seconds = (await connection.execute(select(func.avg(_LATELY.c.seconds)))).scalar()
        found = (await connection.execute(_RUNNING)).all()
        self.running = found[0][2] if found else 0
        self.some_running = {job_id: started_at for job_id, started_at, _ in found}
        self.queue_length = count
        self.oldest_waiting_s = time.time() - since if since else 0.0
        self.usual_s = float(seconds) if seconds is not None else USUAL_SECONDS

    async def positions(
        self, connection: AsyncConnection, job_ids: Collection[str]
    ) -> dict[str, int]:
        """The places in the queue of those of the jobs that wait; 1 is next."""
        waits = jobs.alias()
        before = (
            select(func.count() + 1)
            .where(waits.c.state == JobState.QUEUED.value, waits.c.created_at < jobs.c.created_at)
            .scalar_subquery()
        )
        found = await connection.execute(
            select(jobs.c.id, before).where(_WAITING, jobs.c.id.in_(job_ids))
        )
        return dict(found.tuples().all())

    async def check(self, connection: AsyncConnection, owner: str) -> None:
        """Raises `QueueFull` where the queue, or the owner's share of it, has no room for one more."""
        count = (await connection.execute(_COUNT)).scalar_one()
        share = self._shares.get(owner, 1.0)
        mine = _COUNT.where(jobs.c.owner == owner)
        theirs = (await connection.execute(mine)).scalar_one() if share < 1.0 else 0
        check_capacity(count, self._limit, owner, theirs, share, self.retry_after_s)
