"""Which job of the shared queue a worker claims next, and how it keeps it.

PgQueuer's rows carry an entrypoint; here it says what the job wants.
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
"""A claim without heartbeat for so long is another's to take."""
NEVER_S = 1e9
TIDY_EVERY_S = 600.0
LEAST_EAGER = 0.002
STAY_S = 30.0
"""So long a worker stays with its model while an older job waits for another one. To load a model takes some 5 to 10 seconds."""
AGAIN = "/again"
"""The kind of a job that was started before ends so: it goes before others, and is in a queue of its own."""


async def install(url: str) -> None:
    """PgQueuer's tables as this version of it wants them, by one at a time. Raises `SetupFailed`.

    Outside of a transaction, as its upgrades want it, and for as long as they take.
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
            f"the queue's tables cannot be made: {error}.",
            hint="Check that PostgreSQL runs, and the user's rights.",
        ) from None


def entrypoint_of(job: Job) -> str:
    """The queue that a job stands in: those of one entrypoint may be drawn together, and begin with the model that they want."""
    spec = job.spec
    alike = f"{job.batch_key}/{spec.generation.batch_size}" if job.batch_key else job.id
    kind = f"{model_key(spec.generation.model)}/{hashlib.sha256(alike.encode()).hexdigest()[:16]}"
    return kind + AGAIN if job.starts else kind


def model_key(model: str | None) -> str:
    """The same for a model's name, file name and title; its hash is taken for another model, which costs a reload at most."""
    name = re.sub(r" \[[0-9a-f]+\]$", "", model or "").removesuffix(".safetensors")
    return hashlib.sha256(name.encode()).hexdigest()[:8]


async def claim_next(
    queue: Queries,
    worker: QueueManagerId,
    holding: str | None,
    patience: ModelAffinity,
    may_take_over: bool,
) -> QueueRow | None:
    """The oldest job of the model that is held, or of all if that is their turn; those whose worker is gone come before, if they may."""
    stale = await queue.stale_jobs(timedelta(seconds=CLAIM_S), 1) if may_take_over else []
    if stale and (claimed := await claim(queue, worker, stale[0].entrypoint, CLAIM_S)):
        return claimed
    waiting = sorted(await queue.queue_age(), key=lambda each: each.oldest_created)
    again = [each for each in waiting if each.entrypoint.endswith(AGAIN)]
    ages = [each for each in waiting if not each.entrypoint.endswith(AGAIN)]
    mine = [each for each in ages if each.entrypoint.split("/")[0] == model_key(holding)]
    stays = patience.lasts(model_key(holding), is_tried=bool(mine) and mine[0] is not ages[0])
    for each in [*again, *(mine if stays else []), *ages]:
        if claimed := await claim(queue, worker, each.entrypoint):
            return claimed
    return None


async def claim(
    queue: Queries, worker: QueueManagerId, entrypoint: str, silent_s: float = NEVER_S
) -> QueueRow | None:
    """The oldest job of an entrypoint, for this worker alone; None where others were quicker.

    Those that a worker has count, too, if it was silent for so long.
    """
    wanted = {QueueEntrypoint(entrypoint): EntrypointExecutionParameter(0)}
    rows = await queue.dequeue(1, wanted, worker, None, timedelta(seconds=silent_s))
    return rows[0] if rows else None


async def release_claim(queue: Queries, row: QueueRow, job: Job) -> int:
    """Let others claim a job, in its old place, or before all if it was started meanwhile. The id of its row in the queue."""
    entrypoint = entrypoint_of(job)
    if entrypoint == row.entrypoint:
        await queue.retry_job(row, timedelta(0), None)
        return row.id
    await queue.log_jobs([(row, "canceled", None)])
    [row_id] = await queue.enqueue(entrypoint, job.id.encode())
    return row_id


@dataclass
class Claim:
    """A job that this pod's engines have: its row in the queue, which start of it this is, and whether it is to stop."""

    job: Job
    row: QueueRow
    start: int = 0
    cancel: asyncio.Event = field(default_factory=asyncio.Event)
    told_at: float = 0.0
    is_lost: bool = False
    """It is over, or another worker's by now: its end is not ours to write."""

    async def is_of(self, worker: QueueManagerId, queue: Queries) -> bool:
        """Whether the claim is still this worker's; else it is lost, and the job is to stop."""
        row = await queue.queue_job_by_id(self.row.id)
        if row is None or row.queue_manager_id != worker:
            self.is_lost = True
            self.cancel.set()
        return not self.is_lost


async def keep_claims_alive(
    held: Mapping[str, Claim], worker: QueueManagerId, transaction: Transactions
) -> None:
    """Keep a worker's claims alive until cancelled, and do what news may have failed to say: a job is to stop, a claim is another's by
    now."""
    while True:
        await asyncio.sleep(CLAIM_S / 4)
        if held:
            with contextlib.suppress(StorageFailed, asyncio.TimeoutError):
                # a connection that is stuck must not keep the next heartbeat
                await asyncio.wait_for(
                    _renew(list(held.values()), worker, transaction), CLAIM_S / 2
                )


async def _renew(held: list[Claim], worker: QueueManagerId, transaction: Transactions) -> None:
    cancelled = select(jobs.c.id).where(
        jobs.c.id.in_([each.job.id for each in held]), jobs.c.cancel_asked
    )
    async with transaction() as (connection, queue):
        mine = [each for each in held if await each.is_of(worker, queue)]
        await queue.update_heartbeat([each.row.id for each in mine])
        asked = set((await connection.execute(cancelled)).scalars())
    for each in held:
        if each.job.id in asked:
            each.cancel.set()


async def keep_queue_log_short(news: Notifications, transaction: Transactions) -> None:
    """Empty PgQueuer's log, three rows a job that nobody reads; one of all that listen does it. Until cancelled."""
    while True:
        await asyncio.sleep(TIDY_EVERY_S)
        if news.is_first:
            with contextlib.suppress(StorageFailed):
                async with transaction() as (_, queue):
                    await queue.clear_queue_log()


class ModelAffinity:
    """How long workers stay with the model that they hold while an older job waits for another one; then that goes first."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def lasts(self, model: str, *, is_tried: bool) -> bool:
        """Whether to go on with a model; `is_tried` says that an older job of another one is passed over."""
        now = time.monotonic()
        if is_tried and now - self._since.setdefault(model, now) < STAY_S:
            return True
        self._since.pop(model, None)
        return not is_tried


class WakeupSampling:
    """Which part of the news of jobs an idle worker answers.

    All idle workers hear of a job, and one will have it; the rest would ask the database for nothing. So each answer lowers the part and
    each claim raises it, until some four of however many answer. Where nobody did, the job waits for one that asks by itself.
    """

    def __init__(self) -> None:
        self.part = 1.0

    def answered(self) -> None:
        """The worker goes to see whether it gets the job."""
        self.part = max(LEAST_EAGER, self.part * 0.7)

    def claimed(self) -> None:
        """It got one."""
        self.part = min(1.0, self.part * 4)
