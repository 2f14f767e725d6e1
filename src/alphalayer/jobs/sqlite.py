"""The job_queue of one machine: the queue in memory, every change in the journal first. Lives on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
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
    OnEnd,
    Outcome,
    check_capacity,
    ignore_outcome,
    outcome_fields,
    too_many_starts,
)
from alphalayer.jobs.housekeeping import Housekeeping
from alphalayer.jobs.lock import open_exclusively
from alphalayer.jobs.table import Journal
from alphalayer.observability.logging import log

LOOK_EVERY_S = 2.0
"""How often whoever watches a waiting job is told the time left."""
END_S = 2.0
"""How long a start waits until jobs that are over by now are noted as such."""


@dataclass
class _Live:
    """A job that is not over: as the journal has it, and who waits for its changes."""

    job: Job
    progress: JobProgress = JobProgress()
    wanted_by: int = 1
    """How many submitted it, less those who left."""
    cancel: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def update(self, **changes: Any) -> None:
        """Replace the job and wake everyone who watches it."""
        self.job = self.job.model_copy(update=changes)
        self.wake()

    def wake(self) -> None:
        """Let every watcher look again."""
        self.changed.set()
        self.changed = asyncio.Event()


class SqliteJobQueue(Housekeeping):
    """Implements `alphalayer.jobs.base.Jobs` on a journal file."""

    def __init__(
        self,
        journal: Journal,
        lock: FileLock,
        queue_limit: int,
        queue_shares: Mapping[str, float],
        on_end: OnEnd,
    ):
        super().__init__(journal)
        self._lock = lock
        self._queue_limit = queue_limit
        self._queue_shares = queue_shares
        self._on_end = on_end
        self._live: dict[str, _Live] = {}
        self._waiting: deque[str] = deque()
        self._arrived = asyncio.Condition()
        self._accepting: dict[str, str] = {}
        """Whose the jobs are that are being written down, by id."""
        self._ending: set[asyncio.Task[None]] = set()
        self._usual_seconds = USUAL_SECONDS

    @classmethod
    async def open(
        cls,
        file: Path,
        queue_limit: int,
        queue_shares: Mapping[str, float] | None = None,
        on_end: OnEnd = ignore_outcome,
    ) -> SqliteJobQueue:
        """Open the journal and queue again what was not over, oldest first.

        `queue_shares` says for an owner which part of the queue may be theirs; others may fill it.

        Raises:
            SetupFailed: see `alphalayer.jobs.lock.check`.
        """
        journal, lock, unfinished = await open_exclusively(file)
        job_queue = cls(
            journal, lock, queue_limit, {} if queue_shares is None else queue_shares, on_end
        )
        for job in unfinished:
            job_queue._live[job.id] = _Live(job)
            if job.error:  # it cannot be read
                job_queue._end_soon(job.id, AlphalayerError.from_dict(job.error))
            elif job.cancel_asked:
                job_queue._end_soon(job.id, Cancelled("cancelled."))
            elif job.starts >= MAX_STARTS:
                job_queue._end_soon(job.id, too_many_starts("the service stopped while it ran"))
            else:
                job_queue._waiting.append(job.id)
                if job.state is JobState.RUNNING:
                    await job_queue._note(job_queue._live[job.id], state=JobState.QUEUED)
        if job_queue._ending:
            # on a full disk they are over later, and the service starts all the same
            await asyncio.wait(job_queue._ending, timeout=END_S)
        return job_queue

    async def close(self) -> None:
        """Close the journal; what is not over stays in it."""
        for task in self._ending:
            task.cancel()
        await asyncio.gather(*self._ending, return_exceptions=True)
        await self._journal.close()
        self._lock.release()

    @property
    def is_reachable(self) -> bool:
        """A file is where it is."""
        return True

    @property
    def queue_length(self) -> int:
        """Jobs that wait for an engine."""
        return len(self._waiting)

    @property
    def oldest_waiting_s(self) -> float:
        """Seconds that the next job has waited; 0 with none."""
        return time.time() - self._live[self._waiting[0]].job.created_at if self._waiting else 0.0

    async def submit(
        self,
        spec: JobSpec,
        submission: Submission = Submission(),
        delivery: Delivery = Delivery(),
        job_id: str | None = None,
    ) -> Job:
        """Accept a job; see the protocol."""
        new = Job.new(spec, submission, delivery, job_id)
        if known := await self._known(new):
            return known
        share = self._queue_shares.get(submission.owner, 1.0)
        theirs = self._count(submission.owner) if share < 1.0 else 0
        check_capacity(
            len(self._waiting) + len(self._accepting),
            self._queue_limit,
            submission.owner,
            theirs,
            share,
            self.retry_after_s,
        )
        # a place is taken before the journal is awaited, so that a crowd cannot pass the limit together
        self._accepting[new.id] = submission.owner
        # what is written down is queued, whatever becomes of whoever asked
        job = await asyncio.shield(self._accept(new))
        if job is not new:
            # another request was quicker with this key
            return await self.submit(spec, submission, delivery, job_id)
        return job

    async def _accept(self, new: Job) -> Job:
        """Write a job down and queue it; the one that has its key already."""
        try:
            job = await self._journal.add(new)
            if job is new:
                self._live[job.id] = _Live(job)
                self._waiting.append(job.id)
        finally:
            del self._accepting[new.id]
        await self._ring()
        return job

    def _count(self, owner: str) -> int:
        """How many places of the queue are an owner's."""
        waiting = sum(self._live[each].job.owner == owner for each in self._waiting)
        return waiting + sum(each == owner for each in self._accepting.values())

    async def _known(self, new: Job) -> Job | None:
        """The job that came with the same key before, wanted by one more now; None where there is none. Raises `InvalidRequest`."""
        while known := await self._journal.known(new):
            known.check_repeated(new)
            live = self._live.get(known.id)
            if live and live.job.submission.idempotency_key:
                live.wanted_by += 1
                return live.job
            if known.state.is_final:
                return known
            # it is being taken in, or is giving up its key
            await asyncio.sleep(0.01)
        return None

    @property
    def retry_after_s(self) -> int:
        """When a client that found no room may try again, in seconds."""
        return max(1, round(self._usual_seconds))

    async def view(self, job_id: str) -> JobView | None:
        """How a job stands; see the protocol."""
        if job_id in self._live:
            return self._view(self._live[job_id])
        job = await self._journal.get(job_id)
        return JobView.of_ended(job) if job else None

    async def list(
        self,
        *,
        owner: str | None = None,
        state: JobState | None = None,
        limit: int = 50,
        before: float | None = None,
    ) -> list[JobView]:
        """Jobs, newest first; see the protocol."""
        found = await self._journal.list(owner, state, limit, before)
        return [
            self._view(self._live[job.id]) if job.id in self._live else JobView.of_ended(job)
            for job in found
        ]

    async def cancel(self, job_id: str) -> bool:
        """Stop a job; one that runs is over when its engine says so. See the protocol."""
        live = self._live.get(job_id)
        return live is not None and await self._cancel(live, live.job.submission.idempotency_key)

    async def withdraw(self, job_id: str) -> None:
        """One that wanted this job is gone; see the protocol."""
        while job_id in self._accepting:
            await asyncio.sleep(0.01)
        live = self._live.get(job_id)
        if live is None:
            return
        live.wanted_by -= 1
        if live.wanted_by == 0:
            await self._cancel(live, None)

    async def _cancel(self, live: _Live, key: str | None) -> bool:
        """Cancel a job, which has this key from now on."""
        job_id, before = live.job.id, live.job
        live.job = before.with_key(key)
        if job_id not in self._waiting:
            live.cancel.set()
            # for the next start, should this one end before the engine stops
            with contextlib.suppress(StorageFailed):
                await self._journal.ask_to_cancel(live.job)
            return True
        place = self._waiting.index(job_id)
        self._waiting.remove(job_id)
        try:
            await self._write_end(live, Cancelled("cancelled."))
        except StorageFailed:
            live.job = before
            self._waiting.insert(place, job_id)
            await self._ring()
            raise
        return True

    async def wait(self, job_id: str) -> Job:
        """The job, once it is over."""
        while job_id in self._live:
            await self._live[job_id].changed.wait()
        job = await self._journal.get(job_id)
        assert job is not None, job_id
        return job

    async def watch(self, job_id: str) -> AsyncIterator[JobView]:
        """Every change of a job until it is over."""
        while (live := self._live.get(job_id)) is not None:
            changed, waits = live.changed, job_id in self._waiting
            yield self._view(live)
            # time passes for those who wait, whether something happens or not
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(changed.wait(), LOOK_EVERY_S if waits else None)
        view = await self.view(job_id)
        if view:
            yield view

    async def claim(self, holding: str | None = None) -> Job:  # noqa: ARG002 - oldest first on one machine
        """The next job; see the protocol."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: bool(self._waiting))
            job_id = self._waiting.popleft()
        self._wake_waiting()
        return self._live[job_id].job

    async def claim_compatible(self, job: Job, pixels: int) -> Job | None:
        """The oldest waiting job that fits to `job`; see the protocol."""
        key = job.batch_key
        for job_id in self._waiting if key else ():
            mate = self._live[job_id].job
            if mate.spec.pixels <= pixels and mate.batch_key == key:
                self._waiting.remove(job_id)
                self._wake_waiting()
                return mate
        return None

    async def mark_started(self, job_id: str) -> None:
        """Count a start; see the protocol."""
        live = self._live[job_id]
        await self._note(
            live, state=JobState.RUNNING, started_at=time.time(), starts=live.job.starts + 1
        )

    async def report_progress(self, job_id: str, progress: JobProgress) -> None:
        """Note progress; in memory only."""
        if job_id in self._live:
            self._live[job_id].progress = progress
            self._live[job_id].wake()

    async def complete(self, job_id: str, outcome: Outcome) -> None:
        """End a job; see the protocol."""
        live = self._live.get(job_id)
        if live is None:
            return
        if isinstance(outcome, JobResult):
            self._learn(live.job)
        await self._over(live, outcome)

    async def requeue(self, job_id: str, reason: str, *, is_counted: bool = True) -> None:
        """Queue a job again whose engine is gone, or fail it; see the protocol."""
        live = self._live.get(job_id)
        if live is None:
            return
        was_started = live.job.state is JobState.RUNNING
        starts = live.job.starts - (was_started and not is_counted)
        if live.cancel.is_set():
            await self._over(live, Cancelled("cancelled."))
        elif starts >= MAX_STARTS:
            await self.complete(job_id, too_many_starts(reason))
        else:
            live.progress = JobProgress()
            self._waiting.appendleft(job_id)
            if was_started:
                await self._note(live, state=JobState.QUEUED, starts=starts)
            await self._ring()

    async def wait_for_cancel(self, job_id: str) -> None:
        """Wait until a job is to be stopped."""
        if job_id in self._live:
            await self._live[job_id].cancel.wait()

    async def _note(self, live: _Live, **changes: Any) -> None:
        """Change a job; on a full disk in memory alone: it goes on, and ends with an error of its own."""
        live.update(**changes)
        with contextlib.suppress(StorageFailed):
            await self._journal.save(live.job)

    def _end_soon(self, job_id: str, outcome: Outcome) -> None:
        ending = asyncio.create_task(self.complete(job_id, outcome))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    async def _over(self, live: _Live, outcome: Outcome) -> None:
        """End a job. On a full disk its outcome is kept, and written again until it is safe; those who wait get it then."""
        while True:
            try:
                return await self._write_end(live, outcome)
            except StorageFailed as error:
                log.warning("job.outcome_write_failed", job=live.job.id, error=str(error))
                await asyncio.sleep(1.0)

    async def _write_end(self, live: _Live, outcome: Outcome) -> None:
        """Write an outcome down, then tell everybody. Raises `StorageFailed`."""
        # until it is written the job stands as it stood, for those who look and for the next start
        await self._journal.save(
            live.job.model_copy(update={"finished_at": time.time(), **outcome_fields(outcome)})
        )
        self._live.pop(live.job.id, None)
        self._on_end(live.job.id, outcome)
        live.wake()
        self._wake_waiting()

    async def _ring(self) -> None:
        async with self._arrived:
            self._arrived.notify()

    def _wake_waiting(self) -> None:
        """Positions changed."""
        for job_id in self._waiting:
            self._live[job_id].wake()

    def _learn(self, job: Job) -> None:
        if job.started_at:
            self._usual_seconds += 0.2 * (time.time() - job.started_at - self._usual_seconds)

    def _view(self, live: _Live) -> JobView:
        job, progress = live.job, live.progress
        if job.id in self._waiting:
            position = self._waiting.index(job.id) + 1
            return JobView(job, position, progress, self._wait_s(position))
        return JobView(job, 0, progress, estimates.rest_s(job.started_at, progress))

    def _wait_s(self, position: int) -> float:
        running = [each for each in self._live.values() if each.job.state is JobState.RUNNING]
        sent_ahead = len(self._live) - len(self._waiting) - len(running)
        rests = [estimates.rest_s(each.job.started_at, each.progress) for each in running]
        return estimates.wait_s(rests, len(running), sent_ahead + position - 1, self._usual_seconds)
