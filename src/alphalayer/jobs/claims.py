"""Claims of the shared queue: which job a worker gets next, and how it keeps the claim.

A row of PgQueuer has an entrypoint. It names the model and the batch key of the job.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import asyncpg
from pgqueuer import Queries
from pgqueuer.models import Job as QueueRow
from pgqueuer.ports.repository import EntrypointExecutionParameter
from pgqueuer.types import QueueEntrypoint, QueueManagerId
from sqlalchemy import select

from alphalayer.core.errors import SetupFailed, StorageFailed
from alphalayer.core.job import Job
from alphalayer.jobs import connections
from alphalayer.jobs.notifications import Notifications
from alphalayer.jobs.table import jobs
from alphalayer.jobs.transactions import Transactions

CLAIM_S = 15.0
"""Seconds without a heartbeat after which another worker may claim the job."""
NEVER_S = 1e9
CLEAN_EVERY_S = 600.0
MIN_SAMPLE_RATE = 0.002
AFFINITY_S = 30.0
"""Seconds that a worker may keep its model while an older job needs another one.

To load a model takes 5 to 10 seconds.
"""
RESTARTED = "/again"
"""Suffix of the entrypoint of a job that was started before. It has priority and no batch."""


async def install(url: str) -> None:
    """Create or upgrade PgQueuer's tables under a lock.

    It runs outside a transaction and without a time limit, as the upgrades require.

    Raises:
        SetupFailed: The tables cannot be created.
    """
    try:
        connection = await connections.connect(url)
        try:
            await connection.execute("SELECT pg_advisory_lock(hashtext('alphalayer queue'))")
            queue = Queries.from_asyncpg_connection(connection)
            await (queue.upgrade() if await queue.schema_is_installed() else queue.install())
            await queue.optimize_autovacuum()
        finally:
            await connection.close(timeout=connections.CONNECT_S)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise SetupFailed(
            f"the queue's tables cannot be created: {error}.",
            hint="Check that PostgreSQL runs, and the user's rights.",
        ) from None


def entrypoint_of(job: Job) -> str:
    """Return the entrypoint of a job. Jobs of one entrypoint may form a batch."""
    spec = job.spec
    batch = f"{job.batch_key}/{spec.generation.batch_size}" if job.batch_key else job.id
    batch_hash = hashlib.sha256(batch.encode()).hexdigest()[:16]
    entrypoint = f"{model_key(spec.generation.model)}/{batch_hash}"
    return entrypoint + RESTARTED if job.starts else entrypoint


def model_key(model: str | None) -> str:
    """Return a short hash of a model's name.

    Name, file name and title of a model have one key. Its hash has another key, which costs
    a reload at most.
    """
    name = re.sub(r" \[[0-9a-f]+\]$", "", model or "").removesuffix(".safetensors")
    return hashlib.sha256(name.encode()).hexdigest()[:8]


async def claim_next(
    queue: Queries,
    worker: QueueManagerId,
    holding: str | None,
    affinity: ModelAffinity,
    may_take_over: bool,
) -> QueueRow | None:
    """Claim the next job.

    The order is:

    1. jobs of a lost worker,
    2. restarted jobs,
    3. jobs of the loaded model, as long as the affinity lasts,
    4. all jobs.

    The oldest job of each group comes first.

    Args:
        queue: Queries of the current transaction.
        worker: The worker that claims.
        holding: Name of the loaded model.
        affinity: Affinity of this worker to its model.
        may_take_over: Whether jobs of lost workers may be claimed.
    """
    stale = await queue.stale_jobs(timedelta(seconds=CLAIM_S), 1) if may_take_over else []
    if stale and (claimed := await claim(queue, worker, stale[0].entrypoint, CLAIM_S)):
        return claimed
    waiting = sorted(await queue.queue_age(), key=lambda entry: entry.oldest_created)
    restarted = [entry for entry in waiting if entry.entrypoint.endswith(RESTARTED)]
    fresh = [entry for entry in waiting if not entry.entrypoint.endswith(RESTARTED)]
    loaded = [entry for entry in fresh if entry.entrypoint.split("/")[0] == model_key(holding)]
    is_delaying = bool(loaded) and loaded[0] is not fresh[0]
    prefers_loaded = affinity.lasts(model_key(holding), is_delaying=is_delaying)
    for entry in [*restarted, *(loaded if prefers_loaded else []), *fresh]:
        if claimed := await claim(queue, worker, entry.entrypoint):
            return claimed
    return None


async def claim(
    queue: Queries, worker: QueueManagerId, entrypoint: str, silent_s: float = NEVER_S
) -> QueueRow | None:
    """Claim the oldest job of an entrypoint.

    Args:
        queue: Queries of the current transaction.
        worker: The worker that claims.
        entrypoint: Entrypoint of the job.
        silent_s: Seconds without a heartbeat after which a claimed job counts as waiting.

    Returns:
        The row, or None if other workers were faster.
    """
    parameters = {QueueEntrypoint(entrypoint): EntrypointExecutionParameter(0)}
    rows = await queue.dequeue(1, parameters, worker, None, timedelta(seconds=silent_s))
    return rows[0] if rows else None


async def release_claim(queue: Queries, row: QueueRow, job: Job) -> int:
    """Return a job to the queue, with priority if it was started.

    Returns:
        The id of its row in the queue.
    """
    entrypoint = entrypoint_of(job)
    if entrypoint == row.entrypoint:
        await queue.retry_job(row, timedelta(0), None)
        return row.id
    await queue.log_jobs([(row, "canceled", None)])
    [row_id] = await queue.enqueue(entrypoint, job.id.encode())
    return row_id


@dataclass
class Claim:
    """A claimed job of this pod: its row in the queue and the number of its start."""

    job: Job
    row: QueueRow
    start: int = 0
    cancel: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the job is to be cancelled."""
    notified_at: float = 0.0
    """Monotonic time of the last progress notification."""
    is_lost: bool = False
    """Whether the job is finished or another worker has claimed it."""

    async def is_of(self, worker: QueueManagerId, queue: Queries) -> bool:
        """Return whether the worker still has the claim. A lost claim cancels the job."""
        row = await queue.queue_job_by_id(self.row.id)
        if row is None or row.queue_manager_id != worker:
            self.is_lost = True
            self.cancel.set()
        return not self.is_lost


