"""Statistics and limits of the shared queue."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from alphalayer.core.job import JobState
from alphalayer.jobs import estimates
from alphalayer.jobs.base import USUAL_SECONDS, check_capacity
from alphalayer.jobs.table import jobs

_WAITING = jobs.c.state == JobState.QUEUED.value
_COUNT = select(func.count()).select_from(jobs).where(_WAITING)
_RUNNING = (
    select(jobs.c.id, jobs.c.started_at, func.count().over())
    .where(jobs.c.state == JobState.RUNNING.value)
    .limit(20)
)
"""Selects a sample of the running jobs, each with the number of all running jobs."""
_RECENT = (
    select((jobs.c.finished_at - jobs.c.started_at).label("seconds"))
    .where(jobs.c.state == JobState.DONE.value)
    .order_by(jobs.c.created_at.desc())
    .limit(20)
    .subquery()
)


class QueueStats:
    """Statistics of the whole queue at its last refresh, and its limits."""

    def __init__(self, limit: int, shares: Mapping[str, float]):
        self._limit = limit
        self._shares = shares
        self.queue_length = 0
        self.oldest_waiting_s = 0.0
        self.usual_s = USUAL_SECONDS
        """Mean duration of recent jobs in seconds."""
        self.running = 0
        self.start_times: dict[str, float] = {}
        """Start of some running jobs in Unix seconds, by job id."""

    @property
    def retry_after_s(self) -> int:
        """Return the seconds until a client may retry after a full queue."""
        return max(1, round(self.usual_s))

    async def refresh(self, connection: AsyncConnection) -> None:
        """Update the statistics from the database."""
        oldest = select(func.count(), func.min(jobs.c.created_at)).where(_WAITING)
        count, since = (await connection.execute(oldest)).one()
        seconds = (await connection.execute(select(func.avg(_RECENT.c.seconds)))).scalar()
        rows = (await connection.execute(_RUNNING)).all()
        self.running = rows[0][2] if rows else 0
        self.start_times = {job_id: started_at for job_id, started_at, _ in rows}
        self.queue_length = count
        self.oldest_waiting_s = estimates.elapsed_s(since) or 0.0
        self.usual_s = max(0.0, float(seconds)) if seconds is not None else USUAL_SECONDS

    async def positions(
        self, connection: AsyncConnection, job_ids: Collection[str]
    ) -> dict[str, int]:
        """Return the queue position of each waiting job. 1 is next."""
        earlier = jobs.alias()
        position = (
            select(func.count() + 1)
            .where(
                earlier.c.state == JobState.QUEUED.value,
                earlier.c.created_at < jobs.c.created_at,
            )
            .scalar_subquery()
        )
        rows = await connection.execute(
            select(jobs.c.id, position).where(_WAITING, jobs.c.id.in_(job_ids))
        )
        return dict(rows.tuples().all())

    async def check(self, connection: AsyncConnection, owner: str) -> None:
        """Check that the queue has capacity for one more job of an owner.

        Raises:
            QueueFull: The queue or the owner's share of it is full.
        """
        count = (await connection.execute(_COUNT)).scalar_one()
        share = self._shares.get(owner, 1.0)
        owned = _COUNT.where(jobs.c.owner == owner)
        owner_count = (await connection.execute(owned)).scalar_one() if share < 1.0 else 0
        check_capacity(count, self._limit, owner, owner_count, share, self.retry_after_s)
