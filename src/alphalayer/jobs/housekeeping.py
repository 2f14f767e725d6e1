"""Housekeeping of stored jobs and options of clients, shared by both queues."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

from alphalayer.core.errors import StorageFailed
from alphalayer.core.job import Job
from alphalayer.jobs.table import Journal


class Housekeeping:
    """Implementation of `alphalayer.jobs.base.JobStore` and of options on a journal."""

    def __init__(self, journal: Journal):
        self._journal = journal

    async def unfinished_ids(self) -> set[str]:
        """Return the ids of all unfinished jobs of all services."""
        return await self._journal.unfinished_ids()

    async def input_names(self) -> set[str]:
        """Return the names of the input images of all unfinished jobs."""
        return await self._journal.input_names()

    async def count_finished(self) -> int:
        """Return the number of finished jobs."""
        return await self._journal.count_finished()

    async def delete_finished(self, finished_before: float, at_most: int) -> int:
        """Delete old jobs; see the protocol."""
        return await self._journal.delete_finished(finished_before, at_most)

    async def claim_due_webhooks(self, limit: int) -> list[tuple[Job, int]]:
        """Claim jobs whose webhook is due; see the protocol."""
        return await self._journal.claim_webhooks(time.time(), limit)

    async def record_webhook_attempt(self, job_id: str, due: float | None, tries: int) -> None:
        """Store an attempt; see the protocol. On a full disk the webhook is sent again."""
        with contextlib.suppress(StorageFailed):
            await self._journal.record_webhook_attempt(job_id, due, tries)

    async def load_options(self, owner: str) -> dict[str, Any]:
        """Return the options of a client; see `alphalayer.jobs.base.JobQueue`."""
        return await self._journal.load_options(owner)

    async def save_options(self, owner: str, options: Mapping[str, Any]) -> None:
        """Store options of a client; see `alphalayer.jobs.base.JobQueue`."""
        await self._journal.save_options(owner, options)