async def keep_claims_alive(
    claims: Mapping[str, Claim], worker: QueueManagerId, transaction: Transactions
) -> None:
    """Renew a worker's claims until cancelled.

    It also finds cancel requests and lost claims whose notification was lost.
    """
    while True:
        await asyncio.sleep(CLAIM_S / 4)
        if claims:
            with contextlib.suppress(StorageFailed, asyncio.TimeoutError):
                # a stuck connection must not delay the next heartbeat
                await asyncio.wait_for(
                    _renew(list(claims.values()), worker, transaction), CLAIM_S / 2
                )


async def _renew(claims: list[Claim], worker: QueueManagerId, transaction: Transactions) -> None:
    """Send one heartbeat for all claims and set the cancel events."""
    cancelled = select(jobs.c.id).where(
        jobs.c.id.in_([claim.job.id for claim in claims]), jobs.c.cancel_asked
    )
    async with transaction() as (connection, queue):
        own = [claim for claim in claims if await claim.is_of(worker, queue)]
        await queue.update_heartbeat([claim.row.id for claim in own])
        cancelled_ids = set((await connection.execute(cancelled)).scalars())
    for claim in claims:
        if claim.job.id in cancelled_ids:
            claim.cancel.set()


async def keep_queue_log_short(notifications: Notifications, transaction: Transactions) -> None:
    """Empty PgQueuer's log regularly until cancelled.

    The log gets three rows a job that are never read. One listener empties it for all.
    """
    while True:
        await asyncio.sleep(CLEAN_EVERY_S)
        if notifications.is_first:
            with contextlib.suppress(StorageFailed):
                async with transaction() as (_, queue):
                    await queue.clear_queue_log()


class ModelAffinity:
    """Time for which a worker prefers jobs of its loaded model to older ones."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def lasts(self, model: str, *, is_delaying: bool) -> bool:
        """Return whether to continue with a model.

        Args:
            model: Key of the loaded model.
            is_delaying: Whether an older job needs another model.
        """
        now = time.monotonic()
        if is_delaying and now - self._since.setdefault(model, now) < AFFINITY_S:
            return True
        self._since.pop(model, None)
        return not is_delaying


class WakeupSampling:
    """Fraction of the notifications that an idle worker follows.

    All idle workers are notified of a job, and one of them gets it. To spare the database,
    each attempt lowers the fraction and each claim raises it, until about four workers try.
    If none does, the job waits for the next regular poll.
    """

    def __init__(self) -> None:
        self.rate = 1.0

    def record_attempt(self) -> None:
        """Lower the fraction after an attempt to claim a job."""
        self.rate = max(MIN_SAMPLE_RATE, self.rate * 0.7)

    def record_claim(self) -> None:
        """Raise the fraction after a claim."""
        self.rate = min(1.0, self.rate * 4)
