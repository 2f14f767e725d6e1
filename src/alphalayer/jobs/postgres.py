"""Job queue of many machines: jobs in PostgreSQL, the queue in PgQueuer, notifications.

One transaction adds a job to the table and to the queue. A worker claims it and renews the
claim with heartbeats. Without heartbeats another worker claims it.

`starts` counts the starts and fences them: an outcome counts only for the start that it
belongs to. A late result of a worker that was cut off changes nothing.
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
    OnOutcome,
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
from alphalayer.observability.background import keep_running, retry_until_success
from alphalayer.observability.logging import log

POLL_EVERY_S = 2.0
"""Seconds between two polls of the database, as notifications can be lost."""
CLAIM_EVERY_S = 1.0
"""Seconds between two attempts of an idle worker without a notification."""
PROGRESS_EVERY_S = 0.3
UNREACHABLE_S = 10.0
"""Seconds since the last successful poll after which the database counts as unreachable."""
WRITE_PAUSE_S, MAX_WRITE_PAUSE_S = 0.5, 5.0
"""First and longest pause before a change of a claimed job is written again."""


class PostgresJobQueue(Housekeeping):
    """Implementation of `alphalayer.jobs.base.Jobs` on PostgreSQL.

    Any pod may claim, show and cancel any job.
    """

    def __init__(
        self,
        journal: Journal,
        url: str,
        queue_limit: int,
        queue_shares: Mapping[str, float],
        role: str,
        on_outcome: OnOutcome,
    ):
        super().__init__(journal)
        self._transaction = Transactions(journal)
        self._on_outcome = on_outcome
        self._notifications = Notifications(url, role, self._set_cancel)
        self._stats = QueueStats(queue_limit, queue_shares)
        self._worker = QueueManagerId(uuid.uuid4())
        self._sampling = claims.WakeupSampling()
        self._affinity = claims.ModelAffinity()
        self._claims: dict[str, Claim] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._polled_at = 0.0

    @classmethod
    async def open(
        cls,
        url: str,
        queue_limit: int,
        queue_shares: Mapping[str, float] | None = None,
        role: str = "all",
        on_outcome: OnOutcome = ignore_outcome,
    ) -> PostgresJobQueue:
        """Connect to a database and migrate its tables.

        Args:
            url: Address of the database.
            queue_limit: Maximum number of waiting jobs.
            queue_shares: Fraction of the queue that an owner may fill. Default: all of it.
            role: Notifications to receive: "api", "worker" or "all".
            on_outcome: Function that is called with each outcome.

        Raises:
            SetupFailed: The database cannot be reached or used.
        """
        job_queue = cls(
            await Journal.open(url),
            url,
            queue_limit,
            {} if queue_shares is None else queue_shares,
            role,
            on_outcome,
        )
        await claims.install(url)
        await job_queue._poll()
        tasks = {
            "notifications": job_queue._notifications.run,
            "heartbeats": job_queue._keep_claims_alive,
            "poll": job_queue._keep_polling,
            "queue log": partial(
                claims.keep_queue_log_short, job_queue._notifications, job_queue._transaction
            ),
        }
        job_queue._tasks = [
            asyncio.create_task(keep_running(name, work)) for name, work in tasks.items()
        ]
        return job_queue

    async def close(self) -> None:
        """Close all connections. Claims expire by themselves."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._journal.close()

    # --- for the API

    async def submit(
        self,
        spec: JobSpec,
        submission: Submission = Submission(),
        delivery: Delivery = Delivery(),
        job_id: str | None = None,
    ) -> Job:
        """Accept a job; see the protocol.

        Concurrent requests, five a pod at most, may exceed the limit together.
        """
        job = Job.new(spec, submission, delivery, job_id)
        while True:
            if repeated := await self._journal.find_repeated(job):
                if repeated.check_repeated(job).state.is_final or await self._join(repeated):
                    return repeated
                continue
            async with self._transaction() as (connection, queue):
                await self._stats.check(connection, submission.owner)
                [row_id] = await queue.enqueue(claims.entrypoint_of(job), job.id.encode())
                added = await connection.execute(
                    ADD["postgresql"], {**row_of(job), "queue_id": row_id}
                )
                if added.rowcount:
                    await self._notifications.notify(connection, "queued")
                    return job
                await connection.rollback()  # another request with this key was faster

    async def _join(self, job: Job) -> bool:
        """Add a client to a job. Return whether it is unfinished and has its key."""
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
        """Return the job as it is now; see the protocol."""
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
        """Return jobs, newest first; see the protocol."""
        return await self._views(await self._journal.list(owner, state, limit, before))

    async def cancel(self, job_id: str) -> bool:
        """Cancel an unfinished job on any pod; see the protocol."""
        return await self._cancel(job_id)

    async def withdraw(self, job_id: str) -> None:
        """Remove one of the job's clients; see the protocol."""
        await self._cancel(job_id, is_withdrawal=True)

    async def _cancel(self, job_id: str, *, is_withdrawal: bool = False) -> bool:
        """Cancel a job, or withdraw a client and cancel it after the last one."""
        this_job = jobs.c.id == job_id
        freed_key = {"idempotency_key": None} if is_withdrawal else {}
        now = time.time()
        changes = {
            "state": JobState.CANCELLED.value,
            "finished_at": now,
            "webhook_due": case((WITH_WEBHOOK, now)),
            **freed_key,
        }
        # a worker sees the request by a notification, at its next heartbeat, or at its claim
        request = (
            update(jobs)
            .where(this_job, jobs.c.state.in_(OPEN))
            .values(cancel_asked=True, **freed_key)
        )
        withdraw = (
            update(jobs)
            .where(this_job)
            .values(wanted_by=jobs.c.wanted_by - 1)
            .returning(jobs.c.wanted_by)
        )
        async with self._transaction() as (connection, queue):
            if is_withdrawal and (await connection.execute(withdraw)).scalar() != 0:
                return False
            waiting = this_job & (jobs.c.state == JobState.QUEUED.value)
            row_id = (
                await connection.execute(
                    update(jobs).where(waiting).values(changes).returning(jobs.c.queue_id)
                )
            ).scalar()
            if row_id is not None:
                await queue.mark_job_as_cancelled([JobId(row_id)])
                await self._notifications.notify(connection, "changed", job_id)
            elif not (await connection.execute(request)).rowcount:
                return False
            await self._notifications.notify(connection, "cancel", job_id)
        if row_id is not None:
            self._on_outcome(job_id, Cancelled("cancelled."))
        return True

    async def wait(self, job_id: str) -> Job:
        """Return the job after it has finished. Polls besides notifications."""
        with self._notifications.subscribe(job_id) as changed:
            while True:
                changed.clear()
                with contextlib.suppress(StorageFailed):
                    job = await self._journal.get(job_id)
                    assert job is not None, job_id
                    if job.state.is_final:
                        return job
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(changed.wait(), POLL_EVERY_S)

    async def watch(self, job_id: str) -> AsyncIterator[JobView]:
        """Yield the job at every change until it has finished; see `wait`."""
        last: JobView | None = None
        with self._notifications.subscribe(job_id) as changed:
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
                    await asyncio.wait_for(changed.wait(), POLL_EVERY_S)

    @property
    def problem(self) -> str | None:
        """Return an error while the polls of the database fail."""
        is_reachable = time.monotonic() - self._polled_at < UNREACHABLE_S
        return None if is_reachable else "the database cannot be reached."

    @property
    def queue_length(self) -> int:
        """Return the number of waiting jobs at the last poll."""
        return self._stats.queue_length

    @property
    def oldest_waiting_s(self) -> float:
        """Return the age of the oldest waiting job in seconds."""
        return self._stats.oldest_waiting_s

    @property
    def retry_after_s(self) -> int:
        """Return the seconds until a client may retry after a full queue."""
        return self._stats.retry_after_s

    # --- for workers

    async def claim(self, holding: str | None = None) -> Job:
        """Claim the next job; see the protocol."""
        while True:
            self._notifications.queued.clear()
            with contextlib.suppress(StorageFailed):
                async with self._transaction() as (_, queue):
                    # after an outage, running workers need time for their next heartbeat
                    may_take_over = self._transaction.healthy_s > claims.CLAIM_S / 2
                    row = await claims.claim_next(
                        queue, self._worker, holding, self._affinity, may_take_over
                    )
                if row:
                    self._sampling.record_claim()
                    if job := await self._accept_claim(row):
                        return job
                    continue
            if await self._notifications.wait_for_job(self._sampling.rate, CLAIM_EVERY_S):
                self._sampling.record_attempt()

    async def claim_compatible(self, job: Job, pixels: int) -> Job | None:
        """Claim the oldest job that fits into a batch with `job`; see the protocol.

        Jobs of one batch key have the same size.
        """
        if job.batch_key is None or job.spec.pixels > pixels:
            return None
        try:
            async with self._transaction() as (_, queue):
                row = await claims.claim(queue, self._worker, claims.entrypoint_of(job))
            return await self._accept_claim(row) if row else None
        except StorageFailed:
            return None

    async def mark_started(self, job_id: str) -> None:
        """Count a start; see the protocol. A lost or finished job is cancelled."""
        claim = self._claims.get(job_id)
        if claim is None:
            return

        def report(error: Exception) -> None:
            log.warning("job.start_write_failed", job=job_id, error=str(error))

        async for attempt in retry_until_success(
            StorageFailed, report, WRITE_PAUSE_S, MAX_WRITE_PAUSE_S
        ):
            with attempt:
                await self._store_start(claim)

    async def _store_start(self, claim: Claim) -> None:
        """Count a start in the database. Raises `StorageFailed`."""
        changes = {
            "state": JobState.RUNNING.value,
            "started_at": time.time(),
            "starts": jobs.c.starts + 1,
        }
        count = (
            update(jobs)
            .where(jobs.c.id == claim.job.id, jobs.c.state.in_(OPEN))
            .values(changes)
            .returning(jobs.c.starts, jobs.c.cancel_asked)
        )
        async with self._transaction() as (connection, queue):
            if not await claim.is_of(self._worker, queue):
                return
            claim.start, is_cancelled = (await connection.execute(count)).first() or (0, True)
            await self._notifications.notify(connection, "changed", claim.job.id)
        if is_cancelled:
            claim.cancel.set()

    async def report_progress(self, job_id: str, progress: JobProgress) -> None:
        """Publish the progress of a running job, a few times a second at most."""
        claim = self._claims.get(job_id)
        if claim is None or time.monotonic() - claim.notified_at < PROGRESS_EVERY_S:
            return
        claim.notified_at = time.monotonic()
        with contextlib.suppress(StorageFailed):
            async with self._transaction() as (connection, _):
                await self._notifications.notify(
                    connection, "progress", job_id, **progress.model_dump()
                )

    async def complete(self, job_id: str, outcome: Outcome) -> None:
        """Store the outcome of a claimed job. Retries until the database has it."""
        claim = self._claims.get(job_id)
        if claim is None:
            return
        finished = claim.job.model_copy(
            update={"finished_at": time.time(), **outcome_fields(outcome)}
        )

        def report(error: Exception) -> None:
            log.warning("job.outcome_write_failed", job=job_id, error=str(error))

        # images of a lost claim still count until the next worker starts the job
        if not claim.is_lost or isinstance(outcome, JobResult):
            async for attempt in retry_until_success(
                StorageFailed, report, WRITE_PAUSE_S, MAX_WRITE_PAUSE_S
            ):
                with attempt:
                    await self._store_outcome(claim, finished, outcome)
        del self._claims[job_id]

    async def requeue(self, job_id: str, reason: str, *, is_counted: bool = True) -> None:
        """Return a claimed job to the queue, or fail it; see the protocol."""
        claim = self._claims.get(job_id)
        if claim is None:
            return
        if claim.cancel.is_set():
            await self.complete(job_id, Cancelled("cancelled."))
            return
        starts = claim.start if is_counted else claim.job.starts
        if starts >= MAX_STARTS:
            await self.complete(job_id, too_many_starts(reason))
            return
        del self._claims[job_id]
        with contextlib.suppress(StorageFailed):  # without a database the claim expires
            async with self._transaction() as (connection, queue):
                if await claim.is_of(self._worker, queue):
                    this_start = (
                        (jobs.c.id == job_id)
                        & (jobs.c.state.in_(OPEN))
                        & (jobs.c.starts == claim.start)
                    )
                    row_id = await claims.release_claim(
                        queue, claim.row, claim.job.model_copy(update={"starts": starts})
                    )
                    changes = {"state": JobState.QUEUED.value, "starts": starts, "queue_id": row_id}
                    await connection.execute(update(jobs).where(this_start).values(changes))
                    await self._notifications.notify(connection, "queued")

    async def wait_for_cancel(self, job_id: str) -> None:
        """Return once the job is to be cancelled."""
        if claim := self._claims.get(job_id):
            await claim.cancel.wait()

    # --- internal

    async def _accept_claim(self, row: QueueRow) -> Job | None:
        """Return the job of a claimed row, or None if it is finished or claimed here."""
        job_id = (row.payload or b"").decode()
        if job_id in self._claims:
            return None
        job = await self._journal.get(job_id)
        if job is None or job.state.is_final:
            if job and job.error and await self._journal.save(job):  # its row cannot be read
                self._on_outcome(job.id, AlphalayerError.from_dict(job.error))
            async with self._transaction() as (_, queue):
                await queue.log_jobs([(row, "canceled", None)])
            return None
        self._claims[job.id] = Claim(job, row, job.starts)
        try:
            if job.cancel_asked:
                await self.complete(job.id, Cancelled("cancelled."))
            elif job.starts >= MAX_STARTS:
                await self.complete(job.id, too_many_starts("its worker stopped while it ran"))
        except BaseException:
            # no engine gets the job, so its claim has to expire
            self._claims.pop(job.id, None)
            raise
        return job if job.id in self._claims else None

    async def _store_outcome(self, claim: Claim, finished: Job, outcome: Outcome) -> None:
        """Store the outcome if the job still belongs to this start.

        Raises:
            StorageFailed: The database cannot be reached.
        """
        job_id = finished.id
        this_start = (jobs.c.id == job_id) & jobs.c.state.in_(OPEN) & (jobs.c.starts == claim.start)
        row = row_of(finished)
        changes = {name: row[name] for name in ("state", "finished_at", "result", "error")}
        changes["webhook_due"] = finished.finished_at if finished.delivery.webhook else None
        async with self._transaction() as (connection, queue):
            statement = update(jobs).where(this_start).values(changes)
            is_current = (await connection.execute(statement)).rowcount > 0
            if is_current:
                status = "successful" if isinstance(outcome, JobResult) else "exception"
                await queue.log_jobs([(claim.row, status, None)])
                await self._notifications.notify(connection, "changed", job_id)
        if is_current:
            self._on_outcome(job_id, outcome)
        else:
            log.warning("job.stale_outcome_ignored", job=job_id, start=claim.start)

    async def _views(self, records: Sequence[Job]) -> list[JobView]:
        waiting = [job.id for job in records if job.state is JobState.QUEUED]
        positions: dict[str, int] = {}
        if waiting:
            async with self._transaction() as (connection, _):
                positions = await self._stats.positions(connection, waiting)
        return [self._view(job, positions.get(job.id)) for job in records]

    def _view(self, job: Job, position: int | None) -> JobView:
        if job.state.is_final:
            return JobView.of_finished(job)
        if position is not None:
            return JobView(job, position, JobProgress(), self._waiting_s(position))
        progress = self._notifications.progress_of(job.id)
        return JobView(
            job, 0, progress, estimates.running_s(estimates.elapsed_s(job.started_at), progress)
        )

    def _waiting_s(self, position: int) -> float:
        """Return the estimated time until the job at a position is finished."""
        stats = self._stats
        remaining = [
            estimates.running_s(
                estimates.elapsed_s(started_at), self._notifications.progress_of(job_id)
            )
            for job_id, started_at in stats.start_times.items()
        ]
        return estimates.waiting_s(remaining, stats.running, position - 1, stats.usual_s)

    def _set_cancel(self, job_id: str) -> None:
        if job_id in self._claims:
            self._claims[job_id].cancel.set()

    async def _keep_claims_alive(self) -> None:
        await claims.keep_claims_alive(self._claims, self._worker, self._transaction)

    async def _keep_polling(self) -> None:
        while True:
            await asyncio.sleep(POLL_EVERY_S)
            with contextlib.suppress(StorageFailed):
                await self._poll()

    async def _poll(self) -> None:
        async with self._transaction() as (connection, _):
            await self._stats.refresh(connection)
        self._polled_at = time.monotonic()
