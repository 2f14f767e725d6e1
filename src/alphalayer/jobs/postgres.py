"""The job_queue of many machines: jobs in PostgreSQL, their queue in PgQueuer, news by NOTIFY. Any pod may take, show and cancel any job.

A job is in the table and in the queue by one transaction. A worker claims it from the queue and keeps the claim alive with heartbeats;
when these stop, another worker claims it. `starts` is counted at every start and fences: an outcome counts only for the start that
it belongs to, so that a late result of a worker that was cut off changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial

from pgqueuer.models import Job as QueueRow
from pgqueuer.types import JobId, QueueManagerId
from sqlalchemy import case, update

from alphalayer.core.errors import AlphalayerError, Cancelled, StorageFailed
from alphalayer.core.job import Delivery, Job, JobProgress, JobResult, JobSpec, JobState, Submission
from alphalayer.jobs import claims, estimates
from alphalayer.jobs.admission import QueueStats
from alphalayer.jobs.base import (
    MAX_STARTS,
    JobView,
    OnEnd,
    Outcome,
    ignore_outcome,
    outcome_fields,
    too_many_starts,
)
from alphalayer.jobs.claims import Claim
from alphalayer.jobs.housekeeping import Housekeeping
from alphalayer.jobs.notifications import Notifications
from alphalayer.jobs.table import ADD, OPEN, WITH_WEBHOOK, Journal, jobs, row_of
from alphalayer.jobs.transactions import Transactions
from alphalayer.observability.background import keep_running
from alphalayer.observability.logging import log

LOOK_EVERY_S = 2.0
"""How often to look without any news: news may be lost while a connection is made anew."""
ASK_EVERY_S = 1.0
"""How often an idle worker asks for a job without any news: the longest that a job waits because nobody was eager."""
PROGRESS_EVERY_S = 0.3
AWAY_S = 10.0
"""Jobs cannot be written down where the last look at the queue that went well is so long ago."""


class PostgresJobQueue(Housekeeping):
    """Implements `alphalayer.jobs.base.Jobs` on PostgreSQL."""

    def __init__(
        self,
        journal: Journal,
        url: str,
        queue_limit: int,
        queue_shares: Mapping[str, float],
        role: str,
        on_end: OnEnd,
    ):
        super().__init__(journal)
        self._transaction = Transactions(journal)
        self._on_end = on_end
        self._notifications = Notifications(url, role, self._asked_to_cancel)
        self._room = QueueStats(queue_limit, queue_shares)
        self._worker = QueueManagerId(uuid.uuid4())
        self._eagerness = claims.WakeupSampling()
        self._patience = claims.ModelAffinity()
        self._held: dict[str, Claim] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._looked_at = 0.0

    @classmethod
    async def open(
        cls,
        url: str,
        queue_limit: int,
        queue_shares: Mapping[str, float] | None = None,
        role: str = "all",
        on_end: OnEnd = ignore_outcome,
    ) -> PostgresJobQueue:
        """Connect and bring both schemas up to date. `role` says whose news are heard: "api", "worker" or "all". Raises `SetupFailed`."""
        job_queue = cls(
            await Journal.open(url),
            url,
            queue_limit,
            {} if queue_shares is None else queue_shares,
            role,
            on_end,
        )
        await claims.install(url)
        await job_queue._look()
        job_queue._tasks = [
            asyncio.create_task(keep_running(name, each))
            for name, each in (
                ("news", job_queue._notifications.run),
                ("beat", job_queue._beat),
                ("look", job_queue._keep_looking),
                (
                    "tidy",
                    partial(
                        claims.keep_queue_log_short,
                        job_queue._notifications,
                        job_queue._transaction,
                    ),
                ),
            )
        ]
        return job_queue

    async def close(self) -> None:
        """Stop listening and give the connections back; claims run out by themselves."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._journal.close()

    # --- for those who ask for pictures

    async def submit(
        self,
        spec: JobSpec,
        submission: Submission = Submission(),
        delivery: Delivery = Delivery(),
        job_id: str | None = None,
    ) -> Job:
        """Accept a job; see the protocol. Those that count at the same moment, five a pod at most, may pass the limit together."""
        job = Job.new(spec, submission, delivery, job_id)
        while True:
            if known := await self._journal.known(job):
                if known.check_repeated(job).state.is_final or await self._join(known):
                    return known
                continue
            async with self._transaction() as (connection, queue):
                await self._room.check(connection, submission.owner)
                [row_id] = await queue.enqueue(claims.entrypoint_of(job), job.id.encode())
                added = await connection.execute(
                    ADD["postgresql"], {**row_of(job), "queue_id": row_id}
                )
                if added.rowcount:
                    await self._notifications.tell(connection, "queued")
                    return job
                await connection.rollback()  # another request was quicker with this key

    async def _join(self, job: Job) -> bool:
        """One more wants this job; whether it still runs or waits under its key."""
        same = (
            (jobs.c.id == job.id)
            & (jobs.c.idempotency_key == job.submission.idempotency_key)
            & jobs.c.state.in_(OPEN)
        )
        async with self._transaction() as (connection, _):
            joined = await connection.execute(
                update(jobs).where(same).values(wanted_by=jobs.c.wanted_by + 1)
            )
        return joined.rowcount > 0

    async def view(self, job_id: str) -> JobView | None:
        """How a job stands; see the protocol."""
        job = await self._journal.get(job_id)
        return (await self._views([job]))[0] if job else None

    async def list(
        self,
        *,
        owner: str | None = None,
        state: JobState | None = None,
        limit: int = 50,
        before: float | None = None,
    ) -> list[JobView]:
        """Jobs, newest first; see the protocol."""
        return await self._views(await self._journal.list(owner, state, limit, before))

    async def cancel(self, job_id: str) -> bool:
        """Stop a job, wherever it is; see the protocol."""
        return await self._cancel(job_id)

    async def withdraw(self, job_id: str) -> None:
        """One that wanted this job is gone; see the protocol."""
        await self._cancel(job_id, as_leaving=True)

    async def _cancel(self, job_id: str, *, as_leaving: bool = False) -> bool:
        mine = jobs.c.id == job_id
        freed = {"idempotency_key": None} if as_leaving else {}
        now = time.time()
        due = case((WITH_WEBHOOK, now))
        changes = {
            "state": JobState.CANCELLED.value,
            "finished_at": now,
            "webhook_due": due,
            **freed,
        }
        # the worker hears of it at once, or sees it with its next heartbeat, or another one does when it takes the job over
        ask = update(jobs).where(mine, jobs.c.state.in_(OPEN)).values(cancel_asked=True, **freed)
        leave = (
            update(jobs)
            .where(mine)
            .values(wanted_by=jobs.c.wanted_by - 1)
            .returning(jobs.c.wanted_by)
        )
        async with self._transaction() as (connection, queue):
            if as_leaving and (await connection.execute(leave)).scalar() != 0:
                return False
            waiting = mine & (jobs.c.state == JobState.QUEUED.value)
            row_id = (
                await connection.execute(
                    update(jobs).where(waiting).values(changes).returning(jobs.c.queue_id)
                )
            ).scalar()
            if row_id is not None:
                await queue.mark_job_as_cancelled([JobId(row_id)])
                await self._notifications.tell(connection, "changed", job_id)
            elif not (await connection.execute(ask)).rowcount:
                return False
            await self._notifications.tell(connection, "cancel", job_id)
        if row_id is not None:
            self._on_end(job_id, Cancelled("cancelled."))
        return True

    async def wait(self, job_id: str) -> Job:
        """The job, once it is over; looks by itself now and then."""
        with self._notifications.about(job_id) as changed:
            while True:
                changed.clear()
                with contextlib.suppress(StorageFailed):
                    job = await self._journal.get(job_id)
                    assert job is not None, job_id
                    if job.state.is_final:
                        return job
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(changed.wait(), LOOK_EVERY_S)

    async def watch(self, job_id: str) -> AsyncIterator[JobView]:
        """Every change of a job until it is over; looks by itself now and then."""
        last: JobView | None = None
        with self._notifications.about(job_id) as changed:
            while True:
                changed.clear()
                with contextlib.suppress(StorageFailed):
                    view = await self.view(job_id)
                    if view is None:
                        return
                    if view != last:
                        yield view
                    if view.job.state.is_final:
                        return
                    last = view
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(changed.wait(), LOOK_EVERY_S)

    @property
    def is_reachable(self) -> bool:
        """Whether jobs can be written down now, as far as is known."""
        return time.monotonic() - self._looked_at < AWAY_S

    @property
    def queue_length(self) -> int:
        """Jobs that wait, anywhere; a few seconds old."""
        return self._room.queue_length

    @property
    def oldest_waiting_s(self) -> float:
        """Seconds that the oldest of them has waited."""
        return self._room.oldest_waiting_s

    @property
    def retry_after_s(self) -> int:
        """When a client that found no room may try again, in seconds."""
        return self._room.retry_after_s

    # --- for supervisors

    async def claim(self, holding: str | None = None) -> Job:
        """The next job; see the protocol."""
        while True:
            self._notifications.queued.clear()
            with contextlib.suppress(StorageFailed):
                async with self._transaction() as (_, queue):
                    # where the database was away, those who are at work need time for their next heartbeat
                    may_take_over = self._transaction.well_for_s > claims.CLAIM_S / 2
                    claimed = await claims.claim_next(
                        queue, self._worker, holding, self._patience, may_take_over
                    )
                if claimed:
                    self._eagerness.claimed()
                    if job := await self._hold(claimed):
                        return job
                    continue
            if await self._notifications.of_jobs(self._eagerness.part, ASK_EVERY_S):
                self._eagerness.answered()

    async def claim_compatible(self, job: Job, pixels: int) -> Job | None:
        """The oldest waiting job that fits to `job`; see the protocol. Jobs of one key have one size here."""
        if job.batch_key is None or job.spec.pixels > pixels:
            return None
        try:
            async with self._transaction() as (_, queue):
                claimed = await claims.claim(queue, self._worker, claims.entrypoint_of(job))
            return await self._hold(claimed) if claimed else None
        except StorageFailed:
            return None

    async def mark_started(self, job_id: str) -> None:
        """Count a start; see the protocol. A job that is over by now, or another's, is told to stop."""
        held = self._held.get(job_id)
        if held is None:
            return
        changes = {
            "state": JobState.RUNNING.value,
            "started_at": time.time(),
            "starts": jobs.c.starts + 1,
        }
        count = update(jobs).where(jobs.c.id == job_id, jobs.c.state.in_(OPEN)).values(changes)
        while True:
            with contextlib.suppress(StorageFailed):
                async with self._transaction() as (connection, queue):
                    if not await held.is_of(self._worker, queue):
                        return
                    counted = await connection.execute(
                        count.returning(jobs.c.starts, jobs.c.cancel_asked)
                    )
                    held.start, is_to_stop = counted.first() or (0, True)
                    await self._notifications.tell(connection, "changed", job_id)
                break
            await asyncio.sleep(1.0)
        if is_to_stop:
            held.cancel.set()

    async def report_progress(self, job_id: str, progress: JobProgress) -> None:
        """Tell it to whoever watches, a few times a second at most."""
        held = self._held.get(job_id)
        if held is None or time.monotonic() - held.told_at < PROGRESS_EVERY_S:
            return
        held.told_at = time.monotonic()
        with contextlib.suppress(StorageFailed):
            async with self._transaction() as (connection, _):
                await self._notifications.tell(
                    connection, "progress", job_id, **progress.model_dump()
                )

    async def complete(self, job_id: str, outcome: Outcome) -> None:
        """End a job, if it is still this start's to end; tried again until the database has it."""
        held = self._held.get(job_id)
        if held is None:
            return
        ended = held.job.model_copy(update={"finished_at": time.time(), **outcome_fields(outcome)})
        # the pictures of one that is another's now still count if the other has not begun
        is_ours = not held.is_lost or isinstance(outcome, JobResult)
        while is_ours and not await self._end(held, ended, outcome):
            await asyncio.sleep(1.0)
        del self._held[job_id]

    async def requeue(self, job_id: str, reason: str, *, is_counted: bool = True) -> None:
        """Give a job back to the queue whose engine is gone, or fail it; see the protocol."""
        held = self._held.get(job_id)
        if held is None:
            return
        if held.cancel.is_set():
            await self.complete(job_id, Cancelled("cancelled."))
            return
        starts = held.start if is_counted else held.job.starts
        if starts >= MAX_STARTS:
            await self.complete(job_id, too_many_starts(reason))
            return
        del self._held[job_id]
        with contextlib.suppress(StorageFailed):  # without a database the claim runs out by itself
            async with self._transaction() as (connection, queue):
                if await held.is_of(self._worker, queue):
                    mine = (
                        (jobs.c.id == job_id)
                        & (jobs.c.state.in_(OPEN))
                        & (jobs.c.starts == held.start)
                    )
                    row_id = await claims.release_claim(
                        queue, held.row, held.job.model_copy(update={"starts": starts})
                    )
                    back = {"state": JobState.QUEUED.value, "starts": starts, "queue_id": row_id}
                    await connection.execute(update(jobs).where(mine).values(back))
                    await self._notifications.tell(connection, "queued")

    async def wait_for_cancel(self, job_id: str) -> None:
        """Wait until a job is to be stopped."""
        if held := self._held.get(job_id):
            await held.cancel.wait()

    # --- inside

    async def _hold(self, row: QueueRow) -> Job | None:
        """The job of a claimed row; None where it is over, given up now, or at work here all the same."""
        job_id = (row.payload or b"").decode()
        if job_id in self._held:
            return None
        job = await self._journal.get(job_id)
        if job is None or job.state.is_final:
            if job and job.error and await self._journal.save(job):  # it cannot be read
                self._on_end(job.id, AlphalayerError.from_dict(job.error))
            async with self._transaction() as (_, queue):
                await queue.log_jobs([(row, "canceled", None)])
            return None
        self._held[job.id] = Claim(job, row, job.starts)
        try:
            if job.cancel_asked:
                await self.complete(job.id, Cancelled("cancelled."))
            elif job.starts >= MAX_STARTS:
                await self.complete(job.id, too_many_starts("its worker stopped while it ran"))
        except BaseException:
            # nobody will have it from here: its claim is to run out
            self._held.pop(job.id, None)
            raise
        return job if job.id in self._held else None

    async def _end(self, held: Claim, ended: Job, outcome: Outcome) -> bool:
        """Write the outcome, if the job is still of this start; whether the database could be reached."""
        mine = (jobs.c.id == ended.id) & jobs.c.state.in_(OPEN) & (jobs.c.starts == held.start)
        row = row_of(ended)
        changes = {name: row[name] for name in ("state", "finished_at", "result", "error")}
        changes["webhook_due"] = ended.finished_at if ended.delivery.webhook else None
        try:
            async with self._transaction() as (connection, queue):
                is_mine = (
                    await connection.execute(update(jobs).where(mine).values(changes))
                ).rowcount > 0
                if is_mine:
                    done = isinstance(outcome, JobResult)
                    await queue.log_jobs([(held.row, "successful" if done else "exception", None)])
                    await self._notifications.tell(connection, "changed", ended.id)
        except StorageFailed as error:
            log.warning("job.outcome_write_failed", job=ended.id, error=str(error))
            return False
        if is_mine:
            self._on_end(ended.id, outcome)
        else:
            log.warning("job.stale_outcome_ignored", job=ended.id, start=held.start)
        return True

    async def _views(self, found: Sequence[Job]) -> list[JobView]:
        waiting = [job.id for job in found if job.state is JobState.QUEUED]
        positions: dict[str, int] = {}
        if waiting:
            async with self._transaction() as (connection, _):
                positions = await self._room.positions(connection, waiting)
        return [self._view(job, positions.get(job.id)) for job in found]

    def _view(self, job: Job, position: int | None) -> JobView:
        if job.state.is_final:
            return JobView.of_ended(job)
        if position is not None:
            room = self._room
            rests = [
                estimates.rest_s(at, self._notifications.progress_of(each))
                for each, at in room.some_running.items()
            ]
            return JobView(
                job,
                position,
                JobProgress(),
                estimates.wait_s(rests, room.running, position - 1, room.usual_s),
            )
        progress = self._notifications.progress_of(job.id)
        return JobView(job, 0, progress, estimates.rest_s(job.started_at, progress))

    def _asked_to_cancel(self, job_id: str) -> None:
        if job_id in self._held:
            self._held[job_id].cancel.set()

    async def _beat(self) -> None:
        await claims.keep_claims_alive(self._held, self._worker, self._transaction)

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            with contextlib.suppress(StorageFailed):
                await self._look()

    async def _look(self) -> None:
        async with self._transaction() as (connection, _):
            await self._room.look(connection)
        self._looked_at = time.monotonic()
