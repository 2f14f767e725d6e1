"""What both dispatchers leave to the journal: which jobs are open, which are forgotten, and whose receivers are to be told."""

from __future__ import annotations

import contextlib
import time

from alphalayer.core.errors import StorageFailed
from alphalayer.core.job import Job
from alphalayer.jobs.table import Journal


class Housekeeping:
    """`alphalayer.jobs.base.JobStore` on the journal of any database."""

    def __init__(self, journal: Journal):
        self._journal = journal

    async def unfinished_ids(self) -> set[str]:
        """The ids of all jobs that are not over, anywhere."""
        return await self._journal.unfinished_ids()

    async def delete_finished(self, finished_before: float) -> int:
        """Remove old jobs from the journal; how many."""
        return await self._journal.delete_finished(finished_before)

    async def claim_due_webhooks(self, limit: int) -> list[tuple[Job, int]]:
        """Jobs whose receivers are to be told now, for this service alone; see the protocol."""
        return await self._journal.claim_webhooks(time.time(), limit)

    async def record_webhook_attempt(self, job_id: str, due: float | None, tries: int) -> None:
        """Note a try, and when the next one is due; None: no more. On a full disk the receiver is told once more."""
        with contextlib.suppress(StorageFailed):
            await self._journal.record_webhook_attempt(job_id, due, tries)
