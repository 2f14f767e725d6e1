"""Job queue of one machine: the queue in memory, each change first in the journal file."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from alphalayer.core.errors import AlphalayerError, Cancelled, StorageFailed
from alphalayer.core.job import Delivery, Job, JobProgress, JobResult, JobSpec, JobState, Submission
from alphalayer.jobs import estimates
from alphalayer.jobs.base import (
    MAX_STARTS,
    USUAL_SECONDS,
    JobView,
    OnOutcome,
    Outcome,
    check_capacity,
    ignore_outcome,
    outcome_fields,
    too_many_starts,
)
from alphalayer.jobs.housekeeping import Housekeeping
from alphalayer.jobs.lock import open_exclusively
from alphalayer.jobs.table import Journal
from alphalayer.observability.background import retry_until_success
from alphalayer.observability.logging import log
from alphalayer.storage import disk

VIEW_EVERY_S = 2.0
"""Seconds between two views of a waiting job, whose remaining time changes."""
NEXT_JOBS = 10
"""Waiting jobs whose watchers learn of a new position at once. The others learn it by the next
view, because a change of all positions would wake all clients of a long queue.
"""
STARTUP_S = 2.0
"""Seconds that a start waits until outcomes of the last run are stored."""
WRITE_PAUSE_S, MAX_WRITE_PAUSE_S = 0.5, 5.0
"""First and longest pause before an outcome is written again."""


@dataclass
class _OpenJob:
    """An unfinished job with its progress and events."""

    job: Job
    progress: JobProgress = JobProgress()
    clients: int = 1
    """Number of clients that submitted it and have not withdrawn."""
    cancel: asyncio.Event = field(default_factory=asyncio.Event)
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    started_at: float | None = None
    """Monotonic time of the last start, as the wall clock may be set."""
    changed: asyncio.Event | None = None
    """Set at the next change. None: no client watches the job."""

    def update(self, **changes: Any) -> None:
        """Replace fields of the job and wake its watchers."""
        self.job = self.job.model_copy(update=changes)
        self.wake()

    @property
    def running_s(self) -> float | None:
        """Return the seconds since the last start."""
        return None if self.started_at is None else time.monotonic() - self.started_at

    def next_change(self) -> asyncio.Event:
        """Return the event of the next change."""
        self.changed = self.changed or asyncio.Event()
        return self.changed

    def wake(self) -> None:
        """Wake all watchers."""
        if self.changed:
            self.changed.set()
            self.changed = None


class SqliteJobQueue(Housekeeping):
    """Implementation of `alphalayer.jobs.base.Jobs` on a journal file.

    It belongs to one event loop.
    """

    def __init__(
        self,
        journal: Journal,
        folder: Path,
        lock: FileLock,
        queue_limit: int,
        queue_shares: Mapping[str, float],
        on_outcome: OnOutcome,
    ):
        super().__init__(journal)
        self._folder = folder
        self._lock = lock
        self._queue_limit = queue_limit
        self._queue_shares = queue_shares
        self._on_outcome = on_outcome
        self._open_jobs: dict[str, _OpenJob] = {}
        self._waiting: deque[str] = deque()
        self._claimed: dict[str, _OpenJob] = {}
        self._arrived = asyncio.Condition()
        self._accepting: dict[str, str] = {}
        """Owners of the jobs that are being stored, by job id."""
        self._completing: set[asyncio.Task[None]] = set()
        self._usual_seconds = USUAL_SECONDS

    @classmethod
    async def open(
        cls,
        file: Path,
        queue_limit: int,
        queue_shares: Mapping[str, float] | None = None,
        on_outcome: OnOutcome = ignore_outcome,
    ) -> SqliteJobQueue:
        """Open a journal and queue its unfinished jobs, oldest first.

        Args:
            file: The journal.
            queue_limit: Maximum number of waiting jobs.
            queue_shares: Fraction of the queue that an owner may fill. Default: all of it.
            on_outcome: Function that is called with each outcome.

        Raises:
            SetupFailed: see `alphalayer.jobs.lock.check`.
        """
        journal, lock, unfinished = await open_exclusively(file)
        shares = {} if queue_shares is None else queue_shares
        job_queue = cls(journal, file.parent, lock, queue_limit, shares, on_outcome)
        for job in unfinished:
            await job_queue._restore(job)
        if job_queue._completing:
            # on a full disk they are stored later, and the service starts all the same
            await asyncio.wait(job_queue._completing, timeout=STARTUP_S)
        return job_queue

    async def _restore(self, job: Job) -> None:
        """Queue an unfinished job of the last run, or complete it."""
        self._open_jobs[job.id] = _OpenJob(job)
        if job.error:  # its row cannot be read
            self._complete_soon(job.id, AlphalayerError.from_dict(job.error))
        elif job.cancel_asked:
            self._complete_soon(job.id, Cancelled("cancelled."))
        elif job.starts >= MAX_STARTS:
            self._complete_soon(job.id, too_many_starts("the service stopped while it ran"))
        else:
            self._waiting.append(job.id)
            if job.state is JobState.RUNNING:
                await self._save(self._open_jobs[job.id], state=JobState.QUEUED)

    async def close(self) -> None:
        """Close the journal. Unfinished jobs stay in it."""
        for task in self._completing:
            task.cancel()
        await asyncio.gather(*self._completing, return_exceptions=True)
        await self._journal.close()
        self._lock.release()

    @property
    def problem(self) -> str | None:
        """Return why the journal cannot be written, or None; see the protocol."""
        return self._journal.problem or disk.find_problem(self._folder, "the journal")

    @property
    def queue_length(self) -> int:
        """Return the number of waiting jobs."""
        return len(self._waiting)

    @property
    def oldest_waiting_s(self) -> float:
        """Return the age of the next job in seconds, or 0 without one."""
        if not self._waiting:
            return 0.0
        return estimates.elapsed_s(self._open_jobs[self._waiting[0]].job.created_at) or 0.0

    @property
    def retry_after_s(self) -> int:
        """Return the seconds until a client may retry after a full queue."""
        return max(1, round(self._usual_seconds))

    async def submit(
        self,
        spec: JobSpec,
        submission: Submission = Submission(),
        delivery: Delivery = Delivery(),
        job_id: str | None = None,
    ) -> Job:
        """Accept a job; see the protocol."""
        new = Job.new(spec, submission, delivery, job_id)
        if repeated := await self._join_repeated(new):
            return repeated
        share = self._queue_shares.get(submission.owner, 1.0)
        owned = self._count(submission.owner) if share < 1.0 else 0
        check_capacity(
            len(self._waiting) + len(self._accepting),
            self._queue_limit,
            submission.owner,
            owned,
            share,
            self.retry_after_s,
        )
        # reserved before the journal is awaited, so that concurrent requests keep the limit
        self._accepting[new.id] = submission.owner
        # a job that is stored is also queued, even if its client disconnects
        job = await asyncio.shield(self._accept(new))
        if job is not new:
            # another request with this key was faster
            return await self.submit(spec, submission, delivery, job_id)
        return job

    async def _accept(self, new: Job) -> Job:
        """Store and queue a job. Return it, or the earlier one with its key."""
        try:
            job = await self._journal.add(new)
            if job is new:
                self._open_jobs[job.id] = _OpenJob(job)
                self._waiting.append(job.id)
        finally:
            del self._accepting[new.id]
        await self._notify_worker()
        return job

    def _count(self, owner: str) -> int:
        """Return the number of waiting jobs of an owner."""
        waiting = sum(self._open_jobs[job_id].job.owner == owner for job_id in self._waiting)
        return waiting + sum(name == owner for name in self._accepting.values())

    async def _join_repeated(self, new: Job) -> Job | None:
        """Return the earlier job with the same key, with one more client.

        Raises:
            InvalidRequest: The earlier job is another request.
        """
        while repeated := await self._journal.find_repeated(new):
            repeated.check_repeated(new)
            record = self._open_jobs.get(repeated.id)
            if record and record.job.submission.idempotency_key:
                record.clients += 1
                return record.job
            if repeated.state.is_final:
                return repeated
            # it is being accepted, or is giving up its key
            await asyncio.sleep(0.01)
        return None

    async def view(self, job_id: str) -> JobView | None:
        """Return the job as it is now; see the protocol."""
        if job_id in self._open_jobs:
            return self._view(self._open_jobs[job_id])
        job = await self._journal.get(job_id)
        return JobView.of_finished(job) if job else None

    async def list(
        self,
        *,
        owner: str | None = None,
        state: JobState | None = None,
        limit: int = 50,
        before: float | None = None,
    ) -> list[JobView]:
        """Return jobs, newest first; see the protocol."""
        return [
            self._view(self._open_jobs[job.id])
            if job.id in self._open_jobs
            else JobView.of_finished(job)
            for job in await self._journal.list(owner, state, limit, before)
        ]

    async def cancel(self, job_id: str) -> bool:
        """Cancel an unfinished job; see the protocol. The engine stops a running one."""
        record = self._open_jobs.get(job_id)
        if record is None:
            return False
        return await self._cancel(record, record.job.submission.idempotency_key)

    async def withdraw(self, job_id: str) -> None:
        """Remove one of the job's clients; see the protocol."""
        while job_id in self._accepting:
            await asyncio.sleep(0.01)
        record = self._open_jobs.get(job_id)
        if record is None:
            return
        record.clients -= 1
        if record.clients == 0:
            await self._cancel(record, None)

    async def _cancel(self, record: _OpenJob, key: str | None) -> bool:
        """Cancel a job and replace its idempotency key."""
        job_id, before = record.job.id, record.job
        record.job = before.with_key(key)
        if before.state is JobState.QUEUED and job_id not in self._waiting:
            # only sent ahead: its engine leaves it out
            try:
                await self._store_outcome(record, Cancelled("cancelled."))
            except StorageFailed:
                record.job = before
                raise
            record.cancel.set()
            return True
        if job_id not in self._waiting:
            record.cancel.set()
            # for the next start, if the service ends before the engine stops
            with contextlib.suppress(StorageFailed):
                await self._journal.request_cancel(record.job)
            return True
        index = self._waiting.index(job_id)
        self._waiting.remove(job_id)
        try:
            await self._store_outcome(record, Cancelled("cancelled."))
        except StorageFailed:
            record.job = before
            self._waiting.insert(index, job_id)
            await self._notify_worker()
            raise
        return True

    async def wait(self, job_id: str) -> Job:
        """Return the job after it has finished."""
        if record := self._open_jobs.get(job_id):
            await record.finished.wait()
            return record.job
        job = await self._journal.get(job_id)
        assert job is not None, job_id
        return job

    async def watch(self, job_id: str) -> AsyncIterator[JobView]:
        """Yield the job now and at every change until it has finished."""
        while (record := self._open_jobs.get(job_id)) is not None:
            changed, is_waiting = record.next_change(), job_id in self._waiting
            yield self._view(record)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(changed.wait(), VIEW_EVERY_S if is_waiting else None)
        view = await self.view(job_id)
        if view:
            yield view

    async def claim(self, holding: str | None = None) -> Job:  # noqa: ARG002 - oldest first here
        """Claim the next job; see the protocol."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: bool(self._waiting))
            return self._claim(self._waiting.popleft())

    async def claim_compatible(self, job: Job, pixels: int) -> Job | None:
        """Claim the oldest job that fits into a batch with `job`; see the protocol."""
        key = job.batch_key
        for job_id in self._waiting if key else ():
            candidate = self._open_jobs[job_id].job
            if candidate.spec.pixels <= pixels and candidate.batch_key == key:
                self._waiting.remove(job_id)
                return self._claim(job_id)
        return None

    def _claim(self, job_id: str) -> Job:
        """Mark a job as claimed that has left the queue."""
        self._claimed[job_id] = self._open_jobs[job_id]
        self._wake_waiting()
        return self._claimed[job_id].job

    async def mark_started(self, job_id: str) -> None:
        """Count a start of the job; see the protocol."""
        record = self._open_jobs.get(job_id)
        if record is None:  # cancelled meanwhile
            return
        record.started_at = time.monotonic()
        await self._save(
            record, state=JobState.RUNNING, started_at=time.time(), starts=record.job.starts + 1
        )

    async def report_progress(self, job_id: str, progress: JobProgress) -> None:
        """Set the progress of a running job, in memory only."""
        if job_id in self._open_jobs:
            self._open_jobs[job_id].progress = progress
            self._open_jobs[job_id].wake()

    async def complete(self, job_id: str, outcome: Outcome) -> None:
        """Store the outcome of a job; see the protocol."""
        record = self._open_jobs.get(job_id)
        if record is None:
            return
        if isinstance(outcome, JobResult):
            self._update_usual_seconds(record.running_s)
        await self._complete(record, outcome)

    async def requeue(self, job_id: str, reason: str, *, is_counted: bool = True) -> None:
        """Return a claimed job to the front of the queue, or fail it; see the protocol."""
        record = self._open_jobs.get(job_id)
        if record is None:
            return
        was_started = record.job.state is JobState.RUNNING
        starts = record.job.starts - (was_started and not is_counted)
        if record.cancel.is_set():
            await self._complete(record, Cancelled("cancelled."))
        elif starts >= MAX_STARTS:
            await self.complete(job_id, too_many_starts(reason))
        else:
            record.progress = JobProgress()
            self._claimed.pop(job_id, None)
            self._waiting.appendleft(job_id)
            if was_started:
                await self._save(record, state=JobState.QUEUED, starts=starts)
            await self._notify_worker()

    async def wait_for_cancel(self, job_id: str) -> None:
        """Return once the job is to be cancelled."""
        if job_id in self._open_jobs:
            await self._open_jobs[job_id].cancel.wait()

    async def _save(self, record: _OpenJob, **changes: Any) -> None:
        """Change a job. On a full disk it changes in memory only and continues."""
        record.update(**changes)
        with contextlib.suppress(StorageFailed):
            await self._journal.save(record.job)

    def _complete_soon(self, job_id: str, outcome: Outcome) -> None:
        """Complete a job in a task."""
        task = asyncio.create_task(self.complete(job_id, outcome))
        self._completing.add(task)
        task.add_done_callback(self._completing.discard)

    async def _complete(self, record: _OpenJob, outcome: Outcome) -> None:
        """Store an outcome. On a full disk, try until it is stored."""
        with contextlib.suppress(StorageFailed):
            # the usual case, without the cost of preparing retries
            await self._store_outcome(record, outcome)
            return

        def report(error: Exception) -> None:
            log.warning("job.outcome_write_failed", job=record.job.id, error=str(error))

        async for attempt in retry_until_success(
            StorageFailed, report, WRITE_PAUSE_S, MAX_WRITE_PAUSE_S
        ):
            with attempt:
                await self._store_outcome(record, outcome)

    async def _store_outcome(self, record: _OpenJob, outcome: Outcome) -> None:
        """Store an outcome, then notify everyone who waits. Raises `StorageFailed`."""
        # until then the job is unchanged for its clients and for the next start
        finished = record.job.model_copy(
            update={"finished_at": time.time(), **outcome_fields(outcome)}
        )
        await self._journal.save(finished)
        record.job = finished
        self._open_jobs.pop(finished.id, None)
        self._claimed.pop(finished.id, None)
        self._on_outcome(finished.id, outcome)
        record.finished.set()
        record.wake()
        self._wake_waiting()

    async def _notify_worker(self) -> None:
        """Wake one worker that waits for a job."""
        async with self._arrived:
            self._arrived.notify()

    def _wake_waiting(self) -> None:
        """Wake the watchers of the next jobs, whose positions changed."""
        for job_id in itertools.islice(self._waiting, NEXT_JOBS):
            self._open_jobs[job_id].wake()

    def _update_usual_seconds(self, duration: float | None) -> None:
        """Include the duration of a job in the moving average."""
        if duration is not None:
            self._usual_seconds += 0.2 * (duration - self._usual_seconds)

    def _view(self, record: _OpenJob) -> JobView:
        job, progress = record.job, record.progress
        if job.id in self._waiting:
            position = self._waiting.index(job.id) + 1
            return JobView(job, position, progress, self._waiting_s(position))
        return JobView(job, 0, progress, estimates.running_s(record.running_s, progress))

    def _waiting_s(self, position: int) -> float:
        """Return the estimated time until the job at a position is finished."""
        remaining = [
            estimates.running_s(record.running_s, record.progress)
            for record in self._claimed.values()
            if record.job.state is JobState.RUNNING
        ]
        before = len(self._claimed) - len(remaining) + position - 1
        return estimates.waiting_s(remaining, len(remaining), before, self._usual_seconds)
