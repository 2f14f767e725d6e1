"""Which job of the shared queue a worker claims next. PgQueuer's rows carry an entrypoint; here it says what the job wants."""

from __future__ import annotations

import hashlib
from datetime import timedelta

from pgqueuer import Queries
from pgqueuer.models import Job as QueueRow
from pgqueuer.ports.repository import EntrypointExecutionParameter
from pgqueuer.types import QueueEntrypoint, QueueManagerId

from alphalayer.job import Job

CLAIM_S = 15.0
"""A claim without heartbeat for so long is another's to take."""
LEAST_EAGER = 0.002
PATIENCE_S = 10.0
"""A job that has waited so long goes first, whatever model the worker holds."""


def entrypoint_of(job: Job) -> str:
    """The queue that a job stands in: those of one entrypoint may be drawn together, and begin with the model that they want."""
    spec = job.spec
    alike = f"{job.batch_key}/{spec.generation.batch_size}" if job.batch_key else job.id
    return f"{_model_key(spec.generation.model)}/{hashlib.sha256(alike.encode()).hexdigest()[:16]}"


async def claim_next(queue: Queries, worker: QueueManagerId, holding: str | None) -> QueueRow | None:
    """The oldest job of the model that is held, or of all if one waits too long; those whose worker is gone come before."""
    stale = await queue.stale_jobs(timedelta(seconds=CLAIM_S), 1)
    if stale and (claimed := await claim(queue, worker, [each.entrypoint for each in stale])):
        return claimed
    ages = sorted(await queue.queue_age(), key=lambda each: each.oldest_created)
    if not ages:
        return None
    mine = [each for each in ages if each.entrypoint.split("/")[0] == _model_key(holding)]
    nobody_waits_long = ages[0].oldest_age_seconds < PATIENCE_S
    for each in [*(mine if nobody_waits_long else []), *ages]:
        if claimed := await claim(queue, worker, [each.entrypoint]):
            return claimed
    return None


async def claim(queue: Queries, worker: QueueManagerId, entrypoints: list[str]) -> QueueRow | None:
    """The oldest job of these entrypoints, for this worker alone; None where others were quicker."""
    wanted = {QueueEntrypoint(each): EntrypointExecutionParameter(0) for each in entrypoints}
    rows = await queue.dequeue(1, wanted, worker, None, timedelta(seconds=CLAIM_S))
    return rows[0] if rows else None


class Eagerness:
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


def _model_key(model: str | None) -> str:
    return hashlib.sha256((model or "").encode()).hexdigest()[:8]
